"""Calls to a Longbow."""

from __future__ import annotations

import logging
from collections import Counter
from weakref import WeakSet

import pyarrow as pa

from fletcher.errors import (
    DimensionMismatchError,
    FletcherError,
    InvalidCommandError,
    UnknownDatasetError,
)
from fletcher.stores.base import (
    Comparison,
    DatasetInfo,
    Filters,
    Names,
    Store,
    StoreCapabilities,
    Vector,
    WriteMode,
)
from fletcher.stores.exact_search import unknown_dataset
from fletcher.stores.filters import to_json
from fletcher.stores.flight import longbow
from fletcher.stores.flight.connection import FlightConnection, store_call
from fletcher.stores.flight.longbow_datasets import LongbowDatasets
from fletcher.stores.flight.longbow_reader import LongbowReader
from fletcher.stores.flight.longbow_writer import LongbowWriter
from fletcher.stores.schemas import (
    check_compatible,
    count_batch_keys,
    num_group_rows,
    upload_ranges,
)
from fletcher.stores.staging import incarnation_of

_log = logging.getLogger(__name__)


class LongbowServer(Store):
    """A Longbow. Thread-safe, except for its writers.

    It takes float32 and only appends.
    """

    def __init__(self, connection: FlightConnection) -> None:
        self.address = connection.address.text
        self._connection = connection
        self._reader = LongbowReader(connection)
        self._datasets = LongbowDatasets(connection)
        self._widening_logged = False
        self._writers: WeakSet[LongbowWriter] = WeakSet()

    @property
    def capabilities(self) -> StoreCapabilities:
        return longbow.CAPABILITIES

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> LongbowWriter:
        if mode == "upsert":
            raise InvalidCommandError(
                "`mode` is upsert, which a Longbow cannot do: it only appends; use append, or a "
                "store of Fletcher",
                field="mode",
                allowed=["append"],
            )
        narrow = longbow.longbow_schema(schema)
        if narrow.field("vector").type != schema.field("vector").type and not self._widening_logged:
            self._widening_logged = True
            _log.info("vectors are widened to float32, the one type that Longbow indexes")
        stored = self._datasets.read_schema(dataset)
        if stored is not None:
            check_compatible(dataset, stored, narrow)
        writer = LongbowWriter(self._connection, dataset, narrow, self._count_keys)
        self._writers.add(writer)
        return writer

    def datasets(self) -> list[DatasetInfo]:
        """All datasets with rows, and the staged datasets of earlier releases."""
        return self._datasets.describe_all()

    def staged_datasets(self) -> list[DatasetInfo]:
        return self._datasets.describe_all()

    def dataset(self, name: str) -> DatasetInfo | None:
        """A dataset; one without rows does not exist yet."""
        return self._datasets.describe_dataset(name)

    def incarnation(self, name: str) -> str | None:
        schema = self._datasets.read_schema(name)
        return None if schema is None else incarnation_of(schema)

    def replace_dataset(self, name: str, staged: str) -> None:
        raise InvalidCommandError(
            f"dataset `{name}` cannot be replaced by `{staged}`: a Longbow brings deleted rows "
            "back when it restarts; write to a new dataset",
            field="mode",
            allowed=["append"],
        )

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        """See `Store.stored_ranges`. Only complete groups count."""
        # All keys of the upload are between these two, and so are keys of uploads with a longer
        # name.
        low, high = f"{upload_id}:", f"{upload_id};"
        bounds = (Comparison("batch_key", ">=", low), Comparison("batch_key", "<=", high))
        counts = self._count_keys(dataset, bounds)
        whole = (key for key, count in counts.items() if count >= num_group_rows(key))
        return upload_ranges(whole, upload_id)

    def scan(
        self, name: str, *, columns: Names = None, filters: Filters = (), limit: int | None = None
    ) -> pa.RecordBatchReader:
        return self._reader.scan(name, columns=columns, filters=filters, limit=limit)

    def search(
        self, dataset: str, vector: Vector, *, k: int, columns: Names = None, filters: Filters = ()
    ) -> pa.Table:
        if vector.ndim > 1:
            raise DimensionMismatchError(
                "`vector` has several vectors, expected one: a Longbow keeps one per row",
                field="vector",
            )
        return self._reader.search(dataset, vector, k=k, columns=columns, filters=filters)

    def close(self) -> None:
        for writer in list(self._writers):
            writer.close()
        self._connection.close()

    def delete_dataset(self, name: str) -> None:
        if self._datasets.read_schema(name) is None:
            raise unknown_dataset(name)
        self._connection.run_action("delete-dataset", {"dataset": name})

    def _count_keys(self, dataset: str, filters: Filters) -> Counter[str]:
        """Number of rows by batch key, among rows that meet the filters."""
        what = f"asking what dataset `{dataset}` holds"
        counts: Counter[str] = Counter()
        try:
            with store_call(what):
                ticket = {"filters": to_json(filters)}
                for batch in self._connection.open_stream(dataset, ticket, what):
                    counts.update(count_batch_keys(batch))
        except UnknownDatasetError:
            return Counter()
        except FletcherError:
            # Longbow has no error code for an unknown dataset.
            if self._datasets.read_schema(dataset) is None:
                return Counter()
            raise
        return counts
