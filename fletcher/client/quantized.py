"""Conversion of quantized vectors to float32, and rescoring of search results."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.quantization import VectorReader
from fletcher.core.similarity import Similarity
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
    """Search results sorted by their exact similarity to a query, best first.

    The similarity is the one in the rows' schema metadata: the cosine, unless their model was
    trained for another. A search over `ubinary` vectors ranks roughly. For a better order, search
    for four times as many rows as wanted, read these rows with int8 or float16 vectors, and rescore
    them.

    Args:
        rows: Rows with the column `vector`, as for `dequantize`, or with sparse or token vectors.
        query: float32 [dims]; for token vectors [num_vectors, dims].
        k: Most rows to return; None: all.

    Returns:
        The rows with a new column `score`, float32. Rows with a null vector, or for the cosine with
        a zero vector, are left out.

    Raises:
        DimensionMismatchError: `query` is not [dims].
        InvalidCommandError: `query` is zero or holds NaN or infinity.
        ColumnTypeError: See `dequantize`.
    """
    similarity = Similarity.from_schema(rows.schema)
    query = np.asarray(query, np.float32)
    is_multi = similarity.output == "multi"
    if query.ndim != 1 + is_multi or not query.size or query.shape[-1] != similarity.dims:
        raise DimensionMismatchError(
            f"`query` has shape {list(query.shape)}, the rows have {similarity.dims} dimensions",
            field="query",
            allowed=[str(similarity.dims)],
        )
    if not np.isfinite(query).all() or not query.any():
        raise InvalidCommandError(
            "`query` is zero or holds NaN or infinity; its cosine to anything is undefined",
            field="query",
        )
    table = pa.table(rows) if isinstance(rows, pa.RecordBatch) else rows
    parts = [similarity.scores([query], batch)[0] for batch in table.to_batches()]
    scores = np.concatenate([np.empty(0, np.float32), *parts])
    found = np.flatnonzero(np.isfinite(scores))
    order = found[np.argsort(-scores[found], kind="stable")[:k]]
    best = table.take(order)
    if "score" in best.schema.names:
        best = best.drop_columns("score")
    return best.append_column("score", pa.array(scores[order], pa.float32()))
