"""Exact search with numpy over a stream of rows, and the checks of a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.quantization import VectorReader
from fletcher.errors import (
    ColumnTypeError,
    DimensionMismatchError,
    InvalidCommandError,
    UnknownDatasetError,
)
from fletcher.stores.base import DatasetInfo, Store, Vector

MAX_K = 100_000
Scores = Callable[[pa.RecordBatch], Vector]


def unknown_dataset(name: str) -> UnknownDatasetError:
    """The error for a dataset that does not exist."""
    return UnknownDatasetError(
        f"there is no dataset `{name}`; write to it first, or list the datasets", field="dataset"
    )


def existing_dataset(store: Store, name: str) -> DatasetInfo:
    """A dataset of a store. Raises UnknownDatasetError if it does not exist."""
    info = store.dataset(name)
    if info is None:
        raise unknown_dataset(name)
    return info


def vector_reader(dataset: str, schema: pa.Schema) -> VectorReader:
    """Reader of a dataset's vectors, for a search.

    Raises:
        ColumnTypeError: The vectors are not dense, or of a type that Fletcher does not write.
    """
    try:
        return VectorReader.from_schema(schema)
    except ColumnTypeError as error:
        raise ColumnTypeError(
            f"dataset `{dataset}` cannot be searched: {error.message}", field="vector"
        ) from None


def check_query(dataset: str, schema: pa.Schema, vector: npt.NDArray[Any], k: int) -> VectorReader:
    """Check a query and return the reader of the dataset's vectors.

    Raises:
        DimensionMismatchError: The shape of `vector` is not [dim].
        ColumnTypeError: As `vector_reader`.
        InvalidCommandError: `k` is not 1 to MAX_K, or `vector` is zero or holds NaN or infinity.
    """
    reader = vector_reader(dataset, schema)
    if vector.ndim != 1 or len(vector) != reader.dims:
        raise DimensionMismatchError(
            f"`vector` has {vector.size} dimensions, dataset `{dataset}` has {reader.dims}",
            field="vector",
            allowed=[str(reader.dims)],
        )
    if not 1 <= k <= MAX_K:
        raise InvalidCommandError(f"`k` is {k}, expected 1 to {MAX_K}", field="k")
    if not np.isfinite(vector).all() or not vector.any():
        raise InvalidCommandError(
            "`vector` is zero or holds NaN or infinity; its cosine to anything is undefined",
            field="vector",
        )
    return reader


def cosine(vector: Vector, reader: VectorReader) -> Scores:
    """Function that scores rows by the cosine of `vector` to a query, float32 [dim].

    The function returns float32 [num_rows], with -inf for a null or zero vector. The query stays
    float32 for all types of rows, because quantizing the query, too, loses precision.
    """
    query = vector / np.linalg.norm(vector)

    def scores(batch: pa.RecordBatch) -> Vector:
        column = batch.column("vector")
        rows = reader.directions(column)
        norms = np.linalg.norm(rows, axis=1)
        valid = (norms > 0) & np.asarray(column.is_valid())
        out = np.full(len(column), -np.inf, np.float32)
        np.divide(rows @ query, norms, out=out, where=valid)
        return out

    return scores


def nearest(
    rows: pa.RecordBatchReader, scores: Scores, *, k: int, columns: Sequence[str]
) -> pa.Table:
    """The k best rows of a stream, best first: `columns` and `score` float32.

    Holds at most k rows and one batch in memory. Rows with a score of -inf are left out.
    """
    fields = [rows.schema.field(name) for name in columns]
    best = pa.schema(fields, metadata=rows.schema.metadata).empty_table()
    best_scores = np.empty(0, np.float32)
    for batch in rows:
        values = np.concatenate([best_scores, scores(batch)])
        best = pa.concat_tables([best, pa.Table.from_batches([batch.select(list(columns))])])
        # A stable sort keeps the order of rows with equal scores.
        order = np.argsort(-values, kind="stable")[:k]
        order = order[np.isfinite(values[order])]
        best, best_scores = best.take(order), values[order]
    return best.append_column("score", pa.array(best_scores, pa.float32()))
