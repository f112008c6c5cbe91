"""Quality metrics of vectors: pure functions of whole arrays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import FloatArray, Int64Array

Float64Array = npt.NDArray[np.float64]


def unit(vectors: FloatArray) -> FloatArray:
    """Rows of float32 [n, dims] scaled to an L2 norm of 1; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)


def cosines(vectors: FloatArray, reference: FloatArray) -> Float64Array:
    """Cosine of each vector to the reference's vector of the same row: float64 [n].

    It is 0 for a zero vector. `vectors`, float32 [n, dims], count as the leading dimensions of
    `reference`, float32 [n, dim], with zeros for the rest.
    """
    ours, right = vectors.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(right, axis=1)
    products = np.einsum("nd,nd->n", ours, right[:, : ours.shape[1]])
    return np.asarray(products / np.where(norms > 0, norms, 1))


def ranks(found: Int64Array, relevant: Int64Array) -> Int64Array:
    """Rank from 1 of each query's document: int64 [num_queries]; 0 if not found.

    Args:
        found: int64 [num_queries, k], documents, best first.
        relevant: int64 [num_queries].
    """
    hits = found == relevant[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0).astype(np.int64)


def recall(places: Int64Array, k: int) -> float:
    """Share of queries whose document is among the first `k`, by their `ranks`."""
    return float(((places >= 1) & (places <= k)).mean())


def ndcg(places: Int64Array, k: int) -> Float64Array:
    """Normalized discounted cumulative gain at `k`: float64 [num_queries].

    The ideal ranking has a query's one relevant document first, with a gain of 1, so that the
    metric is 1 / log2(1 + rank) (https://doi.org/10.1145/582415.582418), by the query's `ranks`.
    """
    seen = (places >= 1) & (places <= k)
    return np.where(seen, 1 / np.log2(1 + np.maximum(places, 1)), 0.0)


def loss(gains: Float64Array, reference: Float64Array) -> tuple[float, float]:
    """Mean loss against the reference, and half the width of its 95% interval.

    Both arrays, float64 [num_queries], have the same queries, so the interval is that of paired
    differences. It is far narrower than the interval of either mean.
    """
    lost = reference - gains
    deviation = float(lost.std(ddof=1)) if len(lost) > 1 else 0.0
    return float(lost.mean()), float(1.96 * deviation / np.sqrt(len(lost)))


def shared(found: Int64Array, right: Int64Array) -> float:
    """Share of the right documents that were found, on average over the queries.

    Args:
        found: int64 [num_queries, any].
        right: int64 [num_queries, k].
    """
    return float((right[:, :, None] == found[:, None, :]).any(axis=2).mean())


def spearman(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> float:
    """Spearman's rank correlation of two arrays [n]; equal values share a mean rank.

    -1 to 1; NaN if all values of one side are equal.
    """
    first, second = _mean_ranks(np.asarray(ours)), _mean_ranks(np.asarray(theirs))
    first, second = first - first.mean(), second - second.mean()
    product = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / product) if product > 0 else float("nan")


def _mean_ranks(values: npt.NDArray[np.generic]) -> Float64Array:
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(size)
    return np.asarray((last - (size - 1) / 2)[group], np.float64)


def alignment(queries: FloatArray, documents: FloatArray) -> float:
    """Mean squared distance of matching pairs: 0 to 4, less is better.

    See https://arxiv.org/abs/2005.10242, with its default alpha = 2. The pairs are the rows of two
    arrays float32 [n, dims], norm 1.
    """
    return float(((queries - documents).astype(np.float64) ** 2).sum(axis=1).mean())


def uniformity(first: FloatArray, second: FloatArray) -> float:
    """Evenness of the vectors' directions: less is better.

    log E exp(-2 d^2) over random pairs, float32 [num_pairs, dims] each, norm 1: 0 if all vectors
    are equal, about -4 if they have all directions in many dims (https://arxiv.org/abs/2005.10242,
    with its default t = 2).
    """
    distances = ((first - second).astype(np.float64) ** 2).sum(axis=1)
    return float(np.log(np.exp(-2 * distances).mean()))


def num_alike(vectors: npt.NDArray[np.generic]) -> int:
    """Number of rows of an array [n, dims] that equal another row, bit for bit."""
    counts = Counter(row.tobytes() for row in vectors)
    return sum(count for count in counts.values() if count > 1)
