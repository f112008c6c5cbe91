"""Conversion of quantized vectors to float32, and rescoring of search results."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.quantization import VectorReader
from fletcher.errors import DimensionMismatchError, InvalidCommandError


def dequantize(rows: pa.Table | pa.RecordBatch) -> npt.NDArray[np.float32]:
    """Vectors of any `dtype`, from an exchange or a store, as float32.

    Args:
        rows: Rows with the column `vector` and their schema metadata. For int8 with one scale per
            row, also the column `scale`.

    Returns:
        float32 [num_rows, dims]; NaN for null vectors. `ubinary` vectors become signs, +1 or -1,
        scaled to length 1.

    Raises:
        ColumnTypeError: `vector` is not of a type that Fletcher writes, or `scale` is missing.
    """
    reader = VectorReader.from_schema(rows.schema)
    batches = rows.to_batches() if isinstance(rows, pa.Table) else [rows]
    parts = [reader.vectors(batch) for batch in batches]
    return np.concatenate(parts) if parts else np.empty((0, reader.dims), np.float32)


def rescore(
    rows: pa.Table | pa.RecordBatch, query: npt.NDArray[np.float32], *, k: int | None = None
) -> pa.Table:
    """Search results sorted by their exact cosine to a query, best first.

    A search over `ubinary` vectors ranks roughly. For a better order, search for four times as many
    rows as wanted, read these rows with int8 or float16 vectors, and rescore them.

    Args:
        rows: Rows with the column `vector`, as for `dequantize`.
        query: float32 [dims].
        k: Most rows to return; None: all.

    Returns:
        The rows with a new column `score`, float32. Rows with a null or zero vector are left out.

    Raises:
        DimensionMismatchError: `query` is not [dims].
        InvalidCommandError: `query` is zero or holds NaN or infinity.
        ColumnTypeError: See `dequantize`.
    """
    vectors = dequantize(rows)
    query = np.asarray(query, np.float32)
    if query.shape != vectors.shape[1:]:
        raise DimensionMismatchError(
            f"`query` has shape {list(query.shape)}, the rows have {vectors.shape[1]} dimensions",
            field="query",
            allowed=[str(vectors.shape[1])],
        )
    if not np.isfinite(query).all() or not query.any():
        raise InvalidCommandError(
            "`query` is zero or holds NaN or infinity; its cosine to anything is undefined",
            field="query",
        )
    norms = np.linalg.norm(vectors, axis=1)
    found = np.flatnonzero(norms > 0)  # excludes NaN
    scores = vectors[found] @ query / (norms[found] * np.linalg.norm(query))
    order = np.argsort(-scores, kind="stable")[:k]
    table = pa.table(rows) if isinstance(rows, pa.RecordBatch) else rows
    best = table.take(found[order])
    if "score" in best.schema.names:
        best = best.drop_columns("score")
    return best.append_column("score", pa.array(scores[order], pa.float32()))
