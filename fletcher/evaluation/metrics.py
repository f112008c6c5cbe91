"""Quality metrics of vectors: pure functions of arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import FloatArray, Int64Array

Float64Array = npt.NDArray[np.float64]


def unit(vectors: FloatArray) -> FloatArray:
    """Scale each row of float32 [n, dims] to L2 norm 1; rows of zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)


def cosines(vectors: FloatArray, reference: FloatArray) -> Float64Array:
    """Cosine of each vector with the reference vector in the same row: float64 [n].

    The cosine of a zero vector is 0, or 1 if both are zero. `vectors`, float32 [n, dims], may have
    fewer dimensions than `reference`, float32 [n, dim]. The missing last dimensions count as zeros.
    """
    ours, right = vectors.astype(np.float64), reference.astype(np.float64)
    lengths = np.linalg.norm(ours, axis=1), np.linalg.norm(right, axis=1)
    norms = lengths[0] * lengths[1]
    products = np.einsum("nd,nd->n", ours, right[:, : ours.shape[1]])
    both_zero = (lengths[0] == 0) & (lengths[1] == 0)
    return np.where(both_zero, 1.0, products / np.where(norms > 0, norms, 1))


def text_cosines(rows: Iterable[FloatArray], reference: Iterable[FloatArray]) -> Float64Array:
    """Cosine of each text's vectors with those of the reference: float64 [num_texts].

    A row is float32 [dims], or [num_vectors, dims] for a text with several vectors. Vectors at
    the same position are compared, and a text's cosine is the mean of these cosines. A vector
    without a counterpart counts as 0.
    """
    found = []
    for ours, theirs in zip(rows, reference, strict=True):
        left, right = np.atleast_2d(ours), np.atleast_2d(theirs)
        number = min(len(left), len(right))
        sums = cosines(left[:number], right[:number]).sum()
        found.append(sums / max(len(left), len(right), 1))
    return np.array(found, np.float64)


def ranks(found: Int64Array, relevant: Int64Array) -> Int64Array:
    """Rank from 1 of each query's document: int64 [num_queries]; 0 if not found.

    Args:
        found: int64 [num_queries, k], indexes of the documents found for each query, best first.
        relevant: int64 [num_queries], index of the document that each query should find.
    """
    hits = found == relevant[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0).astype(np.int64)


def recall(places: Int64Array, k: int) -> float:
    """Share of queries whose document is among the first `k`.

    `places` are the ranks of the documents, as returned by `ranks`.
    """
    return float(((places >= 1) & (places <= k)).mean())


def ndcg(places: Int64Array, k: int) -> Float64Array:
    """Normalized discounted cumulative gain at `k`: float64 [num_queries].

    `places` are the ranks of the queries' documents, as returned by `ranks`. A query has one
    relevant document, with a gain of 1, which the ideal ranking has first. The metric is therefore
    1 / log2(1 + rank), see https://doi.org/10.1145/582415.582418.
    """
    seen = (places >= 1) & (places <= k)
    return np.where(seen, 1 / np.log2(1 + np.maximum(places, 1)), 0.0)


def loss(gains: Float64Array, reference: Float64Array) -> tuple[float, float]:
    """Mean loss against the reference, and half the width of its 95% interval.

    Both arrays are float64 [num_queries], for the same queries. The interval is therefore that of
    paired differences, which is far narrower than the interval of either mean.
    """
    lost = reference - gains
    deviation = float(lost.std(ddof=1)) if len(lost) > 1 else 0.0
    return float(lost.mean()), float(1.96 * deviation / np.sqrt(len(lost)))


def shared(found: Int64Array, right: Int64Array) -> float:
    """Share of the right documents that were found, on average over the queries.

    Args:
        found: int64 [num_queries, any], indexes of the documents found for each query.
        right: int64 [num_queries, k], indexes of the right documents for each query.
    """
    return float((right[:, :, None] == found[:, None, :]).any(axis=2).mean())


def spearman(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> float:
    """Spearman's rank correlation of two arrays [n], from -1 to 1.

    Equal values get the mean of their ranks. The result is NaN if all values of one array are
    equal.
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
    """Mean squared distance of matching pairs, from 0 to 4; smaller is better.

    Row i of `queries` and row i of `documents` are a pair. Both arrays are float32 [n, dims], with
    rows of norm 1. See https://arxiv.org/abs/2005.10242; its alpha has the default value 2.
    """
    return float(((queries - documents).astype(np.float64) ** 2).sum(axis=1).mean())


def uniformity(first: FloatArray, second: FloatArray) -> float:
    """Evenness of the directions of vectors; smaller is better.

    Row i of `first` and row i of `second` are a random pair with distance d. Both arrays are
    float32 [num_pairs, dims], with rows of norm 1. The result is log E exp(-2 d^2) over the pairs.
    It is 0 if all vectors are equal, and about -4 if vectors with many dimensions point evenly in
    all directions. See https://arxiv.org/abs/2005.10242; its t has the default value 2.
    """
    distances = ((first - second).astype(np.float64) ** 2).sum(axis=1)
    return float(np.log(np.exp(-2 * distances).mean()))


def num_alike(rows: Iterable[npt.NDArray[np.generic]]) -> int:
    """Number of arrays that equal another one, bit for bit."""
    counts = Counter(blake2b(row.tobytes(), digest_size=16).digest() for row in rows)
    return sum(count for count in counts.values() if count > 1)
