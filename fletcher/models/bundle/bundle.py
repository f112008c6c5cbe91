"""A model bundle: a folder with everything that defines a model's vectors.

fletcher.json     what the model is, where it comes from, size and SHA-256 of every file
tokenizer.json    as the `tokenizers` library reads it
model.onnx        the graph
model.weights     its weights, mapped into memory by the engine
model.N.*         both in segments where the model has exits: each ends after layer N
late.onnx         where the model pools by mean: the graph that pools parts of rows, same weights
calibration.json  ranges for int8, where `fletcher model calibrate` found some
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec

from fletcher.core.schema import SPARSE_WIDTH
from fletcher.errors import ModelError
from fletcher.models.bundle.calibration import CALIBRATION, Calibration
from fletcher.models.bundle.files import check_name, convert_json, is_inside, read_json, sha256
from fletcher.models.bundle.spec import MANIFEST, ModelSpec, Natural
from fletcher.models.checkpoint.markers import Queries, Skipped

FORMAT = 1
TOKENIZER = "tokenizer.json"
LATE_GRAPH = "late.onnx"
_ADD_AGAIN = "; add the model again with `fletcher model add`"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle, as the manifest lists it."""

    bytes: Natural
    sha256: str


class _Manifest(ModelSpec, frozen=True, kw_only=True):
    """fletcher.json without its `format`."""

    name: str
    hash: str
    files: dict[str, Any]


class ModelBundle(ModelSpec, frozen=True, kw_only=True):
    """A model's bundle on disk, checked as far as `from_folder` was asked to.

    Attributes:
        folder: The bundle's folder.
        name: The model's name.
        hash: First 12 hex digits of a SHA-256 over what defines the vectors; the same on every
            machine and after every re-adding.
        late: Path of the graph for late chunking; None: there is none.
        num_bytes: Size of all files.
        calibration: Ranges for int8.
    """

    folder: Path
    name: str
    hash: str
    late: Path | None
    num_bytes: int
    calibration: Calibration

    @property
    def graph(self) -> Path:
        """Path of the ONNX file."""
        return self.folder / self.graph_file

    @property
    def tokenizer(self) -> Path:
        """Path of tokenizer.json."""
        return self.folder / TOKENIZER

    @property
    def qualified_name(self) -> str:
        """`name@hash`."""
        return f"{self.name}@{self.hash}"

    @property
    def width(self) -> int:
        """Numbers in each vector of a row, on the way through the house."""
        return SPARSE_WIDTH if self.output == "sparse" else self.dim

    @property
    def max_vectors(self) -> int:
        """Vectors of a row at most."""
        return {"dense": 1, "sparse": self.dim, "multi": self.max_length}[self.output]

    @property
    def skipped(self) -> Skipped | None:
        """Which tokens have no vector; None: all have."""
        return Skipped(self.skip_marker, self.skip_tokens) if self.skip_tokens else None

    @property
    def queries(self) -> Queries | None:
        """How queries are read; None: as documents."""
        if not self.query_length:
            return None
        filler = self.query_filler if self.query_filler >= 0 else None
        return Queries(self.query_marker, self.query_length, filler, self.fillers_attended)

    @property
    def blocks(self) -> list[Path]:
        """The graphs that make up the model, in their order, one an exit layer.

        Each but the first takes `hidden`, float32 [B, L, H], which the one before gives as
        `handed_on`, in place of `input_ids`.
        """
        if not self.has_exits:
            return [self.graph]
        return [self.folder / block_file(layers) for layers in self.layers]

    @property
    def graph_normalizes(self) -> bool:
        """Whether the graph's embeddings have L2 norm 1 already, their norms in output `norm`."""
        return "norm" in self.outputs

    def to_dict(self) -> dict[str, Any]:
        """Fields and paths by name, for `fletcher model show`."""
        spec = {
            one.encode_name: getattr(self, one.name) for one in msgspec.structs.fields(ModelSpec)
        }
        return {
            "folder": self.folder,
            "name": self.name,
            "hash": self.hash,
            **spec,
            "graph": self.graph,
            "tokenizer": self.tokenizer,
            "late": self.late,
            "num_bytes": self.num_bytes,
            "calibration": [str(cut) for cut in sorted(self.calibration.ranges)],
        }

    @classmethod
    def from_folder(cls, folder: Path, *, verify: bool = False) -> ModelBundle:
        """Reads a bundle and checks that its files are there with their right sizes.

        Args:
            folder: The bundle's folder.
            verify: Check SHA-256 sums too; takes as long as reading every byte.

        Raises:
            ModelError: No bundle, a missing or odd field, a file missing, of another size, or
                (`verify`) of another content.
        """
        fields = read_json(folder / MANIFEST)
        if fields.pop("format", None) != FORMAT:
            raise ModelError(
                f"{MANIFEST} has no `format` {FORMAT}: this Fletcher cannot read it{_ADD_AGAIN}"
            )
        manifest = convert_json(fields, _Manifest, MANIFEST, _ADD_AGAIN)
        spec = {name: getattr(manifest, name) for name in ModelSpec.__struct_fields__}
        files = manifest.files
        blocks = map(block_file, manifest.layers) if manifest.has_exits else (manifest.graph_file,)
        for needed in (TOKENIZER, *blocks):
            if needed not in files:
                raise ModelError(
                    f"{MANIFEST}: `files` has no entry for {needed}{_ADD_AGAIN}", field="files"
                )
        num_bytes = sum(_check_file(folder, *entry, verify=verify) for entry in files.items())
        actual_hash = manifest.vector_hash(files[TOKENIZER]["sha256"])
        if manifest.hash != actual_hash:
            raise ModelError(
                f"{MANIFEST} was changed: `hash` is {manifest.hash!r}, its fields give "
                f"{actual_hash}{_ADD_AGAIN}"
            )
        return cls(
            **spec,
            folder=folder,
            name=check_name(manifest.name),
            hash=actual_hash,
            late=folder / LATE_GRAPH if LATE_GRAPH in files else None,
            num_bytes=num_bytes,
            calibration=Calibration.from_file(folder / CALIBRATION)
            if CALIBRATION in files
            else Calibration(),
        )


