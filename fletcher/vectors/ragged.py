"""Ragged arrays: rows with several vectors each, as flat arrays.

With a token-vector model, a text has one vector for each token. With a sparse model, a text has a
vector of two numbers for each dimension that is not zero: the dimension and its weight. The
dimension can be a float32, which holds integers up to 16,777,216 exactly. No vocabulary is that
large.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fletcher.core.batches import FloatArray, Int32Array, Int64Array, Spans, VectorArray


def places(starts: Int64Array, counts: Int32Array) -> Int64Array:
    """Returns int64, the indices of the vectors of some rows, row after row.

    Args:
        starts: int64 [n], index of each row's first vector.
        counts: int32 [n], number of each row's vectors.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    found: Int64Array = np.arange(total) + np.repeat(starts - (ends - counts), counts)
    return found


def starts_of(counts: Int32Array) -> Int64Array:
    """Returns int64 [n], the index of each row's first vector."""
    return np.cumsum(counts, dtype=np.int64) - counts


def gather_rows(
    vectors: VectorArray, counts: Int32Array, rows: Int32Array | Int64Array
) -> tuple[VectorArray, Int32Array]:
    """Returns the vectors of some rows, row after row, and how many each row has.

    Args:
        vectors: float32 [num_vectors, width], vectors of all rows.
        counts: int32 [n], number of each row's vectors.
        rows: Indices of the wanted rows, in any order. May repeat a row.
    """
    chosen = counts[rows]
    return vectors[places(starts_of(counts)[rows], chosen)], chosen


def spans_of(spans: Spans, rows: Int64Array) -> Spans:
    """Returns the spans of some rows, in the order of `rows`."""
    counts = spans.counts[rows]
    return Spans(counts, spans.bounds[places(starts_of(spans.counts)[rows], counts)])


def scatter_rows(
    num_rows: int, width: int, parts: Iterable[tuple[Int64Array, FloatArray, Int32Array]]
) -> tuple[FloatArray, Int32Array]:
    """Joins parts, which have the vectors of some rows, to the vectors of all rows.

    Args:
        num_rows: Number of rows. Rows that are in no part get no vector.
        parts: For each part: indices of its rows, their vectors, row after row, and the number of
            each row's vectors.

    Returns:
        float32 [num_vectors, width], and int32 [num_rows], the number of each row's vectors.
    """
    parts = list(parts)
    counts = np.zeros(num_rows, np.int32)
    for rows, _, own in parts:
        counts[rows] = own
    starts = starts_of(counts)
    vectors = np.empty((int(counts.sum()), width), np.float32)
    for rows, found, own in parts:
        vectors[places(starts[rows], own)] = found
    return vectors, counts


def sparse(dense: FloatArray) -> tuple[FloatArray, Int32Array]:
    """Returns the positive values of each row as pairs of dimension and weight.

    The pairs of a row are in ascending order of dimension. NaN counts as positive, so that it is
    found later: `fletcher.vectors.finite`.

    Args:
        dense: float32 [n, dims].

    Returns:
        float32 [num_weights, 2], and int32 [n], the number of each row's pairs.
    """
    rows, dims = np.nonzero(~(dense <= 0))
    pairs = np.stack([dims.astype(np.float32), dense[rows, dims]], axis=1)
    return pairs, np.bincount(rows, minlength=len(dense)).astype(np.int32)
