"""What a model is: the part of fletcher.json that describes it, field by field."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from fletcher.errors import ModelError
from fletcher.models.bundle.files import is_inside

MANIFEST = "fletcher.json"

Pooling = Literal["mean", "cls", "last_token"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
GraphInput = Literal["input_ids", "attention_mask", "token_type_ids"]
GraphOutput = Literal["embedding", "token_embeddings"]
Output = Literal["dense", "sparse", "multi"]
Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]

SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
GRAPH_INPUTS: tuple[GraphInput, ...] = get_args(GraphInput)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
        graph_file: File name of the ONNX graph; `graph` in fletcher.json.
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
    dim: Positive
    max_length: Positive
    pooling: Pooling
    normalize: bool
    num_layers: Natural
    layers: tuple[Natural, ...]
    dims: tuple[Positive, ...]
    prompts: dict[str, str]
    default_prompt: str | None
    pad_token_id: Natural
    graph_file: str = msgspec.field(name="graph")
    graph_output: GraphOutput
    inputs: tuple[GraphInput, ...]
    outputs: Annotated[tuple[str, ...], Meta(min_length=1)]
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
        _expect(
            _ascending(self.dims) and self.dims[-1] == self.dim,
            "dims",
            self.dims,
            "ascending widths that end with `dim`",
        )
        _expect(
            _ascending(self.layers) and self.layers[-1] == self.num_layers,
            "layers",
            self.layers,
            f"ascending layers from 1 that end with {self.num_layers}",
        )
        _expect("input_ids" in self.inputs, "inputs", self.inputs, "`input_ids` among them")
        known = self.default_prompt is None or self.default_prompt in self.prompts
        _expect(known, "default_prompt", self.default_prompt, "a name in `prompts`")
        plain = is_inside(self.graph_file) and "/" not in self.graph_file
        _expect(plain, "graph", self.graph_file, "a file name")

    @property
    def has_exits(self) -> bool:
        """Whether vectors can be had after fewer than all layers."""
        return len(self.layers) > 1

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


def _ascending(values: tuple[int, ...]) -> bool:
    return bool(values) and values == tuple(sorted(set(values)))


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ModelError(
            f"{MANIFEST}: `{name}` is {repr(value)[:200]}, expected {expected}", field=name
        )
