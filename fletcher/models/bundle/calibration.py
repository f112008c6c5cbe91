"""What a sample of texts showed of a model's vectors, frozen in its bundle: ranges for int8."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fletcher.core.quantization import Ranges
from fletcher.errors import ModelError
from fletcher.models.bundle.files import read_json, sha256

CALIBRATION = "calibration.json"


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """Vectors of one kind: each has values of its own range.

    Attributes:
        layers: Exit layer.
        dims: Leading dimensions.
        normalized: L2 norm is 1.
    """

    layers: int
    dims: int
    normalized: bool

    def __str__(self) -> str:
        shape = "normalized" if self.normalized else "not normalized"
        return f"{self.dims} dims after {self.layers} layers, {shape}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Ranges for each kind of vectors that a bundle declares; none where it has no sample yet.

    Attributes:
        num_texts: Texts of the sample.
        ranges: By kind of vectors.
    """

    num_texts: int = 0
    ranges: Mapping[Cut, Ranges] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads what `save` wrote. Raises ModelError where the file is none."""
        fields = read_json(path)
        try:
            ranges = {
                Cut(int(one["layers"]), int(one["dims"]), bool(one["normalized"])): (
                    Ranges.from_json(one)
                )
                for one in fields["ranges"]
            }
            num_texts = int(fields["num_texts"])
            if any(len(one.start) != cut.dims for cut, one in ranges.items()):
                raise ValueError("ranges of another width")
        except (KeyError, TypeError, ValueError):
            raise ModelError(
                f"{path.name} is damaged; run `fletcher model calibrate` with --replace"
            ) from None
        return cls(num_texts, ranges)

    def save(self, folder: Path, manifest: str) -> None:
        """Puts itself into a bundle's folder and under its checksums; the caller has the lock.

        Whoever dies in between leaves a file that the manifest does not name, or names as it was.

        Args:
            folder: The bundle's.
            manifest: The manifest's name there.
        """
        rows = [
            {"layers": cut.layers, "dims": cut.dims, "normalized": cut.normalized, **one.to_json()}
            for cut, one in sorted(self.ranges.items())
        ]
        path = folder / CALIBRATION
        fields = read_json(folder / manifest)
        if fields["files"].pop(CALIBRATION, None):
            _replace(folder / manifest, fields)
        _replace(path, {"num_texts": self.num_texts, "ranges": rows})
        fields["files"][CALIBRATION] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _replace(folder / manifest, fields)


def _replace(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
