"""Reads of a Longbow's datasets: schema, rows and searches.

Only a DoGet without filters returns exactly the stored rows. Filtered reads of a Longbow bring
deleted rows back and drop rows silently if batches differ in their columns, and a filter on a
column of numbers with nulls ends the server. So filters are applied here. Conditions on texts are
sent, too, if a dataset is too large to be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fletcher.errors import RequestError, StoreUnavailableError
from fletcher.stores.base import Combination, Comparison, Filter, Filters, Names, Vector
from fletcher.stores.exact_search import APPROXIMATE, RowScores, check_query, nearest
from fletcher.stores.filters import to_expression, to_json
from fletcher.stores.flight.connection import FlightConnection, store_call
from fletcher.stores.flight.longbow_datasets import Readiness
from fletcher.stores.schemas import limit_rows, wanted_columns

# Limit on the bytes of rows that one search compares. In a larger dataset, Longbow applies the
# conditions on texts first.
MAX_READ_BYTES = 4 << 30
# Most rows of a search by Longbow's index: each takes a call.
MAX_INDEX_K = 100
# Tolerance when a row's score is compared with the score that the index reported.
_SCORE_ERROR = 1e-3


@dataclass(frozen=True, slots=True)
class _Size:
    """A dataset's size as GetFlightInfo tells it; it changes whenever rows are added."""

    num_batches: int
    num_bytes: int


