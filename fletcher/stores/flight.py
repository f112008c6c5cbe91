"""A store behind Arrow Flight: Longbow, or anything that speaks its contract."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import flight

from fletcher.core.command import check_dataset
from fletcher.core.ranges import RangeSet
from fletcher.core.schema import parse_batch_key
from fletcher.errors import (
    FletcherError,
    RequestError,
    StoreUnavailableError,
    UnauthenticatedError,
    UnauthorizedError,
    UnavailableError,
    UnknownDatasetError,
)
from fletcher.net.address import FlightAddress
from fletcher.net.channel import connect
from fletcher.net.compression import Sender
from fletcher.net.flight_errors import from_store_error
from fletcher.stores import longbow, wire
from fletcher.stores.base import DatasetInfo, Filter, StoreCapabilities, WriteMode
from fletcher.stores.filters import to_json
from fletcher.stores.flight_writer import FletcherWriter, LongbowWriter
from fletcher.stores.nearest import unknown_dataset
from fletcher.stores.schemas import check_columns, check_compatible, check_storable

_log = logging.getLogger(__name__)

_FAILURES = (pa.ArrowException, flight.FlightError, OSError)


class FlightStore:
    """A Flight store; connects when it is first used. Thread-safe, but for its writers.

    The profile decides what is relied on. `fletcher`: every dtype, repeats dropped by the server,
    ids in their type, appends durable. `longbow`: float32, no promise beyond the acknowledgement.
    `auto` asks the store for its capabilities and takes `longbow` where it has none.

    Args:
        address: As the user wrote it.
        data_uri: Where rows go and are read.
        meta_uri: Where datasets are listed; None: as the server's capabilities say, else
            `default_meta_uri`.
        default_meta_uri: Longbow's habit, the next port.
        profile: `auto`, `longbow` or `fletcher`.
        timeout_s: Deadline of one call; an append is one call.
        compression: Of rows that are sent.
    """

    def __init__(
        self,
        address: str,
        *,
        data_uri: str,
        meta_uri: str | None,
        default_meta_uri: str,
        profile: str,
        timeout_s: float,
        compression: str = "none",
    ) -> None:
        self._sender = Sender(
            compression,
            host=FlightAddress.from_uri(data_uri).host,
            peer=address,
            probe=lambda body: self._act("check_readiness", body),
        )
        self.address = address
        self._data_uri = data_uri
        self._meta_uri = meta_uri
        self._default_meta_uri = default_meta_uri
        self._profile = profile
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        self._clients: dict[str, flight.FlightClient] = {}
        self._capabilities: StoreCapabilities | None = None
        self._widening_said = False

    @property
    def capabilities(self) -> StoreCapabilities:
        """What the store can do; asks it the first time.

        Raises:
            StoreUnavailableError: It does not answer.
        """
        if self._capabilities is None:
            self._capabilities = self._ask_capabilities()
        return self._capabilities

    def open_writer(
        self, dataset: str, schema: pa.Schema, mode: WriteMode
    ) -> FletcherWriter | LongbowWriter:
        """See `Store.open_writer`. A Longbow refuses `upsert`."""
        check_dataset(dataset)
        check_storable(schema)
        if self._is_fletcher:
            writer = FletcherWriter(self, dataset, schema, mode)
            writer.begin()
            return writer
        if mode == "upsert":
            raise RequestError(
                "`mode` is upsert, which a Longbow store cannot do: it only appends; use append, "
                "or a store of Fletcher",
                field="mode",
                allowed=["append", "overwrite"],
            )
        narrow = longbow.longbow_schema(schema)
        if narrow.field("vector").type != schema.field("vector").type and not self._widening_said:
            self._widening_said = True
            _log.info("vectors are widened to float32, the one type that Longbow indexes")
        if mode == "overwrite":
            self._delete_if_there(dataset)
        else:
            info = self.dataset(dataset)
            if info is not None:
                check_compatible(dataset, info.schema, narrow)
        return LongbowWriter(self, dataset, narrow)

    def datasets(self) -> list[DatasetInfo]:
        """See `Store.datasets`. A Longbow counts batches where `num_rows` says rows."""
        return sorted(self._flights(), key=lambda info: info.name)

    def dataset(self, name: str) -> DatasetInfo | None:
        """See `Store.dataset`. A Longbow counts batches where `num_rows` says rows."""
        check_dataset(name)
        if not self._is_fletcher:
            # Longbow's GetFlightInfo tells an unknown dataset by an error like any other.
            return next((info for info in self._flights() if info.name == name), None)
        descriptor = flight.FlightDescriptor.for_path(name)
        try:
            return _info(self._meta().get_flight_info(descriptor, self.options()))
        except _FAILURES as error:
            ours = from_store_error(error, f"looking for dataset `{name}`")
            if isinstance(ours, UnknownDatasetError):
                return None
            raise ours from error

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        """See `Store.stored_ranges`. A Longbow's groups count once all their rows are there."""
        check_dataset(dataset)
        if self._is_fletcher:
            body = {"dataset": dataset, "upload_id": upload_id}
            try:
                ranges = json.loads(self.action(wire.STORED_RANGES, body))["ranges"]
            except UnknownDatasetError:
                return []
            return [(int(first), int(last)) for first, last in ranges]
        # All keys of the upload, and of those whose names begin with it, sort between these two.
        counts = self.count_keys(
            dataset,
            (
                Filter("batch_key", ">=", f"{upload_id}:"),
                Filter("batch_key", "<=", f"{upload_id};"),
            ),
        )
        stored = []
        for key, count in counts.items():
            parsed = parse_batch_key(key)
            if parsed and parsed[0] == upload_id and count >= parsed[2] - parsed[1] + 1:
                stored.append(parsed[1:])
        return RangeSet(stored).ranges()

    def scan(
        self,
        dataset: str,
        *,
        columns: Sequence[str] | None = None,
        filters: Sequence[Filter] = (),
        limit: int | None = None,
    ) -> pa.RecordBatchReader:
        """See `Store.scan`. From a Longbow all columns travel, whatever is asked."""
        check_dataset(dataset)
        ticket: dict[str, Any] = {"name": dataset, "filters": to_json(filters)}
        if self._is_fletcher:
            if columns is not None:
                ticket["columns"] = list(columns)
            if limit is not None:
                ticket["limit"] = limit
        reader = self._get(ticket, f"reading dataset `{dataset}`")
        if reader is None:
            # Longbow answers for a dataset without rows with no schema.
            raise unknown_dataset(dataset)
        wanted = list(columns) if columns is not None else reader.schema.names
        check_columns(dataset, reader.schema, wanted)
        schema = pa.schema(
            [reader.schema.field(name) for name in wanted], metadata=reader.schema.metadata
        )
        return pa.RecordBatchReader.from_batches(schema, _read(reader, schema, limit, dataset))

    def search(
        self,
        dataset: str,
        vector: npt.NDArray[np.float32],
        *,
        k: int,
        columns: Sequence[str] | None = None,
        filters: Sequence[Filter] = (),
    ) -> pa.Table:
        """See `Store.search`. A Longbow answers `id` (its own row number for text ids) and `score`.

        Raises:
            RequestError: Other columns are asked of a Longbow.
        """
        check_dataset(dataset)
        wanted = list(columns) if columns is not None else None
        search: dict[str, Any] = {
            "dataset": dataset,
            "vector": [float(value) for value in vector],
            "k": k,
            "filters": to_json(filters),
        }
        if self._is_fletcher:
            if wanted is None:
                info = self.dataset(dataset)
                if info is None:
                    raise unknown_dataset(dataset)
                wanted = info.schema.names
            search["columns"] = wanted
        elif wanted is not None and set(wanted) - {"id"}:
            raise RequestError(
                f"`columns` asks for {', '.join(wanted)}, a Longbow store answers a search with "
                "`id` and `score` alone; read the rows by their ids",
                field="columns",
                allowed=["id"],
            )
        what = f"searching dataset `{dataset}`"
        reader = self._get({"name": dataset, "search": search}, what)
        if reader is None:
            raise unknown_dataset(dataset)
        try:
            found = reader.read_all()
        except _FAILURES as error:
            raise from_store_error(error, what) from error
        return found.select([*(wanted if wanted is not None else ["id"]), "score"])

    def delete_dataset(self, name: str) -> None:
        """See `Store.delete_dataset`."""
        check_dataset(name)
        if not self._is_fletcher and self.dataset(name) is None:
            raise unknown_dataset(name)
        self.action("delete-dataset", {"dataset": name})

    def close(self) -> None:
        """Closes the connections. Idempotent."""
        with self._mutex:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def client(self, uri: str | None = None) -> flight.FlightClient:
        """The connection to a port, made when first asked for; the data port if none is named.

        Raises:
            StoreUnavailableError: The address cannot be resolved.
        """
        uri = uri or self._data_uri
        with self._mutex:
            if uri not in self._clients:
                try:
                    self._clients[uri] = connect(uri)
                except (pa.ArrowException, OSError) as error:
                    raise from_store_error(error, f"connecting to {self.address}") from error
            return self._clients[uri]

    def options(self, write: pa.ipc.IpcWriteOptions | None = None) -> flight.FlightCallOptions:
        """A call's options, for DoPut with its compression.

        Every call has a deadline: a Longbow under pressure stalls instead of refusing.
        """
        return flight.FlightCallOptions(timeout=self._timeout_s, write_options=write)

    def write_options(self, first: pa.RecordBatch) -> pa.ipc.IpcWriteOptions:
        """Compression of a call whose first batch this is."""
        return self._sender.options(first)

    def action(self, name: str, body: dict[str, Any]) -> bytes:
        """The first result of an action on the data port, as bytes; empty if it has none."""
        return self._act(name, json.dumps(body).encode())

    def _act(self, name: str, body: bytes) -> bytes:
        try:
            results = list(self.client().do_action(flight.Action(name, body), self.options()))
        except _FAILURES as error:
            raise from_store_error(error, f"asking for {name}") from error
        return results[0].body.to_pybytes() if results else b""

    def count_keys(self, dataset: str, filters: Sequence[Filter]) -> Counter[str]:
        """How many rows a Longbow has of each key that meets the filters."""
        ticket = {"name": dataset, "filters": to_json(filters)}
        what = f"asking what dataset `{dataset}` holds"
        counts: Counter[str] = Counter()
        try:
            reader = self._get(ticket, what)
            for batch in reader if reader is not None else ():
                if "batch_key" in batch.schema.names:
                    column = batch.column("batch_key").drop_null()
                    counted = column.value_counts()
                    keys = counted.field("values").to_pylist()
                    counts.update(dict(zip(keys, counted.field("counts").to_pylist(), strict=True)))
        except FletcherError:
            # A dataset that is not there yet is refused in words of Longbow's own.
            if self.dataset(dataset) is None:
                return Counter()
            raise
        except _FAILURES as error:
            raise from_store_error(error, what) from error
        return counts

    @property
    def _is_fletcher(self) -> bool:
        return self.capabilities.drops_repeated_keys

    def _ask_capabilities(self) -> StoreCapabilities:
        if self._profile == "longbow":
            return longbow.CAPABILITIES
        try:
            can = json.loads(self.action(wire.CAPABILITIES, {}))
            if self._meta_uri is None and can.get("meta_port"):
                data = FlightAddress.from_uri(self._data_uri)
                self._meta_uri = data.with_port(int(can["meta_port"])).uri
            return StoreCapabilities(
                dtypes=tuple(can["dtypes"]),
                null_vectors=bool(can["null_vectors"]),
                upsert=bool(can["upsert"]),
                drops_repeated_keys=bool(can["drops_repeated_keys"]),
                durable=bool(can["durable"]),
            )
        except UnavailableError as error:
            # Down, or a Longbow that calls an unknown action an internal error?
            unknown = wire.maybe_unknown_action(error.__cause__)
            if self._profile == "fletcher" or not unknown or not self._answers():
                refused = "connection refused" in error.message.lower()
                raise StoreUnavailableError(
                    f"the store {self.address} does not answer: "
                    f"{'connection refused' if refused else error.message}; check its address and "
                    "that it runs",
                    field="store",
                    retry_after_ms=error.retry_after_ms,
                ) from error
            _log.debug("%s has no capabilities: %s", self.address, error)
        except (UnauthenticatedError, UnauthorizedError):
            raise
        except (ValueError, KeyError, TypeError, FletcherError) as error:
            if self._profile == "fletcher":
                raise RequestError(
                    f"the store at {self.address} has no capabilities of Fletcher's; leave "
                    "`profile=fletcher` out",
                    field="store",
                ) from error
        _log.info("%s speaks Longbow's contract", self.address)
        return longbow.CAPABILITIES

    def _answers(self) -> bool:
        try:
            self.action("check_readiness", {})
        except UnavailableError:
            return False
        except FletcherError:
            return True
        return True

    def _meta(self) -> flight.FlightClient:
        return self.client(self._meta_uri or self._default_meta_uri)

    def _flights(self) -> list[DatasetInfo]:
        assert self.capabilities
        try:
            return [_info(one) for one in self._meta().list_flights(options=self.options())]
        except _FAILURES as error:
            meta = self._meta_uri or self._default_meta_uri
            what = f"listing datasets on the meta port {meta} (the address's `meta=PORT` sets it)"
            raise from_store_error(error, what) from error

    def _delete_if_there(self, dataset: str) -> None:
        if self.dataset(dataset) is not None:
            self.action("delete-dataset", {"dataset": dataset})

    def _get(self, ticket: dict[str, Any], what: str) -> pa.RecordBatchReader | None:
        """A DoGet; None where the answer has no schema."""
        try:
            stream = self.client().do_get(
                flight.Ticket(json.dumps(ticket, ensure_ascii=False).encode()), self.options()
            )
            return stream.to_reader()
        except _FAILURES as error:
            if type(error) is pa.ArrowInvalid and "schema" in str(error).lower():
                return None
            raise from_store_error(error, what) from error


def _info(one: flight.FlightInfo) -> DatasetInfo:
    name = one.descriptor.path[0].decode() if one.descriptor.path else ""
    size = one.total_bytes if one.total_bytes and one.total_bytes > 0 else None
    return DatasetInfo(name, one.schema, max(one.total_records, 0), size)


def _read(
    reader: pa.RecordBatchReader, schema: pa.Schema, limit: int | None, dataset: str
) -> Iterator[pa.RecordBatch]:
    left = limit
    batches: Callable[[], pa.RecordBatch] = reader.read_next_batch
    while left is None or left > 0:
        try:
            batch = batches()
        except StopIteration:
            return
        except _FAILURES as error:
            raise from_store_error(error, f"reading dataset `{dataset}`") from error
        part = batch if left is None else batch.slice(0, left)
        left = None if left is None else left - part.num_rows
        yield pa.RecordBatch.from_arrays(
            [part.column(name) for name in schema.names], schema=schema
        )
