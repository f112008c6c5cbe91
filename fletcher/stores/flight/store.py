"""Store reached by Arrow Flight: Longbow, or a server with Longbow's calls."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.errors import (
    DimensionMismatchError,
    FletcherError,
    RequestError,
    StoreUnavailableError,
    UnauthenticatedError,
    UnauthorizedError,
    UnavailableError,
    UnknownDatasetError,
)
from fletcher.stores import protocol
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
from fletcher.stores.exact_search import existing_dataset, unknown_dataset
from fletcher.stores.filters import to_json
from fletcher.stores.flight import longbow
from fletcher.stores.flight.connection import FlightConnection, store_call
from fletcher.stores.flight.longbow_datasets import LongbowDatasets
from fletcher.stores.flight.longbow_reader import LongbowReader
from fletcher.stores.flight.writers import FletcherWriter, LongbowWriter
from fletcher.stores.schemas import (
    check_compatible,
    check_storable,
    count_batch_keys,
    limit_rows,
    num_group_rows,
    upload_ranges,
    wanted_columns,
)
from fletcher.stores.staging import check_stored, incarnation_of, staged_for

_log = logging.getLogger(__name__)


class FlightStore(Store):
    """A Flight store; connects on first use. Thread-safe, except for its writers.

    The profile in the store's address says what the server can do. A `fletcher` server takes every
    dtype, drops repeated groups, keeps the type of ids and appends durably. A `longbow` server
    takes float32 and promises nothing beyond the acknowledgement. `auto` asks the store for its
    capabilities, and means `longbow` if the store reports none.

    Args:
        connection: Connection to the store; `close` closes it, too.
    """

    def __init__(self, connection: FlightConnection) -> None:
        self.address = connection.address.text
        self._connection = connection
        self._capabilities: StoreCapabilities | None = None
        self._widening_logged = False
        self._longbow = LongbowReader(connection)
        self._longbow_datasets = LongbowDatasets(connection)

    @property
    def capabilities(self) -> StoreCapabilities:
        if self._capabilities is None:
            self._capabilities = self._ask_capabilities()
        return self._capabilities

    def open_writer(
        self, dataset: str, schema: pa.Schema, mode: WriteMode
    ) -> FletcherWriter | LongbowWriter:
        """See `Store.open_writer`. A Longbow refuses `upsert`."""
        check_stored(dataset)
        check_storable(schema)
        if self._is_fletcher:
            writer = FletcherWriter(self._connection, dataset, schema, mode)
            writer.create_dataset()
            return writer
        if mode == "upsert":
            raise RequestError(
                "`mode` is upsert, which a Longbow store cannot do: it only appends; use append, "
                "or a store of Fletcher",
                field="mode",
                allowed=["append"],
            )
        narrow = longbow.longbow_schema(schema)
        if narrow.field("vector").type != schema.field("vector").type and not self._widening_logged:
            self._widening_logged = True
            _log.info("vectors are widened to float32, the one type that Longbow indexes")
        stored = self._longbow_datasets.read_schema(dataset)
        if stored is not None:
            check_compatible(dataset, stored, narrow)
        return LongbowWriter(self._connection, dataset, narrow, self._count_keys)

    def datasets(self) -> list[DatasetInfo]:
        return [info for info in self._list(b"") if staged_for(info.name) is None]

    def staged_datasets(self) -> list[DatasetInfo]:
        listed = self._list(protocol.STAGED if self._is_fletcher else b"")
        return [info for info in listed if staged_for(info.name) is not None]

    def _list(self, criteria: bytes) -> list[DatasetInfo]:
        if not self._is_fletcher:
            return self._longbow_datasets.describe_all()
        meta = self._connection.address.meta_uri
        what = f"listing datasets on the meta port {meta} (the address's `meta=PORT` sets it)"
        with store_call(what):
            options = self._connection.call_options()
            flights = list(self._connection.meta_client.list_flights(criteria, options))
        return sorted((_info(one) for one in flights), key=lambda info: info.name)

    def dataset(self, name: str) -> DatasetInfo | None:
        """See `Store.dataset`. In a Longbow, a dataset without rows does not exist yet."""
        check_stored(name)
        if not self._is_fletcher:
            return self._longbow_datasets.describe_dataset(name)
        descriptor = flight.FlightDescriptor.for_path(name)
        try:
            with store_call(f"looking for dataset `{name}`"):
                options = self._connection.call_options()
                return _info(self._connection.meta_client.get_flight_info(descriptor, options))
        except UnknownDatasetError:
            return None

    def incarnation(self, name: str) -> str | None:
        if not self._is_fletcher:
            schema = self._longbow_datasets.read_schema(name)
            return None if schema is None else incarnation_of(schema)
        info = self.dataset(name)
        return None if info is None else incarnation_of(info.schema)

    def replace_dataset(self, name: str, staged: str) -> None:
        """See `Store.replace_dataset`. A Longbow refuses it."""
        check_stored(name)
        if self._is_fletcher:
            request = protocol.ReplaceDatasetRequest(name, staged)
            if self._connection.run_action(protocol.REPLACE_DATASET, request) != protocol.REPLACED:
                raise StoreUnavailableError(
                    f"the store's answer to {protocol.REPLACE_DATASET} cannot be read",
                    field="store",
                )
            return
        raise RequestError(
            f"dataset `{name}` cannot be replaced: a Longbow brings deleted rows back when it "
            "restarts; write to a new dataset",
            field="mode",
            allowed=["append"],
        )

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        """See `Store.stored_ranges`. For a Longbow, only complete groups count."""
        check_stored(dataset)
        if self._is_fletcher:
            request = protocol.StoredRangesRequest(dataset, upload_id)
            try:
                answer = self._connection.ask(
                    protocol.STORED_RANGES, request, protocol.StoredRangesAnswer
                )
            except UnknownDatasetError:
                return []
            return _checked_ranges(answer.ranges)
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
        """See `Store.scan`."""
        check_stored(name)
        if not self._is_fletcher:
            return self._longbow.scan(name, columns=columns, filters=filters, limit=limit)
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

        def batches() -> Any:
            with store_call(what):
                yield from limit_rows(reader, schema, limit)

        return pa.RecordBatchReader.from_batches(schema, batches())

    def search(
        self, dataset: str, vector: Vector, *, k: int, columns: Names = None, filters: Filters = ()
    ) -> pa.Table:
        """See `Store.search`."""
        check_stored(dataset)
        is_multi = vector.ndim > 1
        if is_multi and "multi" not in self.capabilities.outputs:
            raise DimensionMismatchError(
                "`vector` has several vectors, expected one: this store keeps one per row",
                field="vector",
            )
        if not self._is_fletcher:
            return self._longbow.search(dataset, vector, k=k, columns=columns, filters=filters)
        wanted = existing_dataset(self, dataset).schema.names if columns is None else list(columns)
        name = "token_vectors" if is_multi else "vector"
        search: dict[str, Any] = {"dataset": dataset, name: vector.tolist(), "k": k}
        search |= {"filters": to_json(filters), "columns": wanted, "score": "cosine"}
        what = f"searching dataset `{dataset}`"
        reader = self._connection.open_stream(dataset, {"search": search}, what)
        with store_call(what):
            found = reader.read_all()
        return found.select([*wanted, "score"])

    def delete_dataset(self, name: str) -> None:
        check_stored(name)
        if not self._is_fletcher and self._longbow_datasets.read_schema(name) is None:
            raise unknown_dataset(name)
        self._connection.run_action("delete-dataset", {"dataset": name})

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._connection.close()

    def _count_keys(self, dataset: str, filters: Filters) -> Counter[str]:
        """Number of a Longbow's rows by batch key, among rows that meet the filters."""
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
            if self._longbow_datasets.read_schema(dataset) is None:
                return Counter()
            raise
        return counts

    @property
    def _is_fletcher(self) -> bool:
        return self.capabilities.drops_repeated_keys

    def _ask_capabilities(self) -> StoreCapabilities:
        address = self._connection.address
        if address.profile == "longbow":
            return longbow.CAPABILITIES
        try:
            answer = self._connection.run_action(protocol.CAPABILITIES, {})
            can = msgspec.json.decode(answer, type=protocol.CapabilitiesAnswer)
        except UnavailableError as error:
            # Longbow reports an unknown action as an internal error, so check whether Longbow is
            # up.
            unknown = _is_unknown_action(error.__cause__)
            if address.profile == "fletcher" or not unknown or not self._is_up():
                refused = "connection refused" in error.message.lower()
                reason = "connection refused" if refused else error.message
                raise StoreUnavailableError(
                    f"the store {self.address} does not answer: {reason}; check its address and "
                    "that it runs",
                    field="store",
                    retry_after_ms=error.retry_after_ms,
                ) from error
            _log.debug("%s has no capabilities: %s", self.address, error)
        except (UnauthenticatedError, UnauthorizedError):
            raise
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            # A Longbow refuses the question. This may be a store of Fletcher.
            raise StoreUnavailableError(
                f"the answer of the store {self.address} to capabilities cannot be read: {error}",
                field="store",
            ) from error
        except FletcherError as error:
            if address.profile == "fletcher":
                raise RequestError(
                    f"`profile` is fletcher, and the store at {self.address} does not answer "
                    "`capabilities`; leave `profile=fletcher` out",
                    field="store",
                ) from error
        else:
            if address.meta is None and can.meta_port:
                meta = address.data.with_port(can.meta_port)
                self._connection.address = replace(address, meta=meta)
            return msgspec.convert(can, StoreCapabilities, from_attributes=True)
        _log.info("%s speaks Longbow's contract", self.address)
        return longbow.CAPABILITIES

    def _is_up(self) -> bool:
        try:
            self._connection.run_action("check_readiness", {})
        except FletcherError as error:
            return not isinstance(error, UnavailableError)
        return True


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


def _is_unknown_action(error: BaseException | None) -> bool:
    """Whether the error may mean an action that the server lacks: UNKNOWN or INTERNAL.

    `fletcher store` sends `extra_info` with all its errors, so an error that has it does not count.
    """
    kinds = (flight.FlightServerError, flight.FlightInternalError, pa.ArrowException)
    return type(error) in kinds and not getattr(error, "extra_info", b"")
