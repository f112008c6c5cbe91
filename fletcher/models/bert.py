"""Writes the ONNX graph of a BERT-family checkpoint from its weights, without PyTorch.

What the exporters' graphs lack and this one has: pooling and normalisation inside, one product for
queries, keys and values, positions and token types folded into one table, the attention scale
folded into the query weights, and for `cls` pooling a last layer that computes only that token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.errors import ModelError
from fletcher.models.bundle import ModelSpec, Pooling
from fletcher.models.checkpoint import Checkpoint, Weights
from fletcher.models.graph import GRAPH_FILE, GraphBuilder

# Added to the scores of padding: exp of it is 0 in float32, and float16 and bfloat16 can hold it.
MASKED_SCORE = -10_000.0
MIN_NORM = 1e-12  # torch.nn.functional.normalize

_ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The numbers of config.json that shape a BERT graph."""

    vocab_size: int
    max_positions: int
    type_vocab_size: int
    hidden: int
    intermediate: int
    num_heads: int
    num_layers: int
    epsilon: float
    activation: str
    pad_token_id: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> BertConfig:
        """Checks that a config.json describes an encoder that this module can write.

        Raises:
            ModelError: A number is missing, or the model is of a kind not supported.
        """
        for key, wanted in (
            ("position_embedding_type", "absolute"),
            ("is_decoder", False),
            ("add_cross_attention", False),
        ):
            if config.get(key, wanted) != wanted:
                raise ModelError(
                    f"config.json: `{key}` is {config[key]!r}, expected {wanted!r}; such models "
                    "are not supported: export one to ONNX and add that file",
                    field=key,
                )
        activation = config.get("hidden_act", "gelu")
        if activation not in _ACTIVATIONS:
            raise ModelError(
                f"config.json: `hidden_act` is {activation!r}, expected one of "
                f"{', '.join(_ACTIVATIONS)}",
                field="hidden_act",
                allowed=list(_ACTIVATIONS),
            )
        read = cls(
            vocab_size=_positive(config, "vocab_size"),
            max_positions=_positive(config, "max_position_embeddings"),
            type_vocab_size=_positive(config, "type_vocab_size"),
            hidden=_positive(config, "hidden_size"),
            intermediate=_positive(config, "intermediate_size"),
            num_heads=_positive(config, "num_attention_heads"),
            num_layers=_positive(config, "num_hidden_layers"),
            epsilon=float(config.get("layer_norm_eps", 1e-12)),
            activation=activation,
            pad_token_id=int(config.get("pad_token_id") or 0),
        )
        if read.hidden % read.num_heads:
            raise ModelError(
                f"config.json: `hidden_size` {read.hidden} is no multiple of "
                f"`num_attention_heads` {read.num_heads}",
                field="hidden_size",
            )
        return read


def write_bert(checkpoint: Checkpoint, folder: Path, *, source: str) -> ModelSpec:
    """Writes graph and weights of a BERT checkpoint into `folder`.

    Inputs `input_ids` and `attention_mask`, int64 [B, L]; outputs `embedding`, float32 [B, dim],
    and where the model normalises `norm`, float32 [B, 1].

    Raises:
        ModelError: The checkpoint is not one that this family's writer supports.
    """
    config = BertConfig.read(checkpoint.config)
    if checkpoint.pooling == "last_token":
        raise ModelError("pooling `lasttoken` is not supported for BERT models, use mean or cls")
    weights = Weights(checkpoint.folder, ("bert.",))
    with GraphBuilder(folder, "bert") as graph:
        writer = _BertWriter(graph, config, weights)
        writer.write(checkpoint.pooling, normalize=checkpoint.normalize)
        graph.save()
    architecture = {
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "epsilon": config.epsilon,
        "activation": config.activation,
    }
    return ModelSpec(
        family="bert",
        dim=config.hidden,
        max_length=min(checkpoint.max_length, config.max_positions),
        pooling=checkpoint.pooling,
        normalize=checkpoint.normalize,
        num_layers=config.num_layers,
        layers=(config.num_layers,),
        dims=checkpoint.dims,
        prompts=checkpoint.prompts,
        default_prompt=checkpoint.default_prompt,
        pad_token_id=config.pad_token_id,
        graph=GRAPH_FILE,
        graph_output="embedding",
        inputs=("input_ids", "attention_mask"),
        outputs=("embedding", "norm") if checkpoint.normalize else ("embedding",),
        licence=checkpoint.licence,
        source=source,
        weights_sha256=weights.digest(architecture),
    )


