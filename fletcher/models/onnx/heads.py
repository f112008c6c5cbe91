"""Graph parts after the last layer, for sparse, token and late-chunking vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fletcher.errors import ModelError
from fletcher.models.checkpoint.weights import Weights
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.encoder import Array, Dense, EncoderLayers, Tensors
from fletcher.models.onnx.graph import ONNX_FLOAT, GraphBuilder
from fletcher.models.onnx.transformer import MIN_NORM, TransformerWriter

_STORED = "cls.predictions."


@dataclass(frozen=True, slots=True)
class MaskedHead:
    """BERT's head for masked tokens: one weight for each token of the vocabulary.

    Attributes:
        transform: Linear layer before the norm.
        scale, bias: Scale and bias of the norm, float32 [H].
        words: Weight of the last linear layer, float32 [vocab, H].
        words_bias: Bias of the last linear layer, float32 [vocab].
    """

    transform: Dense
    scale: Array
    bias: Array
    words: Array
    words_bias: Array

    @classmethod
    def from_weights(cls, weights: Weights, architecture: Architecture, words: Array) -> MaskedHead:
        """Read the head from a checkpoint's weights.

        The last layer's weight is `words`, the token embeddings, unless the checkpoint has a
        separate tensor for that layer.

        Raises:
            ModelError: The checkpoint has no head for masked tokens.
        """
        width = architecture.hidden
        if not weights.has(f"{_STORED}transform.dense.weight"):
            raise ModelError(
                f"the checkpoint has no tensor `{_STORED}transform.dense.weight`, expected BERT's "
                "head for masked tokens, which makes sparse vectors; sparse models of other "
                "families are not supported"
            )

        def read(name: str, *shape: int) -> Array:
            return weights.read_tensor(f"{_STORED}{name}", shape)

        if weights.has(f"{_STORED}decoder.weight"):  # not tied to the token embeddings
            words = read("decoder.weight", *words.shape)
        transform = np.asarray(read("transform.dense.weight", width, width).T)
        return cls(
            transform=Dense(
                transform, read("transform.dense.bias", width), architecture.activation
            ),
            scale=read("transform.LayerNorm.weight", width),
            bias=read("transform.LayerNorm.bias", width),
            words=words,
            words_bias=read("bias", len(words)),
        )


class SparseWriter(TransformerWriter):
    """Writer of sparse models; the output `embedding` is float32 [B, vocab].

    The output holds SPLADE's weights (https://arxiv.org/abs/2109.10086). A weight is the maximum of
    log(1 + relu(x)) over a text's tokens, so it is 0 or more.
    """

    def __init__(
        self, graph: GraphBuilder, architecture: Architecture, tensors: Tensors, masked: MaskedHead
    ) -> None:
        super().__init__(graph, architecture, tensors)
        self.masked = masked

    def head(
        self, hidden: str, mask: str, pooling: str, dense: Sequence[Dense], *, normalize: bool
    ) -> None:
        graph, masked = self.graph, self.masked
        value = self.encoder.dense(hidden, masked.transform, "weights.transform")
        scale = graph.constant("weights.norm.scale", masked.scale)
        bias = graph.constant("weights.norm.bias", masked.bias)
        inputs, epsilon = (value, scale, bias), self.architecture.epsilon
        value = graph.node("LayerNormalization", inputs, "weights.norm", axis=-1, epsilon=epsilon)
        words = graph.constant("weights.words", masked.words)
        words = graph.node("Transpose", (words,), "weights.words.columns", perm=(1, 0))
        value = graph.node("MatMul", (value, words), "weights.product")
        bias = graph.constant("weights.bias", masked.words_bias)
        value = graph.node("Add", (value, bias), "weights.each")
        # relu and log are monotonic, so the maximum can be taken before them.
        last = graph.constant("weights.axis", [2])
        scores = (self.padding_scores(mask), last)
        padding = graph.node("Unsqueeze", scores, "weights.padding.each")
        value = graph.node("Add", (value, padding), "weights.seen")
        value = graph.node("ReduceMax", (value, self.second), "weights.greatest", keepdims=0)
        value = graph.node("Relu", (value,), "weights.positive")
        value = graph.node("Add", (value, self.encoder.scalar("one", 1)), "weights.more")
        graph.node("Log", (value,), "embedding")
        graph.output("embedding", np.float32, ("batch", len(masked.words)))


class TokenWriter(TransformerWriter):
    """Writer of token-vector models.

    The output `embedding` is float32 [B, L, dim]. Its vectors have L2 norm 1.
    """

    def head(
        self, hidden: str, mask: str, pooling: str, dense: Sequence[Dense], *, normalize: bool
    ) -> None:
        graph = self.graph
        value, width = self.encoder.denses(hidden, dense, self.architecture.hidden)
        last = graph.constant("tokens.axis", [2])
        norm = graph.node("ReduceL2", (value, last), "tokens.norm", keepdims=1)
        least = self.encoder.scalar("norm.least", MIN_NORM)
        norm = graph.node("Max", (norm, least), "tokens.norm.bounded")
        graph.node("Div", (value, norm), "embedding")
        graph.output("embedding", np.float32, ("batch", "length", width))


def write_late(
    graph: GraphBuilder,
    architecture: Architecture,
    tensors: Tensors,
    hidden: str,
    dense: Sequence[Dense],
) -> None:
    """Write the end of a graph for late chunking, with output float32 [B x S, dim].

    In late chunking (https://arxiv.org/abs/2409.04701) the model reads a whole row, and the spans
    of the row are pooled afterwards. The input `segments`, int32 [B, S, L], is 1 for the tokens
    of each span and 0 elsewhere. The output `embedding` holds the mean of each span, not
    normalized. The vectors of empty spans have no meaning. `graph` already has the model's layers,
    and `hidden` is the name of their output, [B, L, H].
    """
    encoder, width = EncoderLayers(graph, tensors, architecture), architecture.hidden
    segments = graph.input("segments", np.int32, ("batch", "segments", "length"))
    inside = graph.node("Cast", (segments,), "segments.float", to=ONNX_FLOAT)
    total = graph.node("MatMul", (inside, hidden), "segments.sum")
    last = graph.constant("segments.axis", [2])
    count = graph.node("ReduceSum", (segments, last), "segments.count", keepdims=1)
    one = graph.constant("segments.one", np.array([1], np.int32))
    count = graph.node("Max", (count, one), "segments.count.least")
    count = graph.node("Cast", (count,), "segments.count.float", to=ONNX_FLOAT)
    value = graph.node("Div", (total, count), "segments.mean")
    flat = graph.constant("segments.flat", [-1, width])
    value = graph.node("Reshape", (value, flat), "pooled")
    value, width = encoder.denses(value, dense, width)
    graph.node("Identity", (value,), "embedding")
    graph.output("embedding", np.float32, ("vectors", width))
