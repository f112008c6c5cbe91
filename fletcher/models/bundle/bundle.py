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
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.core.schema import SPARSE_WIDTH
from fletcher.errors import ModelError
from fletcher.models.bundle.calibration import CALIBRATION, Calibration
from fletcher.models.bundle.files import check_name, is_inside, read_json, sha256
from fletcher.models.bundle.spec import (
    MANIFEST,
    GraphOutput,
    ModelSpec,
    Output,
    Pooling,
    Similarity,
    expect,
    typed,
)
from fletcher.models.checkpoint.markers import Queries, Skipped

FORMAT = 1
TOKENIZER = "tokenizer.json"
LATE_GRAPH = "late.onnx"
# Fields of fletcher.json that are the bundle's, beside those of its ModelSpec.
_NOT_IN_SPEC = ("name", "hash", "files")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBundle:
    """A bundle on disk, checked as far as `load` was asked to.

    Attributes: those of ModelSpec, and
        folder: The bundle's folder.
        name: The model's name.
        hash: First 12 hex digits of a SHA-256 over what defines the vectors; the same on every
            machine and after every re-adding.
        graph: Path of the ONNX file.
        tokenizer: Path of tokenizer.json.
        late: Path of the graph for late chunking; None: there is none.
        num_bytes: Size of all files.
        calibration: Ranges for int8.
    """

    folder: Path
    name: str
    hash: str
    family: str
    dim: int
    max_length: int
    pooling: Pooling
    normalize: bool
    num_layers: int
    layers: tuple[int, ...]
    dims: tuple[int, ...]
    prompts: dict[str, str]
    default_prompt: str | None
    similarity: Similarity
    output: Output
    skip_marker: int
    skip_tokens: tuple[int, ...]
    query_marker: int
    query_length: int
    query_filler: int
    fillers_attended: bool
    pad_token_id: int
    graph: Path
    graph_output: GraphOutput
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tokenizer: Path
    late: Path | None
    licence: str
    source: str
    num_bytes: int
    calibration: Calibration

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
    def has_exits(self) -> bool:
        """Whether vectors can be had after fewer than all layers."""
        return len(self.layers) > 1

    @property
    def segments(self) -> list[Path]:
        """The graphs that make up the model, in their order, one an exit layer.

        Each but the first takes `hidden`, float32 [B, L, H], which the one before gives as
        `handed_on`, in place of `input_ids`.
        """
        if not self.has_exits:
            return [self.graph]
        return [self.folder / segment_file(layers) for layers in self.layers]

    @property
    def graph_normalizes(self) -> bool:
        """Whether the graph's embeddings have L2 norm 1 already, their norms in output `norm`."""
        return "norm" in self.outputs

    @classmethod
    def load(cls, folder: Path, *, verify: bool = False) -> ModelBundle:
        """Reads a bundle and checks that its files are there with their right sizes.

        Args:
            folder: The bundle's folder.
            verify: Check SHA-256 sums too; takes as long as reading every byte.

        Raises:
            ModelError: No bundle, a missing or odd field, a file missing, of another size, or
                (`verify`) of another content.
        """
        manifest = read_json(folder / MANIFEST)
        if manifest.pop("format", None) != FORMAT:
            raise ModelError(
                f"{MANIFEST} has no `format` {FORMAT}: this Fletcher cannot read it; add the "
                "model again with `fletcher model add`"
            )
        name = check_name(typed(manifest, "name", str))
        recorded_hash = typed(manifest, "hash", str)
        files = typed(manifest, "files", dict)
        spec = ModelSpec.parse({key: manifest[key] for key in manifest if key not in _NOT_IN_SPEC})
        segments = map(segment_file, spec.layers) if len(spec.layers) > 1 else (spec.graph,)
        for needed in (TOKENIZER, *segments):
            expect(needed in files, "files", sorted(files), f"an entry for {needed}")
        num_bytes = sum(_check_file(folder, *entry, verify=verify) for entry in files.items())
        actual_hash = spec.vector_hash(files[TOKENIZER]["sha256"])
        if recorded_hash != actual_hash:
            raise ModelError(
                f"{MANIFEST} was changed: `hash` is {recorded_hash!r}, its fields give "
                f"{actual_hash}; add the model again with `fletcher model add`"
            )
        values = {one.name: getattr(spec, one.name) for one in dataclasses.fields(spec)}
        values.pop("weights_sha256")
        values["graph"] = folder / spec.graph
        return cls(
            folder=folder,
            name=name,
            hash=actual_hash,
            tokenizer=folder / TOKENIZER,
            late=folder / LATE_GRAPH if LATE_GRAPH in files else None,
            num_bytes=num_bytes,
            calibration=Calibration.load(folder / CALIBRATION)
            if CALIBRATION in files
            else Calibration(),
            **values,
        )


def segment_file(layers: int) -> str:
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
            if ModelBundle.load(place).hash == version:
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
        **dataclasses.asdict(spec),
        "files": files,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _check_file(folder: Path, name: str, entry: Any, *, verify: bool) -> int:
    expect(is_inside(name), "files", name, "names inside the bundle's folder")
    if not isinstance(entry, dict):
        raise ModelError(f"{MANIFEST}: `files` says nothing of {name}", field="files")
    size, checksum = typed(entry, "bytes", int), typed(entry, "sha256", str)
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{name} leads out of the bundle's folder; add the model again")
    if not path.is_file():
        raise ModelError(f"{name} is missing from the bundle; add the model again")
    actual = path.stat().st_size
    if actual != size:
        raise ModelError(f"{name} has {actual:,} bytes, expected {size:,}; add the model again")
    if verify and sha256(path) != checksum:
        raise ModelError(f"{name} has a wrong SHA-256: it was changed; add the model again")
    return actual
