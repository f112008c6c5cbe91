"""Exact search with numpy over a stream of rows, and the checks of a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.similarity import Similarity
from fletcher.errors import (
    ColumnTypeError,
    DimensionMismatchError,
    InvalidCommandError,
    UnknownDatasetError,
)
from fletcher.stores.base import DatasetInfo, Store, Vector

MAX_K = 100_000
# Schema metadata of rows found among candidates: better ones may be missing. Scores are exact.
APPROXIMATE = b"fletcher.approximate"
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


def existing_schema(store: Store, name: str) -> pa.Schema:
    """The schema of a dataset. Raises UnknownDatasetError if it does not exist."""
    schema = store.read_schema(name)
    if schema is None:
        raise unknown_dataset(name)
    return schema


def check_searchable(dataset: str, schema: pa.Schema) -> Similarity:
    """The similarity by which a dataset is searched.

    Raises:
        ColumnTypeError: The vectors are of a type that Fletcher does not write.
    """
    try:
        return Similarity.from_schema(schema)
    except ColumnTypeError as error:
        raise ColumnTypeError(
            f"dataset `{dataset}` cannot be searched: {error.message}", field="vector"
        ) from None


@dataclass(frozen=True, slots=True)
class RowScores:
    """Function that scores the rows of a batch for one query, float32 [num_rows].

    The batch needs the `columns`. A row without a score has -inf.
    """

    similarity: Similarity
    query: Vector

    @property
    def columns(self) -> tuple[str, ...]:
        return self.similarity.columns

    def __call__(self, batch: pa.RecordBatch) -> Vector:
        return np.asarray(self.similarity.scores([self.query], batch)[0])


def check_query(
    dataset: str,
    schema: pa.Schema,
    vector: npt.NDArray[Any],
    k: int,
    *,
    metric: str | None = None,
) -> RowScores:
    """Check a query and return the function that scores the dataset's rows.

    Args:
        metric: Similarity in place of the dataset's own, for single vectors.

    Raises:
        DimensionMismatchError: The shape of `vector` is not that of a query (`Similarity`).
        ColumnTypeError: As `check_searchable`.
        InvalidCommandError: `k` is not 1 to MAX_K, or `vector` holds NaN or infinity, or is zero
            and compared by other means than a distance.
    """
    similarity = check_searchable(dataset, schema)
    if metric is not None:
        similarity = replace(similarity, metric=metric)
    is_multi = similarity.output == "multi"
    if vector.ndim != 1 + is_multi or not len(vector) or vector.shape[-1] != similarity.dims:
        expected = f"{similarity.dims}" + " in each of its vectors" * is_multi
        raise DimensionMismatchError(
            f"`vector` has {vector.shape[-1] if vector.ndim == 1 + is_multi else vector.size} "
            f"dimensions, dataset `{dataset}` has {expected}",
            field="vector",
            allowed=[str(similarity.dims)],
        )
    if not 1 <= k <= MAX_K:
        raise InvalidCommandError(f"`k` is {k}, expected 1 to {MAX_K}", field="k")
    is_distance = similarity.name in ("euclidean", "manhattan")
    if not np.isfinite(vector).all() or not (vector.any() or is_distance):
        raise InvalidCommandError(
            f"`vector` is zero or holds NaN or infinity, which has no {similarity.name} to rank by",
            field="vector",
        )
    return RowScores(similarity, np.asarray(vector, np.float32))


def nearest(
    rows: pa.RecordBatchReader, scores: Scores, *, k: int, columns: Sequence[str]
) -> pa.Table:
    """The k best rows of a stream, best first: `columns` and `score` float32.

    Holds at most k rows and one batch in memory. Rows with a score of -inf are left out.
    """
    fields = [rows.schema.field(name) for name in columns]
    score = pa.field("score", pa.float32())
    schema = pa.schema([*fields, score], metadata=rows.schema.metadata)
    best = schema.empty_table()
    for batch in rows:
        arrays = [*(batch.column(name) for name in columns), pa.array(scores(batch), score.type)]
        best = pa.concat_tables([best, pa.Table.from_arrays(arrays, schema=schema)])
        values = best.column("score").to_numpy()
        # A stable sort keeps the order of rows with equal scores.
        order = np.argsort(-values, kind="stable")[:k]
        best = best.take(order[np.isfinite(values[order])])
    return best
