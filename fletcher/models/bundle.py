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
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fletcher.errors import ModelError
from fletcher.models.calibration import CALIBRATION, Calibration
from fletcher.models.files import check_name, is_inside, read_json, sha256
from fletcher.models.markers import Queries, Skipped
from fletcher.schema import SPARSE_WIDTH

FORMAT = 1
MANIFEST = "fletcher.json"
TOKENIZER = "tokenizer.json"
LATE_GRAPH = "late.onnx"
POOLINGS = ("mean", "cls", "last_token")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
OUTPUTS = ("dense", "sparse", "multi")
GRAPH_OUTPUTS = ("embedding", "token_embeddings")
GRAPH_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Pooling = Literal["mean", "cls", "last_token"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
GraphOutput = Literal["embedding", "token_embeddings"]
Output = Literal["dense", "sparse", "multi"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What a source says of a model: the part of fletcher.json that describes it.

    Attributes:
        family: Architecture the graph was written for (`bert`, `roberta`, ...); `onnx` for somebody
            else's graph.
        dim: Width of an embedding.
        max_length: Tokens per text at most, special tokens included.
        pooling: How token embeddings become one.
        normalize: Embeddings have L2 norm 1.
        num_layers: Transformer layers in the graph; 0 where unknown.
        layers: Exit layers that the graph offers, ascending; the last is `num_layers`. Where there
            are several, the graph is in as many segments, and `graph` is the last of them.
        dims: Matryoshka dims that the model was trained for, ascending; the last is `dim`.
        prompts: Text put before each input, by name.
        default_prompt: The name of the prompt for requests that name none.
        similarity: How two embeddings are compared: `cosine`, `dot`, `euclidean` or `manhattan`;
            bundles that do not say it mean `cosine`.
        pad_token_id: Id of the padding token.
        graph: File name of the ONNX graph.
        graph_output: `embedding`: the graph pools (float32 [B, dim]); `token_embeddings`: it does
            not (float32 [B, L, dim]), vectors are pooled and normalised after it.
        inputs: Names of the graph's inputs, int64 [B, L] each; `token_type_ids` are zeros.
        outputs: Names of the graph's outputs that are read: the first is what `graph_output` says;
            `norm` (float32 [B, 1], the L2 norm before normalisation) comes second where the graph
            itself normalises.
        licence: SPDX name, where the source says it.
        source: Where it came from, as `fletcher model add` would take it; no local path.
        weights_sha256: Of what the weights are, whatever file they came in.
        output: What a text becomes: `dense`, a vector of `dim`; `sparse`, weights of some of `dim`
            dimensions, each a token of the vocabulary; `multi`, a vector of `dim` for each token.
            Bundles that do not say it are `dense`.
        skip_marker, skip_tokens: As in Skipped; no tokens: none are left out.
        query_marker, query_length, query_filler, fillers_attended: As in Queries; no length: they
            are read as documents, a filler below 0: there is none.
    """

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
    pad_token_id: int
    graph: str
    graph_output: GraphOutput
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    licence: str
    source: str
    weights_sha256: str
    similarity: Similarity = "cosine"
    output: Output = "dense"
    skip_marker: int = 0
    skip_tokens: tuple[int, ...] = ()
    query_marker: int = 0
    query_length: int = 0
    query_filler: int = -1
    fillers_attended: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "max_length"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_layers", "pad_token_id"):
            _expect(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _expect(self.pooling in POOLINGS, "pooling", self.pooling, " or ".join(POOLINGS))
        known = self.similarity in SIMILARITIES
        _expect(known, "similarity", self.similarity, " or ".join(SIMILARITIES))
        _expect(
            self.graph_output in GRAPH_OUTPUTS,
            "graph_output",
            self.graph_output,
            " or ".join(GRAPH_OUTPUTS),
        )
        ascending = tuple(sorted(set(self.dims)))
        _expect(
            self.dims == ascending and self.dims[-1:] == (self.dim,) and self.dims[0] >= 1,
            "dims",
            self.dims,
            "ascending widths that end with `dim`",
        )
        exits = tuple(sorted(set(self.layers)))
        _expect(
            self.layers == exits and exits[-1:] == (self.num_layers,) and min(exits) >= 0,
            "layers",
            self.layers,
            f"ascending layers from 1 that end with {self.num_layers}",
        )
        _expect(
            "input_ids" in self.inputs and set(self.inputs) <= set(GRAPH_INPUTS),
            "inputs",
            self.inputs,
            f"`input_ids` and any of {', '.join(GRAPH_INPUTS)}",
        )
        _expect(self.output in OUTPUTS, "output", self.output, " or ".join(OUTPUTS))
        _expect(bool(self.outputs), "outputs", self.outputs, "at least one name")
        known = self.default_prompt is None or self.default_prompt in self.prompts
        _expect(known, "default_prompt", self.default_prompt, "a name in `prompts`")
        plain = is_inside(self.graph) and "/" not in self.graph
        _expect(plain, "graph", self.graph, "a file name")


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
        name = check_name(_typed(manifest, "name", str))
        recorded_hash = _typed(manifest, "hash", str)
        files = _typed(manifest, "files", dict)
        spec = _spec({key: manifest[key] for key in manifest if key not in _NOT_IN_SPEC})
        segments = map(segment_file, spec.layers) if len(spec.layers) > 1 else (spec.graph,)
        for needed in (TOKENIZER, *segments):
            _expect(needed in files, "files", sorted(files), f"an entry for {needed}")
        num_bytes = sum(_check_file(folder, *entry, verify=verify) for entry in files.items())
        actual_hash = vector_hash(spec, files[TOKENIZER]["sha256"])
        if recorded_hash != actual_hash:
            raise ModelError(
                f"{MANIFEST} was changed: `hash` is {recorded_hash!r}, its fields give "
                f"{actual_hash}; add the model again with `fletcher model add`"
            )
        values = {spec_field.name: getattr(spec, spec_field.name) for spec_field in _SPEC_FIELDS}
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
        "hash": vector_hash(spec, str(files[TOKENIZER]["sha256"])),
        **dataclasses.asdict(spec),
        "files": files,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def vector_hash(spec: ModelSpec, tokenizer_sha256: str) -> str:
    """First 12 hex digits of a SHA-256 over what defines a model's vectors.

    Names, licences, sources and how the graph happens to be serialised do not count.
    """
    parts = {
        "family": spec.family,
        "weights": spec.weights_sha256,
        "tokenizer": tokenizer_sha256,
        "max_length": spec.max_length,
        "pooling": spec.pooling,
        "normalize": spec.normalize,
        "default_prompt": spec.prompts.get(spec.default_prompt or "", ""),
    }
    if spec.output != "dense":
        parts |= {"output": spec.output, "skipped": [spec.skip_marker, *spec.skip_tokens]}
    if spec.query_length:
        parts["queries"] = [
            *(spec.query_marker, spec.query_length, spec.query_filler, spec.fillers_attended)
        ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


_SPEC_FIELDS = dataclasses.fields(ModelSpec)
_NOT_IN_SPEC = ("name", "hash", "files")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("dim", "max_length", "num_layers", "pad_token_id", "skip_marker"), int),
    **dict.fromkeys(("query_marker", "query_length", "query_filler"), int),
    **dict.fromkeys(("layers", "dims", "inputs", "outputs", "skip_tokens"), list),
    **dict.fromkeys(("normalize", "fillers_attended"), bool),
    "prompts": dict,
}
_WORDS = {str: "text", int: "an integer", bool: "true or false", list: "a list", dict: "an object"}


def _spec(manifest: Mapping[str, Any]) -> ModelSpec:
    known = {one.name for one in _SPEC_FIELDS}
    for name in manifest:
        if name not in known:
            raise ModelError(f"{MANIFEST} has an unknown field `{name}`", field=name)
    values: dict[str, Any] = {}
    for one in _SPEC_FIELDS:
        name = one.name
        if one.default is not dataclasses.MISSING and name not in manifest:
            continue  # the field is newer than the bundle
        if name == "default_prompt" and manifest.get(name, "") is None:
            values[name] = None
            continue
        value = _typed(manifest, name, _KINDS.get(name, str))
        if isinstance(value, list):
            item = int if name in ("layers", "dims", "skip_tokens") else str
            _expect(all(type(one) is item for one in value), name, value, f"a list of {item}")
            value = tuple(value)
        elif isinstance(value, dict):
            _expect(all(isinstance(one, str) for one in value.values()), name, value, "texts")
        values[name] = value
    return ModelSpec(**values)


def _check_file(folder: Path, name: str, entry: Any, *, verify: bool) -> int:
    _expect(is_inside(name), "files", name, "names inside the bundle's folder")
    if not isinstance(entry, dict):
        raise ModelError(f"{MANIFEST}: `files` says nothing of {name}", field="files")
    size, checksum = _typed(entry, "bytes", int), _typed(entry, "sha256", str)
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


def _typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in fields:
        raise ModelError(f"{MANIFEST} has no field `{name}`; add the model again", field=name)
    if type(fields[name]) is not kind:
        _expect(False, name, fields[name], _WORDS[kind])
    return fields[name]


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ModelError(
            f"{MANIFEST}: `{name}` is {str(value)[:200]!r}, expected {expected}", field=name
        )
