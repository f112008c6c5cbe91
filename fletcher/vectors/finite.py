"""Search for vectors with NaN, infinity, or numbers too large for their type."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fletcher.core.batches import BoolArray, EmbeddingBatch, FloatArray, Int32Array, VectorArray
from fletcher.errors import FletcherError, NotFiniteError

_HALF_LIMIT = 65_520.0  # smallest number that rounds to infinity in float16
_HALF_EXPONENT, _HALF_INFINITY = np.uint16(0x7FFF), 0x7C00


def not_finite(values: VectorArray, dtype: str = "float32") -> BoolArray | None:
    """Find the rows that hold NaN, infinity or a number beyond the range of `dtype`.

    Args:
        values: float32 or float16 [n, width].
        dtype: Element type that the rows are converted to. Only `float16` has a smaller range.

    Returns:
        bool [n], True for the rows found; None if there are none.
    """
    if values.size == 0:
        return None
    if values.dtype == np.float16:
        # NumPy has no fast operations for float16. All bits of the exponent are set in NaN and
        # infinity.
        bits = values.view(np.uint16) & _HALF_EXPONENT
        if bits.max() < _HALF_INFINITY:
            return None
        return np.asarray((bits >= _HALF_INFINITY).any(axis=1))
    limit = _HALF_LIMIT if dtype == "float16" else np.inf
    if values.max() < limit and values.min() > -limit:  # both false for NaN
        return None
    return np.asarray(~(np.abs(values) < limit).all(axis=1))


def rows_not_finite(
    vectors: VectorArray,
    norms: FloatArray | None,
    counts: Int32Array | None,
    dtype: str = "float32",
) -> list[int]:
    """Find the rows that have a vector or a norm which `not_finite` finds.

    Args:
        vectors: [num_vectors, width], row after row.
        norms: float32 [num_vectors], or None.
        counts: int32 [num_rows], number of each row's vectors; None: one each.
    """
    found = not_finite(vectors, dtype)
    if norms is not None and (of_norms := not_finite(norms.reshape(-1, 1))) is not None:
        found = of_norms if found is None else found | of_norms
    if found is None:
        return []
    places = np.flatnonzero(found)
    if counts is not None:
        places = np.unique(np.searchsorted(np.cumsum(counts), places, side="right"))
    rows: list[int] = places.tolist()
    return rows


def not_finite_error(dtype: str) -> NotFiniteError:
    """Error of a row whose vector cannot be stored as `dtype`."""
    if dtype == "float16":
        return NotFiniteError(
            "the `vector` of this text has NaN, infinity, or a number over 65,504, the largest of "
            "float16; ask for `dtype` float32, which fails only for NaN and infinity",
            field="dtype",
            allowed=["float32"],
        )
    return NotFiniteError(
        "the `vector` of this text has NaN or infinity; the model computes such for it, so leave "
        "the text out, or take another model or `precision`",
        field="vector",
    )


def refuse_not_finite(
    batch: EmbeddingBatch, dtype: str, *, first_column: int = 0
) -> EmbeddingBatch:
    """Add an error for each row whose vector does not fit `dtype`; set it to 0.

    Columns before `first_column` are not converted: a sparse vector's first one has dimensions.
    """
    values = batch.embeddings[:, first_column:]
    rows = rows_not_finite(values, None, batch.counts, dtype)
    if not rows:
        return batch
    embeddings = batch.embeddings.copy()
    embeddings[not_finite(values, dtype)] = 0
    error: FletcherError = not_finite_error(dtype)
    return replace(
        batch, embeddings=embeddings, errors={**dict.fromkeys(rows, error), **batch.errors}
    )
