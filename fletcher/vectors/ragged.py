"""Rows of several vectors each, laid flat: all vectors, one after the other, and each row's number.

A text of a token-vector model has a vector a token. A sparse model's text has one for each
dimension that is not zero, of two numbers: the dimension and its weight; float32 holds whole
numbers up to 16,777,216 exactly, and no vocabulary is as large.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fletcher.core.batches import FloatArray, Int32Array, Int64Array, Spans, VectorArray


def places(starts: Int64Array, counts: Int32Array) -> Int64Array:
    """Where the vectors of some rows are, row after row.

    Args:
        starts: int64 [n], where each row begins.
        counts: int32 [n], how many vectors it has.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    found: Int64Array = np.arange(total) + np.repeat(starts - (ends - counts), counts)
    return found


def starts_of(counts: Int32Array) -> Int64Array:
    """int64 [n], where each row begins."""
    return np.cumsum(counts, dtype=np.int64) - counts


def gathered(
    vectors: VectorArray, counts: Int32Array, rows: Int32Array | Int64Array
) -> tuple[VectorArray, Int32Array]:
    """The vectors of some rows, in their order, and how many each has.

    Args:
        vectors: float32 [num_vectors, width].
        counts: int32 [n].
        rows: Some of the n rows; one may come several times.
    """
    chosen = counts[rows]
    return vectors[places(starts_of(counts)[rows], chosen)], chosen


def spans_of(spans: Spans, rows: Int64Array) -> Spans:
    """Those of some rows, in their order."""
    counts = spans.counts[rows]
    return Spans(counts, spans.bounds[places(starts_of(spans.counts)[rows], counts)])


def scattered(
    num_rows: int, width: int, parts: Iterable[tuple[Int64Array, FloatArray, Int32Array]]
) -> tuple[FloatArray, Int32Array]:
    """Vectors of all rows out of parts that have some of them.

    Args:
        num_rows: Rows; those in no part have no vector.
        width: Of a vector.
        parts: Rows, the vectors of these, row after row, and how many each has.
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
    """What is above zero in some rows: (dimension, weight) by ascending dimension.

    Args:
        dense: float32 [n, dims].

    Returns:
        float32 [num_weights, 2], and int32 [n], how many of them each row has.
    """
    rows, dims = np.nonzero(dense > 0)
    pairs = np.stack([dims.astype(np.float32), dense[rows, dims]], axis=1)
    return pairs, np.bincount(rows, minlength=len(dense)).astype(np.int32)
