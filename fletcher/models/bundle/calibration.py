"""Value ranges for int8 vectors, measured on sample texts and kept in the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fletcher.core.quantization import Ranges
from fletcher.errors import ModelError
from fletcher.models.bundle.files import convert_json, read_json, sha256
from fletcher.util.durable import write_atomically

CALIBRATION = "calibration.json"


class Cut(msgspec.Struct, frozen=True, order=True):
    """One kind of a model's vectors; each kind has its own ranges of values.

    Attributes:
        layers: Exit layer that the vectors come from.
        dims: Number of leading dimensions that are kept.
        normalized: Whether the vectors have L2 norm 1.
    """

    layers: int
    dims: int
    normalized: bool

    def __str__(self) -> str:
        shape = "normalized" if self.normalized else "not normalized"
        return f"{self.dims} dims after {self.layers} layers, {shape}"


class _Row(Cut, frozen=True):
    """The ranges of one kind of vectors, as calibration.json stores them."""

    start: list[float]
    step: list[float]


class _File(msgspec.Struct, frozen=True):
    """Content of calibration.json."""

    num_texts: int
    ranges: list[_Row]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Value ranges of each kind of vectors; empty before the first calibration.

    Attributes:
        num_texts: Number of texts in the sample.
        ranges: Value ranges of each kind of vectors.
    """

    num_texts: int = 0
    ranges: Mapping[Cut, Ranges] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: Path) -> Calibration:
        """Read a file that `save` wrote. Raises ModelError if the file is damaged."""
        remedy = "; run `fletcher model calibrate` with --replace"
        content = convert_json(read_json(path), _File, path.name, remedy)
        try:
            ranges = {
                Cut(one.layers, one.dims, one.normalized): Ranges.from_json(
                    {"start": one.start, "step": one.step}
                )
                for one in content.ranges
            }
        except ValueError as error:
            raise ModelError(f"{path.name} is damaged: {error}{remedy}") from None
        if any(len(one.start) != cut.dims for cut, one in ranges.items()):
            raise ModelError(f"{path.name} is damaged: ranges of another width{remedy}")
        return cls(content.num_texts, ranges)

    def save(self, folder: Path, manifest: str) -> None:
        """Write the ranges into a bundle's folder and their checksum into its manifest.

        The caller must hold the model's lock. A crash during the call leaves a valid bundle: either
        the manifest is unchanged, or it does not list calibration.json.
        """
        rows = [
            {**msgspec.structs.asdict(cut), **one.to_json()}
            for cut, one in sorted(self.ranges.items())
        ]
        path = folder / CALIBRATION
        fields = read_json(folder / manifest)
        if fields["files"].pop(CALIBRATION, None):
            _write_json(folder / manifest, fields)
        _write_json(path, {"num_texts": self.num_texts, "ranges": rows})
        fields["files"][CALIBRATION] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _write_json(folder / manifest, fields)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