class _BertWriter:
    def __init__(self, graph: GraphBuilder, config: BertConfig, weights: Weights) -> None:
        self.graph = graph
        self.config = config
        self.weights = weights
        heads, head_dim = config.num_heads, config.hidden // config.num_heads
        self.head_shape = graph.constant("shape.heads", [0, 0, heads, head_dim])
        self.flat_shape = graph.constant("shape.flat", [0, 0, config.hidden])
        self.first = graph.constant("index.first", [0])
        self.second = graph.constant("index.second", [1])

    def write(self, pooling: Pooling, *, normalize: bool) -> None:
        graph, config = self.graph, self.config
        input_ids = graph.input("input_ids", np.int64, ("batch", "length"))
        mask = graph.input("attention_mask", np.int64, ("batch", "length"))
        mask = graph.node("Cast", (mask,), "mask", to=1)
        scores = self._padding_scores(mask)
        hidden = self._embeddings(input_ids)
        for index in range(config.num_layers):
            only_first = pooling == "cls" and index == config.num_layers - 1
            hidden = self._layer(f"layer.{index}", hidden, scores, only_first=only_first)
        pooled = "pooled" if normalize else "embedding"
        if pooling == "cls":
            graph.node("Squeeze", (hidden, self.second), pooled)
        else:
            self._mean(hidden, mask, pooled)
        if normalize:
            graph.node("ReduceL2", (pooled, self.second), "norm", keepdims=1)
            least = graph.constant("norm.least", np.array([MIN_NORM], np.float32))
            graph.node("Max", ("norm", least), "norm.bounded")
            graph.node("Div", (pooled, "norm.bounded"), "embedding")
        graph.output("embedding", np.float32, ("batch", config.hidden))
        if normalize:
            graph.output("norm", np.float32, ("batch", 1))

    def _padding_scores(self, mask: str) -> str:
        """Float32 [B, 1, 1, L]: 0 for tokens, MASKED_SCORE for padding."""
        graph = self.graph
        one = graph.constant("one", np.array([1.0], np.float32))
        masked = graph.constant("masked", np.array([MASKED_SCORE], np.float32))
        axes = graph.constant("axes.heads", [1, 2])
        padding = graph.node("Sub", (one, mask), "padding")
        scores = graph.node("Mul", (padding, masked), "padding.scores")
        return graph.node("Unsqueeze", (scores, axes), "padding.scores.heads")

    def _embeddings(self, input_ids: str) -> str:
        graph, config = self.graph, self.config
        words = self.weights.get(
            "embeddings.word_embeddings.weight", (config.vocab_size, config.hidden)
        )
        positions = self.weights.get(
            "embeddings.position_embeddings.weight", (config.max_positions, config.hidden)
        )
        types = self.weights.get(
            "embeddings.token_type_embeddings.weight", (config.type_vocab_size, config.hidden)
        )
        # A single text has token type 0 throughout, so that row can be part of every position.
        table = graph.constant("embeddings.positions", positions + types[0])
        graph.node("Shape", (input_ids,), "input.length", start=1, end=2)
        position = graph.node(
            "Slice", (table, self.first, "input.length", self.first), "embeddings.position"
        )
        word_table = graph.constant("embeddings.words", words)
        word = graph.node("Gather", (word_table, input_ids), "embeddings.word", axis=0)
        total = graph.node("Add", (word, position), "embeddings.sum")
        return self._layer_norm(total, "embeddings.LayerNorm", "embeddings.norm")

    def _layer(self, name: str, hidden: str, scores: str, *, only_first: bool) -> str:
        """One encoder layer; `only_first` computes it for the first token of each row alone."""
        graph = self.graph
        stored = f"encoder.{name}"
        attended, residual = self._attention(name, hidden, scores, only_first=only_first)
        projected = self._dense(attended, f"{stored}.attention.output.dense", f"{name}.projected")
        total = graph.node("Add", (projected, residual), f"{name}.attention.sum")
        middle = self._layer_norm(
            total, f"{stored}.attention.output.LayerNorm", f"{name}.attention.norm"
        )
        width, inner = self.config.hidden, self.config.intermediate
        wide = self._dense(middle, f"{stored}.intermediate.dense", f"{name}.wide", width, inner)
        operator, attributes = _ACTIVATIONS[self.config.activation]
        active = graph.node(operator, (wide,), f"{name}.active", **attributes)
        narrow = self._dense(active, f"{stored}.output.dense", f"{name}.narrow", inner, width)
        total = graph.node("Add", (narrow, middle), f"{name}.sum")
        return self._layer_norm(total, f"{stored}.output.LayerNorm", f"{name}.norm")

    def _attention(
        self, name: str, hidden: str, scores: str, *, only_first: bool
    ) -> tuple[str, str]:
        """Self-attention: its output [B, L, H] and the hidden states of the same positions."""
        graph, width = self.graph, self.config.hidden
        matrix, bias = self._queries_keys_values(f"encoder.{name}.attention.self")
        asking = hidden
        if only_first:
            asking = graph.node(
                "Slice", (hidden, self.first, self.second, self.second), f"{name}.first"
            )
            queries = self._product(asking, matrix[:, :width], bias[:width], f"{name}.q")
            both = self._product(hidden, matrix[:, width:], bias[width:], f"{name}.kv")
            keys, values = graph.nodes(
                "Split", (both,), (f"{name}.k", f"{name}.v"), axis=2, num_outputs=2
            )
        else:
            fused = self._product(hidden, matrix, bias, f"{name}.qkv")
            queries, keys, values = graph.nodes(
                "Split", (fused,), (f"{name}.q", f"{name}.k", f"{name}.v"), axis=2, num_outputs=3
            )
        queries = self._split_heads(queries, (0, 2, 1, 3))
        keys = self._split_heads(keys, (0, 2, 3, 1))
        values = self._split_heads(values, (0, 2, 1, 3))
        product = graph.node("MatMul", (queries, keys), f"{name}.scores")
        masked = graph.node("Add", (product, scores), f"{name}.scores.masked")
        shares = graph.node("Softmax", (masked,), f"{name}.shares", axis=-1)
        mixed = graph.node("MatMul", (shares, values), f"{name}.mixed")
        rows = graph.node("Transpose", (mixed,), f"{name}.mixed.rows", perm=(0, 2, 1, 3))
        return graph.node("Reshape", (rows, self.flat_shape), f"{name}.attended"), asking

    def _split_heads(self, value: str, order: tuple[int, ...]) -> str:
        heads = self.graph.node("Reshape", (value, self.head_shape), f"{value}.split")
        return self.graph.node("Transpose", (heads,), f"{value}.heads", perm=order)

    def _queries_keys_values(self, stored: str) -> tuple[Array, Array]:
        """The three projections as one [H, 3H] matrix and [3H] bias, attention scale included."""
        width = self.config.hidden
        scale = np.float32(1 / math.sqrt(width // self.config.num_heads))
        matrices, biases = [], []
        for part, factor in (("query", scale), ("key", 1), ("value", 1)):
            weight = self.weights.get(f"{stored}.{part}.weight", (width, width))
            bias = self.weights.get(f"{stored}.{part}.bias", (width,))
            matrices.append(weight.T * factor)
            biases.append(bias * factor)
        return np.concatenate(matrices, axis=1), np.concatenate(biases)

    def _dense(
        self,
        value: str,
        stored: str,
        name: str,
        rows: int | None = None,
        columns: int | None = None,
    ) -> str:
        """A checkpoint's linear layer; its weight is stored as [columns, rows]."""
        rows, columns = rows or self.config.hidden, columns or self.config.hidden
        matrix = self.weights.get(f"{stored}.weight", (columns, rows)).T
        return self._product(value, matrix, self.weights.get(f"{stored}.bias", (columns,)), name)

    def _product(self, value: str, matrix: Array, bias: Array, name: str) -> str:
        graph = self.graph
        weight = graph.constant(f"{name}.weight", matrix)
        product = graph.node("MatMul", (value, weight), f"{name}.product")
        return graph.node("Add", (product, graph.constant(f"{name}.bias", bias)), name)

    def _layer_norm(self, value: str, stored: str, name: str) -> str:
        width = (self.config.hidden,)
        scale = self.graph.constant(f"{name}.scale", self.weights.get(f"{stored}.weight", width))
        bias = self.graph.constant(f"{name}.bias", self.weights.get(f"{stored}.bias", width))
        return self.graph.node(
            "LayerNormalization", (value, scale, bias), name, axis=-1, epsilon=self.config.epsilon
        )

    def _mean(self, hidden: str, mask: str, name: str) -> None:
        """Mean over the tokens of each row, as a matrix product with the mask."""
        graph = self.graph
        row = graph.node("Unsqueeze", (mask, self.second), "mask.row")
        total = graph.node("MatMul", (row, hidden), "tokens.sum")
        total = graph.node("Squeeze", (total, self.second), "tokens.sum.flat")
        count = graph.node("ReduceSum", (mask, self.second), "tokens.count", keepdims=1)
        graph.node("Div", (total, count), name)


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json: `{key}` is {value!r}, expected at least 1", field=key)
    return value
