"""Calls to a `fletcher store`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.errors import DimensionMismatchError, StoreUnavailableError, UnknownDatasetError
from fletcher.stores import protocol
from fletcher.stores.base import (
    Appended,
    DatasetInfo,
    DatasetWriter,
    Filters,
    Names,
    Store,
    StoreCapabilities,
    Vector,
    WriteMode,
)
from fletcher.stores.exact_search import existing_schema
from fletcher.stores.filters import to_json
from fletcher.stores.flight.connection import FlightConnection, store_call
from fletcher.stores.flight.transfer import cut_rows, exchange_rows
from fletcher.stores.schemas import check_compatible, conform_batch, limit_rows, wanted_columns


class FletcherServer(Store):
    """A `fletcher store`. Thread-safe, except for its writers.

    It takes every dtype, drops repeated groups, keeps the type of ids and appends durably.
    """

    def __init__(self, connection: FlightConnection, capabilities: StoreCapabilities) -> None:
        self.address = connection.address.text
        self._connection = connection
        self._capabilities = capabilities

    @property
    def capabilities(self) -> StoreCapabilities:
        return self._capabilities

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> FletcherWriter:
        writer = FletcherWriter(self._connection, dataset, schema, mode)
        writer.create_dataset()
        return writer

    def datasets(self) -> list[DatasetInfo]:
        return self._list(b"")

    def staged_datasets(self) -> list[DatasetInfo]:
        return self._list(protocol.STAGED)

    def dataset(self, name: str) -> DatasetInfo | None:
        descriptor = flight.FlightDescriptor.for_path(name)
        try:
            with store_call(f"looking for dataset `{name}`"):
                options = self._connection.call_options()
                return _info(self._connection.meta_client.get_flight_info(descriptor, options))
        except UnknownDatasetError:
            return None

    def read_schema(self, name: str) -> pa.Schema | None:
        info = self.dataset(name)
        return None if info is None else info.schema

    def replace_dataset(self, name: str, staged: str) -> None:
        request = protocol.ReplaceDatasetRequest(name, staged)
        if self._connection.run_action(protocol.REPLACE_DATASET, request) != protocol.REPLACED:
            raise StoreUnavailableError(
                f"the store's answer to {protocol.REPLACE_DATASET} cannot be read", field="store"
            )

    def delete_upload(self, dataset: str, upload_id: str) -> int:
        request = protocol.DeleteUploadRequest(dataset, upload_id)
        answer = self._connection.ask(protocol.DELETE_UPLOAD, request, protocol.DeleteUploadAnswer)
        return answer.rows

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        request = protocol.StoredRangesRequest(dataset, upload_id)
        try:
            answer = self._connection.ask(
                protocol.STORED_RANGES, request, protocol.StoredRangesAnswer
            )
        except UnknownDatasetError:
            return []
        return _checked_ranges(answer.ranges)

    def scan(
        self, name: str, *, columns: Names = None, filters: Filters = (), limit: int | None = None
    ) -> pa.RecordBatchReader:
        ticket: dict[str, Any] = {"filters": to_json(filters)}
        if columns is not None:
            ticket["columns"] = list(columns)
        if limit is not None:
            ticket["limit"] = limit
        what = f"reading dataset `{name}`"
        reader = self._connection.open_stream(name, ticket, what)
        wanted = wanted_columns(name, reader.schema, columns)
        schema = pa.schema(
            [reader.schema.field(name) for name in wanted], metadata=reader.schema.metadata
        )

        def batches() -> Iterator[pa.RecordBatch]:
            with store_call(what):
                yield from limit_rows(reader, schema, limit)

        return pa.RecordBatchReader.from_batches(schema, batches())

    def search(
        self, dataset: str, vector: Vector, *, k: int, columns: Names = None, filters: Filters = ()
    ) -> pa.Table:
        is_multi = vector.ndim > 1
        if is_multi and "multi" not in self.capabilities.outputs:
            raise DimensionMismatchError(
                "`vector` has several vectors, expected one: this store keeps one per row",
                field="vector",
            )
        wanted = existing_schema(self, dataset).names if columns is None else list(columns)
        name = "token_vectors" if is_multi else "vector"
        search: dict[str, Any] = {"dataset": dataset, name: vector.tolist(), "k": k}
        search |= {"filters": to_json(filters), "columns": wanted, "score": "cosine"}
        what = f"searching dataset `{dataset}`"
        reader = self._connection.open_stream(dataset, {"search": search}, what)
        with store_call(what):
            found = reader.read_all()
        return found.select([*wanted, "score"])

    def close(self) -> None:
        self._connection.close()

    def delete_dataset(self, name: str) -> None:
        self._connection.run_action("delete-dataset", {"dataset": name})

    def _list(self, criteria: bytes) -> list[DatasetInfo]:
        flights = self._connection.list_flights(criteria)
        return sorted((_info(one) for one in flights), key=lambda info: info.name)


class FletcherWriter(DatasetWriter):
    """Writer to `fletcher store`. One thread owns it.

    Each append is one call, and its rows are one group. The server commits all rows of the group or
    none.
    """

    def __init__(
        self, connection: FlightConnection, dataset: str, schema: pa.Schema, mode: WriteMode
    ) -> None:
        self._connection = connection
        self._dataset = dataset
        self._schema = schema
        self._mode: WriteMode = mode

    def create_dataset(self) -> None:
        """Create the dataset; the server checks the schema.

        Raises:
            RequestError: The dataset does not take rows of this schema.
            StoreUnavailableError: The store does not answer.
        """
        self._send_group(pa.RecordBatch.from_pylist([], schema=self._schema))

    def append(self, batches: Sequence[pa.RecordBatch]) -> Appended:
        for batch in batches:
            check_compatible(self._dataset, self._schema, batch.schema)
        rows = [conform_batch(batch, self._schema) for batch in batches if batch.num_rows]
        if rows:
            self._send_group(pa.concat_batches(rows))
        return Appended()

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        request = protocol.MissingKeysRequest(self._dataset, list(batch_keys))
        answer = self._connection.ask(protocol.MISSING_KEYS, request, protocol.MissingKeysAnswer)
        return answer.missing

    def close(self) -> None:
        """Nothing to do."""

    def _send_group(self, rows: pa.RecordBatch) -> None:
        header = msgspec.json.encode(protocol.GroupHeader(rows.num_rows, self._mode))
        messages = cut_rows(rows, self._connection.message_bytes)
        exchange_rows(self._connection, self._dataset, messages, header).end()


def _checked_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges of an answer.

    Raises StoreUnavailableError if they are no row offsets.
    """
    if all(0 <= first <= last for first, last in ranges):
        return ranges
    raise StoreUnavailableError("the store's answer names ranges that are not row offsets")


def _info(one: flight.FlightInfo) -> DatasetInfo:
    name = one.descriptor.path[0].decode(errors="replace") if one.descriptor.path else ""
    if one.schema is None or (name and "vector" not in one.schema.names):
        raise StoreUnavailableError(
            f"the store's answer about dataset `{name[:128]}` cannot be read: it has no column "
            "`vector`",
            field="store",
        )
    rows, size = one.total_records, one.total_bytes
    return DatasetInfo(name, one.schema, rows if rows >= 0 else None, size if size > 0 else None)
