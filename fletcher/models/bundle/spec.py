"""What a model is: the part of fletcher.json that describes it, field by field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fletcher.errors import ModelError
from fletcher.models.bundle.files import is_inside

MANIFEST = "fletcher.json"
POOLINGS = ("mean", "cls", "last_token")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
OUTPUTS = ("dense", "sparse", "multi")
GRAPH_OUTPUTS = ("embedding", "token_embeddings")
GRAPH_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Pooling = Literal["mean", "cls", "last_token"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
GraphOutput = Literal["embedding", "token_embeddings"]
Output = Literal["dense", "sparse", "multi"]

_KINDS: dict[str, type] = {
    **dict.fromkeys(("dim", "max_length", "num_layers", "pad_token_id", "skip_marker"), int),
    **dict.fromkeys(("query_marker", "query_length", "query_filler"), int),
    **dict.fromkeys(("layers", "dims", "inputs", "outputs", "skip_tokens"), list),
    **dict.fromkeys(("normalize", "fillers_attended"), bool),
    "prompts": dict,
}
_WORDS = {str: "text", int: "an integer", bool: "true or false", list: "a list", dict: "an object"}


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
            expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_layers", "pad_token_id"):
            expect(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        expect(self.pooling in POOLINGS, "pooling", self.pooling, " or ".join(POOLINGS))
        known = self.similarity in SIMILARITIES
        expect(known, "similarity", self.similarity, " or ".join(SIMILARITIES))
        expect(
            self.graph_output in GRAPH_OUTPUTS,
            "graph_output",
            self.graph_output,
            " or ".join(GRAPH_OUTPUTS),
        )
        ascending = tuple(sorted(set(self.dims)))
        expect(
            self.dims == ascending and self.dims[-1:] == (self.dim,) and self.dims[0] >= 1,
            "dims",
            self.dims,
            "ascending widths that end with `dim`",
        )
        exits = tuple(sorted(set(self.layers)))
        expect(
            self.layers == exits and exits[-1:] == (self.num_layers,) and min(exits) >= 0,
            "layers",
            self.layers,
            f"ascending layers from 1 that end with {self.num_layers}",
        )
        expect(
            "input_ids" in self.inputs and set(self.inputs) <= set(GRAPH_INPUTS),
            "inputs",
            self.inputs,
            f"`input_ids` and any of {', '.join(GRAPH_INPUTS)}",
        )
        expect(self.output in OUTPUTS, "output", self.output, " or ".join(OUTPUTS))
        expect(bool(self.outputs), "outputs", self.outputs, "at least one name")
        known = self.default_prompt is None or self.default_prompt in self.prompts
        expect(known, "default_prompt", self.default_prompt, "a name in `prompts`")
        plain = is_inside(self.graph) and "/" not in self.graph
        expect(plain, "graph", self.graph, "a file name")

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """From fields of fletcher.json.

        Raises:
            ModelError: One is unknown, missing or odd.
        """
        known = {one.name for one in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ModelError(f"{MANIFEST} has an unknown field `{name}`", field=name)
        values: dict[str, Any] = {}
        for one in dataclasses.fields(cls):
            name = one.name
            if one.default is not dataclasses.MISSING and name not in fields:
                continue  # the field is newer than the bundle
            if name == "default_prompt" and fields.get(name, "") is None:
                values[name] = None
                continue
            value = typed(fields, name, _KINDS.get(name, str))
            if isinstance(value, list):
                item = int if name in ("layers", "dims", "skip_tokens") else str
                expect(all(type(one) is item for one in value), name, value, f"a list of {item}")
                value = tuple(value)
            elif isinstance(value, dict):
                expect(all(isinstance(one, str) for one in value.values()), name, value, "texts")
            values[name] = value
        return cls(**values)

    def vector_hash(self, tokenizer_sha256: str) -> str:
        """First 12 hex digits of a SHA-256 over what defines the vectors.

        Names, licences, sources and how the graph happens to be serialised do not count.
        """
        parts = {
            "family": self.family,
            "weights": self.weights_sha256,
            "tokenizer": tokenizer_sha256,
            "max_length": self.max_length,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "default_prompt": self.prompts.get(self.default_prompt or "", ""),
        }
        if self.output != "dense":
            parts |= {"output": self.output, "skipped": [self.skip_marker, *self.skip_tokens]}
        if self.query_length:
            parts["queries"] = [
                *(self.query_marker, self.query_length, self.query_filler, self.fillers_attended)
            ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field of fletcher.json. Raises ModelError where it is missing or of another kind."""
    if name not in fields:
        raise ModelError(f"{MANIFEST} has no field `{name}`; add the model again", field=name)
    if type(fields[name]) is not kind:
        expect(False, name, fields[name], _WORDS[kind])
    return fields[name]


def expect(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises ModelError, which names the field, unless what should holds."""
    if not holds:
        raise ModelError(
            f"{MANIFEST}: `{name}` is {str(value)[:200]!r}, expected {expected}", field=name
        )