class LongbowReader:
    """Reader of a Longbow's datasets. Thread-safe.

    Args:
        max_read_bytes: See MAX_READ_BYTES.
    """

    def __init__(
        self, connection: FlightConnection, *, max_read_bytes: int = MAX_READ_BYTES
    ) -> None:
        self._connection = connection
        self._max_read_bytes = max_read_bytes
        # Numbers of rows that whole reads have counted, if all have an id.
        self._counted: dict[str, tuple[_Size, int]] = {}

    def scan(
        self, name: str, *, columns: Names = None, filters: Filters = (), limit: int | None = None
    ) -> pa.RecordBatchReader:
        """See `Store.scan`."""
        size = self._size(name) if filters else None
        reader = self._open(name, filters, size)
        wanted = wanted_columns(name, reader.schema, columns)
        condition = to_expression(name, reader.schema, filters)
        fields = [reader.schema.field(one) for one in wanted]
        schema = pa.schema(fields, metadata=reader.schema.metadata)
        batches = limit_rows(_matching(self._batches(name, reader), condition), schema, limit)
        return pa.RecordBatchReader.from_batches(schema, batches)

    def search(
        self, dataset: str, vector: Vector, *, k: int, columns: Names = None, filters: Filters = ()
    ) -> pa.Table:
        """See `Store.search`.

        Longbow's index is used without filters, if `_has_index_ids` is true and `index_len` equals
        the number of rows. With a filter, the index would only find rows of the time of the first
        search with that filter. An earlier search counted the rows; in a dataset larger than
        `max_read_bytes`, this search counts them. Otherwise all rows are read and compared here.

        Raises:
            RequestError: The rows to compare are larger than `max_read_bytes`.
        """
        schema = self._connection.read_schema(dataset)
        scores = check_query(dataset, schema, vector, k)
        wanted = wanted_columns(dataset, schema, columns)
        condition = to_expression(dataset, schema, filters)
        size = self._size(dataset)
        if _has_index_ids(schema, scores, k) and not filters:
            best = self._search_index(dataset, scores, k, size)
            found = nearest(_reader(schema, best, None), scores, k=k, columns=wanted)
            if found.num_rows == k:
                return _approximate(found)
        rows = self._batches(dataset, self._open(dataset, filters, size))
        if not filters or size.num_bytes <= self._max_read_bytes:
            rows = self._counting(dataset, size, rows)
        rows = self._bounded(dataset, rows)
        found = nearest(_reader(schema, rows, condition), scores, k=k, columns=wanted)
        return _approximate(found) if self._sent_filters(schema, filters, size) else found

    def _open(self, name: str, filters: Filters, size: _Size | None) -> pa.RecordBatchReader:
        ticket: dict[str, Any] = {}
        if size is not None and size.num_bytes > self._max_read_bytes:
            schema = self._connection.read_schema(name)
            ticket["filters"] = to_json(self._sent_filters(schema, filters, size))
        return self._connection.open_stream(name, ticket, f"reading dataset `{name}`")

    def _sent_filters(self, schema: pa.Schema, filters: Filters, size: _Size) -> list[Filter]:
        """Conditions that are sent, because the dataset is too large to be read."""
        is_large = size.num_bytes > self._max_read_bytes
        return _texts(schema, _conjuncts(filters)) if is_large else []

    def _batches(self, name: str, reader: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with store_call(f"reading dataset `{name}`"):
            yield from reader

    def _size(self, name: str) -> _Size:
        return _Size(*self._connection.read_size(name))

    def _num_rows(self, name: str, size: _Size) -> int | None:
        """Number of rows, or None if unknown.

        If the dataset is larger than `max_read_bytes`, it is read once to count them.
        """
        if size.num_bytes > self._max_read_bytes and self._counted.get(name, (None, 0))[0] != size:
            for _ in self._counting(name, size, self._batches(name, self._open(name, (), None))):
                pass
        counted, num_rows = self._counted.get(name, (None, 0))
        return num_rows if counted == size else None

    def _counting(
        self, name: str, size: _Size, batches: Iterable[pa.RecordBatch]
    ) -> Iterator[pa.RecordBatch]:
        """The batches of a whole dataset; notes their number of rows at the end."""
        num_rows = num_missing = 0
        for batch in batches:
            num_rows += batch.num_rows
            num_missing += batch["id"].null_count if "id" in batch.schema.names else 1
            yield batch
        if not num_missing and self._size(name) == size:
            self._counted[name] = size, num_rows

    def _bounded(self, name: str, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        left = self._max_read_bytes
        for batch in batches:
            left -= batch.nbytes
            if left < 0:
                raise RequestError(
                    f"dataset `{name}` is too large for a search: more than "
                    f"{self._max_read_bytes >> 20} MiB of its rows must be compared, because "
                    "Longbow's index does not serve this search; give a filter on texts, such as "
                    "'lang = de', or use integer ids and no other filters",
                    field="dataset",
                )
            yield batch

    def _search_index(
        self, name: str, scores: RowScores, k: int, size: _Size
    ) -> list[pa.RecordBatch]:
        """Rows that Longbow's index finds; none if the index does not have all rows."""
        num_rows = self._num_rows(name, size)
        request = {"dataset": name}
        if num_rows is None:
            return []
        ready = self._connection.ask("check_readiness", request, Readiness)
        if ready.status != "READY" or ready.index_len != num_rows:
            return []
        body = {**request, "vector": scores.query.tolist(), "k": k}
        answer = self._connection.run_action("VectorSearch", body)
        try:
            found = pa.ipc.open_stream(answer).read_all()
            pairs = zip(found["id"].to_pylist(), found["score"].to_pylist(), strict=True)
        except (pa.ArrowException, KeyError) as error:
            raise StoreUnavailableError(
                f"the store's answer to VectorSearch cannot be read: {error}"
            ) from error
        rows = []
        for one, score in dict(pairs).items():
            batches = self._rows_of_id(name, one)
            # The index knows an id by its last 32 bits.
            if not any(_has_score(batch, scores.query, score) for batch in batches):
                return []
            rows += batches
        return rows

    def _rows_of_id(self, name: str, value: int) -> list[pa.RecordBatch]:
        ticket = {"filters": to_json([Comparison("id", "=", value)])}
        what = f"reading dataset `{name}`"
        return list(self._batches(name, self._connection.open_stream(name, ticket, what)))


def _conjuncts(filters: Filters) -> list[Filter]:
    """The conditions that must all be met, without their combinations by `and`."""
    found: list[Filter] = []
    for one in filters:
        if isinstance(one, Combination) and one.logic == "and":
            found += _conjuncts(one.conditions)
        else:
            found.append(one)
    return found


def _texts(schema: pa.Schema, conditions: list[Filter]) -> list[Filter]:
    """The conditions that a Longbow applies rightly: texts compared with texts."""
    return [
        one
        for one in conditions
        if isinstance(one, Comparison)
        and one.operator not in ("in", "is null")
        and isinstance(one.value, str)
        and one.field in schema.names
        and schema.field(one.field).type == pa.utf8()
    ]


def _has_index_ids(schema: pa.Schema, scores: RowScores, k: int) -> bool:
    """Whether Longbow's index can serve a search.

    It can for int64 ids, a ranking equal to that by distance, and a small `k`.
    """
    metadata = schema.metadata or {}
    is_unit = metadata.get(b"fletcher.normalized") == b"true"
    ranks = scores.similarity.name == "euclidean" or (
        is_unit and scores.similarity.name in ("cosine", "dot")
    )
    has_ids = "id" in schema.names and schema.field("id").type == pa.int64()
    return bool(ranks and has_ids and k <= MAX_INDEX_K)


def _has_score(batch: pa.RecordBatch, query: Vector, score: float) -> bool:
    """Whether a row has a score of Longbow's: 1 / (1 + distance)."""
    column = batch["vector"]
    vectors = np.asarray(column.flatten()).reshape(-1, column.type.list_size)
    distances = np.linalg.norm(vectors - query, axis=1)
    return bool((np.abs(1 / (1 + distances) - score) < _SCORE_ERROR).any())


def _matching(batches: Iterable[pa.RecordBatch], condition: Any) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if condition is None:
            yield batch
        else:
            yield from pa.Table.from_batches([batch]).filter(condition).to_batches()


def _reader(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], condition: Any
) -> pa.RecordBatchReader:
    return pa.RecordBatchReader.from_batches(schema, _matching(batches, condition))


def _approximate(table: pa.Table) -> pa.Table:
    metadata = {**(table.schema.metadata or {}), APPROXIMATE: b"true"}
    return table.replace_schema_metadata(metadata)
