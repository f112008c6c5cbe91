"""Calls to a Longbow."""

from __future__ import annotations

from weakref import WeakSet

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import (
    DimensionMismatchError,
    InvalidCommandError,
    StoreUnavailableError,
    UnsupportedCallError,
)
from fletcher.stores.base import (
    DatasetInfo,
    Filters,
    Names,
    Store,
    StoreCapabilities,
    Vector,
    WriteMode,
)
from fletcher.stores.exact_search import unknown_dataset
from fletcher.stores.flight import longbow
from fletcher.stores.flight.connection import FlightConnection
from fletcher.stores.flight.longbow_datasets import LongbowDatasets
from fletcher.stores.flight.longbow_reader import LongbowReader
from fletcher.stores.flight.longbow_uploads import LongbowUploads
from fletcher.stores.flight.longbow_writer import LongbowWriter
from fletcher.stores.longbow_trouble import FULL


class LongbowServer(Store):
    """A Longbow. Thread-safe, except for its writers.

    It takes float32 and only appends.
    """

    def __init__(self, connection: FlightConnection) -> None:
        self.address = connection.address.text
        self._connection = connection
        self._reader = LongbowReader(connection)
        self._datasets = LongbowDatasets(connection)
        self._uploads = LongbowUploads(connection, self._datasets.count_rows)
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
        stored = self.read_schema(dataset)
        if stored is not None:
            narrow = longbow.dataset_schema(dataset, stored, narrow)
        writer = LongbowWriter(self._connection, dataset, narrow, self._uploads)
        try:
            self._declare_columns(writer)
        except BaseException:
            writer.close()
            raise
        self._writers.add(writer)
        return writer

    def _declare_columns(self, writer: LongbowWriter) -> None:
        """Declare a writer's columns.

        A Longbow with a full memory stalls all calls that write, and no answer of it tells that. So
        the error of a call that stalls tells it if the Longbow answers another call.
        """
        try:
            writer.declare_columns()
        except StoreUnavailableError as error:
            is_stalled = isinstance(error.__cause__, flight.FlightTimedOutError)
            if is_stalled and self._connection.is_up():
                raise StoreUnavailableError(
                    f"{error.message}; {FULL}", field=error.field
                ) from error
            raise

    def datasets(self) -> list[DatasetInfo]:
        """All datasets with rows, and the staged datasets of earlier releases."""
        return self._datasets.describe_all()

    def staged_datasets(self) -> list[DatasetInfo]:
        return self._datasets.describe_all()

    def dataset(self, name: str) -> DatasetInfo | None:
        """A dataset; one without rows does not exist yet."""
        return self._datasets.describe_dataset(name)

    def read_schema(self, name: str) -> pa.Schema | None:
        return self._datasets.read_schema(name)

    def incarnation(self, name: str) -> str:  # noqa: ARG002 - as in Store
        """Empty: datasets of a Longbow have no incarnations.

        The Longbow is not asked. It would begin to send all rows to tell whether a dataset exists.
        """
        return ""

    def replace_dataset(self, name: str, staged: str) -> None:
        raise InvalidCommandError(
            f"dataset `{name}` cannot be replaced by `{staged}`: a Longbow brings deleted rows "
            "back when it restarts; write to a new dataset",
            field="mode",
            allowed=["append"],
        )

    def delete_upload(self, dataset: str, upload_id: str) -> int:
        raise UnsupportedCallError(
            f"the rows of upload {upload_id!r} cannot be deleted from `{dataset}`: a Longbow "
            "brings deleted rows back when it restarts",
            field="store",
        )

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        return self._uploads.read_rows(dataset, upload_id).whole.ranges()

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
        if self.read_schema(name) is None:
            raise unknown_dataset(name)
        self._connection.run_action("delete-dataset", {"dataset": name})
