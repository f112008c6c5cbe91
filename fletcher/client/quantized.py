"""Quantized vectors on the reader's side: back to float32, and a closer look at candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.quantization import VectorReader
from fletcher.errors import DimensionMismatchError, InvalidCommandError


def dequantize(rows: pa.Table | pa.RecordBatch) -> npt.NDArray[np.float32]:
    """The vectors of rows from an exchange or a store, of any `dtype`.

    Args:
        rows: With column `vector`, for int8 with a scale a row `scale`, too, and with the schema
            metadata that they came with.

    Returns:
        float32 [num_rows, dims]; NaN where the vector is null. Of `ubinary` the signs are left: +1
        or -1, scaled to length 1.

    Raises:
        ColumnTypeError: `vector` is not one of Fletcher's, or `scale` is missing.
    """
    reader = VectorReader.from_schema(rows.schema)
    batches = rows.to_batches() if isinstance(rows, pa.Table) else [rows]
    parts = [reader.vectors(batch) for batch in batches]
    return np.concatenate(parts) if parts else np.empty((0, reader.dims), np.float32)


def rescore(
    rows: pa.Table | pa.RecordBatch, query: npt.NDArray[np.float32], *, k: int | None = None
) -> pa.Table:
    """The candidates of a search, best first by their cosine to a query in float32.

    Rows that were found by bits do not know their order well: ask that search for four times as
    many as are wanted, read the same rows from where their vectors are int8 or float16, and give
    those here.

    Args:
        rows: With column `vector`, as for `dequantize`.
        query: float32 [dims].
        k: Rows to give at most; None: all.

    Returns:
        The rows with `score` float32, in place of the one that they had; rows with a null or zero
        vector are left out.

    Raises:
        DimensionMismatchError: `query` is not [dims].
        InvalidCommandError: It is zero or holds NaN or infinity.
        ColumnTypeError: As for `dequantize`.
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
    found = np.flatnonzero(norms > 0)  # NaN is not, either
    scores = vectors[found] @ query / (norms[found] * np.linalg.norm(query))
    order = np.argsort(-scores, kind="stable")[:k]
    table = pa.table(rows) if isinstance(rows, pa.RecordBatch) else rows
    best = table.take(found[order])
    if "score" in best.schema.names:
        best = best.drop_columns("score")
    return best.append_column("score", pa.array(scores[order], pa.float32()))