def block_file(layers: int) -> str:
    """The graph whose last layer is this one, of a model with exits."""
    return f"model.{layers}.onnx"


def version_folder(folder: Path, version: str) -> Path:
    """Where a version of a model is: in the model's folder, or kept since another came there.

    Args:
        folder: Where it was.
        version: Its hash.

    Raises:
        ModelError: It is in neither.
    """
    name = folder.name.partition("@")[0]
    for place in (folder.with_name(name), folder.with_name(f"{name}@{version}")):
        with contextlib.suppress(ModelError):
            if ModelBundle.from_folder(place).hash == version:
                return place
    raise ModelError(f"{name}@{version} is here no more: it was removed or damaged")


def write_manifest(folder: Path, name: str, spec: ModelSpec) -> None:
    """Makes a bundle of a folder that holds its files: describes and checksums each of them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in paths
        if path.name != MANIFEST
    }
    manifest = {
        "format": FORMAT,
        "name": check_name(name),
        "hash": spec.vector_hash(str(files[TOKENIZER]["sha256"])),
        **msgspec.to_builtins(spec),
        "files": files,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _check_file(folder: Path, name: str, entry: Any, *, verify: bool) -> int:
    if not is_inside(name):
        raise ModelError(
            f"{MANIFEST}: `files` has {name[:200]!r}, expected names inside the bundle's folder",
            field="files",
        )
    file = convert_json(entry, _File, f"{MANIFEST}: entry {name} of `files`", _ADD_AGAIN)
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{name} leads out of the bundle's folder; add the model again")
    if not path.is_file():
        raise ModelError(f"{name} is missing from the bundle; add the model again")
    actual = path.stat().st_size
    if actual != file.bytes:
        raise ModelError(
            f"{name} has {actual:,} bytes, expected {file.bytes:,}; add the model again"
        )
    if verify and sha256(path) != file.sha256:
        raise ModelError(f"{name} has a wrong SHA-256: it was changed; add the model again")
    return actual
