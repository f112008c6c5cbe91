"""A model bundle: a folder with everything that defines a model's vectors.

fletcher.json     manifest: the model, its source, size and SHA-256 of every file
tokenizer.json    tokenizer, in the format of the `tokenizers` library
model.onnx        graph of the model
model.weights     weights of the graph, mapped into memory by the engine
model.N.*         graph and weights of the block that ends after layer N, in a model with exits
late.onnx         graph for late chunking, on the same weights, if the model pools by mean
calibration.json  value ranges for int8 vectors, written by `fletcher model calibrate`
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fletcher.core.schema import SPARSE_WIDTH
from fletcher.errors import ModelError
from fletcher.models.bundle.calibration import CALIBRATION, Calibration
from fletcher.models.bundle.files import check_name, convert_json, is_inside, read_json, sha256
from fletcher.models.bundle.spec import FORMAT, MANIFEST, ModelSpec, Natural
from fletcher.models.checkpoint.markers import Queries, Skipped

TOKENIZER = "tokenizer.json"
LATE_GRAPH = "late.onnx"
NULL_PREFIX = "null-"  # of the names of models whose vectors are made without them
# Names of the hidden states between the blocks of a model with exits: as a block's output, and as
# the next block's input.
HANDED_ON, HIDDEN = "handed_on", "hidden"
_ADD_AGAIN = "; add the model again with `fletcher model add`"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest's entry for one file."""

    bytes: Natural
    sha256: str


class _Manifest(ModelSpec, frozen=True, kw_only=True):
    """Content of fletcher.json without its field `format`."""

    name: str
    hash: str
    files: dict[str, Any]


class ModelBundle(ModelSpec, frozen=True, kw_only=True):
    """A checked bundle on disk; create it with `from_folder`.

    Attributes:
        folder: The bundle's folder.
        name: The model's name.
        hash: The bundle's `vector_hash`, which is the same on every machine.
        late: Path of the graph for late chunking; None if the bundle has no such graph.
        num_bytes: Size of all files together.
        calibration: Value ranges for int8 vectors.
    """

    folder: Path
    name: str
    hash: str
    late: Path | None
    num_bytes: int
    calibration: Calibration

    @property
    def graph(self) -> Path:
        return self.folder / self.graph_file

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def qualified_name(self) -> str:
        """`name@hash`."""
        return f"{self.name}@{self.hash}"

    @property
    def width(self) -> int:
        """Number of columns of the embeddings that a replica returns."""
        return SPARSE_WIDTH if self.output == "sparse" else self.dim

    @property
    def max_vectors(self) -> int:
        """Largest number of vectors that one row can have."""
        return {"dense": 1, "sparse": self.dim, "multi": self.max_length}[self.output]

    @property
    def skipped(self) -> Skipped | None:
        """Document tokens without a vector; None if every token has one."""
        return Skipped(self.skip_marker, self.skip_tokens) if self.skip_tokens else None

    @property
    def queries(self) -> Queries | None:
        """Special treatment of queries; None if queries are read like documents."""
        if not self.query_length:
            return None
        filler = self.query_filler if self.query_filler >= 0 else None
        return Queries(self.query_marker, self.query_length, filler, self.fillers_attended)

    @property
    def blocks(self) -> list[Path]:
        """Paths of the model's graphs in order: one graph, or one for each exit layer.

        The output `handed_on` of a graph, float32 [B, L, H], is the input `hidden` of the next
        graph, which has `hidden` instead of `input_ids`.
        """
        if not self.has_exits:
            return [self.graph]
        return [self.folder / block_file(layers) for layers in self.layers]

    def graph_digests(self) -> dict[str, str]:
        """SHA-256 of each graph file, by the file's name.

        Other versions of Fletcher may write another graph for the same vectors, and so with the
        same `hash`.
        """
        files = read_json(self.folder / MANIFEST)["files"]
        return {name: one["sha256"] for name, one in files.items() if name.endswith(".onnx")}

    @property
    def graph_normalizes(self) -> bool:
        """Whether the graph normalizes embeddings and returns their norms as `norm`."""
        return "norm" in self.outputs

    def differences(self, other: ModelSpec, without: Sequence[str] = ()) -> list[str]:
        """Names of the fields of the description that differ, except those in `without`."""
        fields = {one.name: one.encode_name for one in msgspec.structs.fields(ModelSpec)}
        return [
            encoded
            for name, encoded in fields.items()
            if name not in without and getattr(self, name) != getattr(other, name)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Dict of the fields and paths that `fletcher model show` prints."""
        spec = msgspec.structs.fields(ModelSpec)
        return {
            "folder": self.folder,
            "name": self.name,
            "hash": self.hash,
            **{one.encode_name: getattr(self, one.name) for one in spec},
            "graph": self.graph,
            "tokenizer": self.tokenizer,
            "late": self.late,
            "num_bytes": self.num_bytes,
            "calibration": [str(cut) for cut in sorted(self.calibration.ranges)],
        }

    @classmethod
    def from_folder(cls, folder: Path, *, verify: bool = False) -> ModelBundle:
        """Read a bundle's manifest; check file sizes and, with `verify`, SHA-256 sums.

        Raises:
            ModelError: The folder holds no bundle, or a manifest field is missing or invalid.
                Or a file is missing or has the wrong size or, with `verify`, the wrong SHA-256.
        """
        fields = read_json(folder / MANIFEST)
        version = fields.pop("format", None)
        if type(version) is not int or not 1 <= version <= FORMAT:
            raise ModelError(
                f"{MANIFEST}: `format` is {repr(version)[:200]}, expected 1 to {FORMAT}; add the "
                "model again with `fletcher model add`, or update Fletcher",
                field="format",
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
        ranges = folder / CALIBRATION if CALIBRATION in files else None
        digest = files[TOKENIZER]["sha256"]
        actual_hash = manifest.vector_hash(digest, bundle_format=version)
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
            calibration=Calibration.from_file(ranges) if ranges else Calibration(),
        )


def block_file(layers: int) -> str:
    """File name of the block that ends after layer `layers`, in a model with exits."""
    return f"model.{layers}.onnx"


def version_folder(folder: Path, version: str) -> Path:
    """Find the folder of a model's version by its hash.

    The version is either the current one, in the folder of the model's name, or a replaced one, in
    the folder `name@hash`.

    Raises:
        ModelError: Neither folder holds the version.
    """
    name = folder.name.partition("@")[0]
    for place in (folder.with_name(name), folder.with_name(f"{name}@{version}")):
        with contextlib.suppress(ModelError):
            if ModelBundle.from_folder(place).hash == version:
                return place
    raise ModelError(
        f"{name}@{version} is missing: it was removed or is damaged; add the model again"
    )


def write_manifest(folder: Path, name: str, spec: ModelSpec) -> None:
    """Turn a folder of files into a bundle by writing a manifest with checksums."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
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
