"""Writes the ONNX graph of a BERT-family checkpoint from its weights, without PyTorch.

What the exporters' graphs lack and this one has: pooling and normalisation inside, positions and
token types folded into one table, the attention scale folded into the query weights, layer norm and
activation as one operator each, attention in the form that engines fuse, and for `cls` pooling a
last layer that computes only that token. docs/performance.md has the figures of this and of other
forms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fletcher.errors import ModelError
from fletcher.models.bundle import ModelSpec, Pooling
from fletcher.models.checkpoint import Checkpoint, Weights
from fletcher.models.encoder import ACTIVATIONS, Array, Encoder, Tensors
from fletcher.models.graph import GRAPH_FILE, GraphBuilder

# Added to the scores of padding: exp of it is 0 in float32, and float16 and bfloat16 can hold it.
MASKED_SCORE = -10_000.0
MIN_NORM = 1e-12  # torch.nn.functional.normalize

# What a checkpoint calls linear layers (and the rows and columns of their weights) and layer norms.
_LINEAR = {
    "q": ("attention.self.query", "hidden", "hidden"),
    "k": ("attention.self.key", "hidden", "hidden"),
    "v": ("attention.self.value", "hidden", "hidden"),
    "projected": ("attention.output.dense", "hidden", "hidden"),
    "wide": ("intermediate.dense", "intermediate", "hidden"),
    "narrow": ("output.dense", "hidden", "intermediate"),
}
_NORMS = {"attention.norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}
_LAYER_TENSOR = re.compile(r"(layer\.\d+)\.(.+)\.(weight|scale|bias)")


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
        if activation not in ACTIVATIONS:
            raise ModelError(
                f"config.json: `hidden_act` is {activation!r}, expected one of "
                f"{', '.join(ACTIVATIONS)}",
                field="hidden_act",
                allowed=list(ACTIVATIONS),
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
        writer = _BertWriter(graph, config, _BertTensors(weights, config))
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


class _BertTensors:
    """A checkpoint's weights as `encoder.Tensors`."""

    def __init__(self, weights: Weights, config: BertConfig) -> None:
        self._weights = weights
        self._config = config

    def get(self, name: str) -> Array:
        hidden = self._config.hidden
        if name == "embeddings.words":
            return self._embeddings("word", self._config.vocab_size)
        if name == "embeddings.positions":
            positions = self._embeddings("position", self._config.max_positions)
            # A single text has token type 0 throughout, so that row can be part of every position.
            types = self._embeddings("token_type", self._config.type_vocab_size)
            return np.asarray(positions + types[0], dtype=np.float32)
        stored_part = {"scale": "weight"}.get(part := name.rpartition(".")[2], part)
        if name.startswith("embeddings.norm."):
            return self._weights.get(f"embeddings.LayerNorm.{stored_part}", (hidden,))
        match = _LAYER_TENSOR.fullmatch(name)
        assert match, name
        layer, what, _ = match.groups()
        if what in _NORMS:
            return self._weights.get(f"encoder.{layer}.{_NORMS[what]}.{stored_part}", (hidden,))
        stored, rows, columns = _LINEAR[what]
        shape = (getattr(self._config, rows), getattr(self._config, columns))
        tensor = self._weights.get(
            f"encoder.{layer}.{stored}.{part}", shape if part == "weight" else shape[:1]
        )
        if what != "q":
            return np.asarray(tensor.T)
        scale = np.float32(1 / math.sqrt(hidden // self._config.num_heads))
        return np.asarray(tensor.T * scale, dtype=np.float32)

    def _embeddings(self, kind: str, rows: int) -> Array:
        return self._weights.get(
            f"embeddings.{kind}_embeddings.weight", (rows, self._config.hidden)
        )


class _BertWriter:
    def __init__(self, graph: GraphBuilder, config: BertConfig, tensors: Tensors) -> None:
        self.graph = graph
        self.config = config
        self.tensors = tensors
        self.encoder = Encoder(graph, tensors, epsilon=config.epsilon, activation=config.activation)
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
        graph = self.graph
        table = self.encoder.weight("embeddings.positions")
        graph.node("Shape", (input_ids,), "input.length", start=1, end=2)
        position = graph.node(
            "Slice", (table, self.first, "input.length", self.first), "embeddings.position"
        )
        word_table = self.encoder.weight("embeddings.words")
        word = graph.node("Gather", (word_table, input_ids), "embeddings.word", axis=0)
        total = graph.node("Add", (word, position), "embeddings.sum")
        return self.encoder.layer_norm(total, "embeddings.norm")

    def _layer(self, name: str, hidden: str, scores: str, *, only_first: bool) -> str:
        """One encoder layer; `only_first` computes it for the first token of each row alone."""
        attended, residual = self._attention(name, hidden, scores, only_first=only_first)
        return self.encoder.after_attention(name, attended, residual)

    def _attention(
        self, name: str, hidden: str, scores: str, *, only_first: bool
    ) -> tuple[str, str]:
        """Self-attention: its output [B, L, H] and the hidden states of the same positions."""
        graph = self.graph
        asking = hidden
        if only_first:
            asking = graph.node(
                "Slice", (hidden, self.first, self.second, self.second), f"{name}.first"
            )
        queries = self._heads(asking, f"{name}.q")
        keys = self._heads(hidden, f"{name}.k")
        values = self._heads(hidden, f"{name}.v")
        # Apart from the transpose before: engines make this one a flag of the product.
        keys = graph.node("Transpose", (keys,), f"{name}.k.columns", perm=(0, 1, 3, 2))
        product = graph.node("MatMul", (queries, keys), f"{name}.scores")
        masked = graph.node("Add", (product, scores), f"{name}.scores.masked")
        shares = graph.node("Softmax", (masked,), f"{name}.shares", axis=-1)
        mixed = graph.node("MatMul", (shares, values), f"{name}.mixed")
        rows = graph.node("Transpose", (mixed,), f"{name}.mixed.rows", perm=(0, 2, 1, 3))
        return graph.node("Reshape", (rows, self.flat_shape), f"{name}.attended"), asking

    def _heads(self, value: str, name: str) -> str:
        """Queries, keys or values, [B, heads, L, width of a head]."""
        rows = self.encoder.product(value, name)
        heads = self.graph.node("Reshape", (rows, self.head_shape), f"{name}.split")
        return self.graph.node("Transpose", (heads,), f"{name}.heads", perm=(0, 2, 1, 3))

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
