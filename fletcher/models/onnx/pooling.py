"""Parts of a graph for rare poolings, and for several poolings side by side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fletcher.models.onnx.encoder import EncoderLayers
from fletcher.models.onnx.graph import ONNX_BOOL, ONNX_FLOAT


def write_pooling(encoder: EncoderLayers, pooling: str, hidden: str, mask: str) -> str:
    """Write one or several poolings; the result is [B, H], or several times as wide.

    Args:
        encoder: Writer of the graph.
        pooling: As in ModelSpec.
        hidden: Token embeddings, [B, L, H].
        mask: 1 for tokens and 0 for padding, int64 [B, L].
    """
    pooled = [_POOLINGS[name](encoder, hidden, mask) for name in pooling.split("+")]
    return encoder.graph.node("Concat", pooled, "pooled.all", axis=-1) if pooled[1:] else pooled[0]


def _cls(encoder: EncoderLayers, hidden: str, _mask: str) -> str:
    graph = encoder.graph
    first, second = graph.constant("pooled.cls.first", [0]), graph.constant("pooled.cls.axis", [1])
    one = graph.node("Slice", (hidden, first, second, second), "pooled.cls.one")
    return graph.node("Squeeze", (one, second), "pooled.cls")


def _last_token(encoder: EncoderLayers, hidden: str, mask: str) -> str:
    graph, one = encoder.graph, encoder.graph.constant("pooled.last.one", [1])
    count = graph.node("ReduceSum", (mask, one), "pooled.last.count", keepdims=1)
    index = graph.node("Sub", (count, one), "pooled.last.index")
    return graph.node("GatherND", (hidden, index), "pooled.last", batch_dims=1)


def _mean(encoder: EncoderLayers, hidden: str, mask: str) -> str:
    total, count = _sums(encoder, hidden, mask, "pooled.mean")
    return encoder.graph.node("Div", (total, count), "pooled.mean")


def _max(encoder: EncoderLayers, hidden: str, mask: str) -> str:
    graph = encoder.graph
    last, second = graph.constant("pooled.axis", [2]), graph.constant("pooled.tokens", [1])
    seen = graph.node("Cast", (mask,), "pooled.max.seen", to=ONNX_BOOL)
    seen = graph.node("Unsqueeze", (seen, last), "pooled.max.each")
    least = graph.constant("pooled.max.least", np.array([np.finfo(np.float32).min], np.float32))
    value = graph.node("Where", (seen, hidden, least), "pooled.max.values")
    return graph.node("ReduceMax", (value, second), "pooled.max", keepdims=0)


def _mean_sqrt_len(encoder: EncoderLayers, hidden: str, mask: str) -> str:
    """Sum of a row's tokens, divided by the square root of their number."""
    total, count = _sums(encoder, hidden, mask, "pooled.sqrt")
    count = encoder.graph.node("Sqrt", (count,), "pooled.sqrt.root")
    return encoder.graph.node("Div", (total, count), "pooled.mean_sqrt_len")


def _weighted_mean(encoder: EncoderLayers, hidden: str, mask: str) -> str:
    """Mean where a token counts as often as its position says, from 1."""
    graph = encoder.graph
    axis = graph.constant("pooled.weighted.axis", [1])
    positions = graph.node("CumSum", (mask, axis), "pooled.weighted.positions")
    weights = graph.node("Mul", (positions, mask), "pooled.weighted.weights")
    total, count = _sums(encoder, hidden, weights, "pooled.weighted")
    return graph.node("Div", (total, count), "pooled.weighted_mean")


def _sums(encoder: EncoderLayers, hidden: str, weights: str, name: str) -> tuple[str, str]:
    """Weighted sum of token embeddings, [B, H], and sum of the weights, [B, 1]."""
    graph = encoder.graph
    second = graph.constant(f"{name}.tokens", [1])
    count = graph.node("ReduceSum", (weights, second), f"{name}.count", keepdims=1)
    count = graph.node("Cast", (count,), f"{name}.count.float", to=ONNX_FLOAT)
    row = graph.node("Cast", (weights,), f"{name}.float", to=ONNX_FLOAT)
    row = graph.node("Unsqueeze", (row, second), f"{name}.row")
    total = graph.node("MatMul", (row, hidden), f"{name}.sum")
    return graph.node("Squeeze", (total, second), f"{name}.sum.flat"), count


_POOLINGS: dict[str, Callable[[EncoderLayers, str, str], str]] = {
    "cls": _cls,
    "last_token": _last_token,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "weighted_mean": _weighted_mean,
}
