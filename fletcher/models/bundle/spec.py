"""Description of a model: the part of fletcher.json from the model's source."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from fletcher.models.bundle.files import invalid_value, is_inside

MANIFEST = "fletcher.json"
FORMAT = 2

# A pooling is one of these names, or several joined by `+`, whose embeddings are concatenated.
POOLINGS = ("mean", "cls", "last_token", "max", "mean_sqrt_len", "weighted_mean")
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
GraphInput = Literal["input_ids", "attention_mask", "token_type_ids"]
GraphOutput = Literal["embedding", "token_embeddings"]
Output = Literal["dense", "sparse", "multi"]
Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]

SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
GRAPH_INPUTS: tuple[GraphInput, ...] = get_args(GraphInput)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Description of a model, provided by its source and stored in fletcher.json.

    Attributes:
        family: Architecture of the graph (`bert`, `roberta`, ...). It is `onnx` for graphs that
            Fletcher did not write.
        dim: Width of an embedding.
        max_length: Largest number of tokens that a text can have, including special tokens.
        pooling: Method that combines token embeddings into one embedding: a name in POOLINGS, or
            several joined by `+`.
        normalize: Whether embeddings have L2 norm 1.
        num_layers: Number of transformer layers in the graph; 0 if unknown.
        layers: Exit layers that the model offers, ascending; the last is `num_layers`. A model with
            several exits is split into one block for each exit.
        dims: Matryoshka dims that the model was trained for, ascending; the last is `dim`.
        default_dims: Dims for requests that name none; 0 for `dim`.
        prompts: Prompts by name. A prompt is a text that goes in front of each input text.
        default_prompt: Name of the prompt for requests that name no prompt; None for no prompt.
        similarity: Function for comparing two embeddings that the model was trained for.
        pad_token_id: Id of the padding token.
        graph_file: File name of the ONNX graph, stored under the key `graph` in fletcher.json. In a
            model with several exits, it names the graph of the last block.
        graph_output: `embedding` if the graph pools, with output float32 [B, dim].
            `token_embeddings` if Fletcher pools and normalizes after the graph, whose output is
            float32 [B, L, dim].
        inputs: Names of the graph's inputs, int64 [B, L] each. `token_type_ids` is all zeros.
        outputs: Names of the graph's outputs that Fletcher reads. The first has the embeddings. If
            the graph normalizes, the second is `norm`, float32 [B, 1], the L2 norm before
            normalization.
        licence: The licence's SPDX name; empty if the source names no licence.
        source: Source in the form that `fletcher model add` takes, without a local path.
        weights_sha256: SHA-256 over the weights' values, independent of their file format. For an
            .onnx file, it is over the file and its external data.
        output: Kind of result for a text. `dense` is one vector of `dim` numbers. `sparse` is
            weights for some of `dim` dimensions, where each dimension is a token of the vocabulary.
            `multi` is one vector of `dim` numbers for each token.
        skip_marker, skip_tokens: As in Skipped. If `skip_tokens` is empty, every token has a
            vector.
        query_marker, query_length, query_filler, fillers_attended: As in Queries. With
            `query_length` 0, queries are read like documents. With `query_filler` below 0, queries
            are not filled.
    """

    family: str
    dim: Positive
    max_length: Positive
    pooling: str
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
    default_dims: Natural = 0

    def __post_init__(self) -> None:
        _expect(
            _ascending(self.dims) and self.dims[-1] == self.dim,
            "dims",
            self.dims,
            "ascending widths that end with `dim`",
        )
        fits = not self.default_dims or self.default_dims in self.dims
        _expect(fits, "default_dims", self.default_dims, "one of `dims`, or 0")
        names = self.pooling.split("+")
        _expect(
            set(names) <= set(POOLINGS), "pooling", self.pooling, f"one of {', '.join(POOLINGS)}"
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
    def usual_dims(self) -> int:
        """Dims for requests that name none."""
        return self.default_dims or self.dim

    @property
    def has_exits(self) -> bool:
        """Whether the model can return vectors after fewer than all layers."""
        return len(self.layers) > 1

    def vector_hash(self, tokenizer_sha256: str, *, bundle_format: int = FORMAT) -> str:
        """First 12 hex digits of a SHA-256 over everything that defines the vectors.

        Names, licences, sources and the graph's serialization do not change the hash. Parts with
        their usual value are left out, so that new parts change few hashes. In a bundle of format
        1, the hash does not cover the parts that `_newer_parts` returns.
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
            queries = self.query_marker, self.query_length, self.query_filler, self.fillers_attended
            parts["queries"] = list(queries)
        if bundle_format > 1:
            parts |= self._newer_parts()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def _newer_parts(self) -> dict[str, object]:
        prompts = {name: text for name, text in self.prompts.items() if text}
        prompts.pop(self.default_prompt or "", None)
        parts: dict[str, object] = {
            "prompts": prompts,
            "default_dims": self.default_dims,
            "pad_token": self.pad_token_id,
            "graph_output": [self.graph_output, *self.outputs] if self.family == "onnx" else None,
        }
        return {name: value for name, value in parts.items() if value}


def _ascending(values: tuple[int, ...]) -> bool:
    return bool(values) and values == tuple(sorted(set(values)))


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise invalid_value(MANIFEST, name, value, expected)
