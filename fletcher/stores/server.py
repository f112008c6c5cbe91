"""`fletcher store`: a folder of LanceDB tables behind Longbow's Flight calls."""

# ruff: noqa: ARG002 - Flight gives every handler its context

from __future__ import annotations

import functools
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import (
    BatchTooLargeError,
    ColumnTypeError,
    FletcherError,
    InternalError,
    InvalidCommandError,
    SetupError,
    UnknownColumnError,
)
from fletcher.options import check_dataset
from fletcher.stores import wire
from fletcher.stores.actions import Actions, Query, Ticket
from fletcher.stores.base import DatasetInfo, WriteMode
from fletcher.stores.ingest import Ingest, Stream
from fletcher.stores.lance import LanceStore
from fletcher.stores.nearest import unknown_dataset

_log = logging.getLogger(__name__)
_Handler = TypeVar("_Handler", bound=Callable[..., Any])

MAX_GROUP_BYTES = 512 << 20
# Acknowledgements that a client has not read; beyond it the server stops reading rows.
MAX_UNREAD_ACKS = 1024
SLOW_DOWN_AT = 0.8
# Once all is committed, calls get this long to end by themselves; then their clients see it.
END_CALLS_S = 1.0


def _guarded(handler: _Handler) -> _Handler:
    """Lets only Flight errors of ours out: pyarrow sends the traceback of any other exception."""

    @functools.wraps(handler)
    def call(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except Exception as error:  # noqa: BLE001
            raise _flight_error(error) from None

    return call  # type: ignore[return-value]


def _flight_error(error: Exception) -> flight.FlightError:
    if isinstance(error, FletcherError):
        return wire.to_flight(error)
    if isinstance(error, pa.ArrowInvalid):
        # What could not be decoded; Arrow's words name no file.
        return wire.to_flight(InvalidCommandError(f"the stream cannot be read: {str(error)[:300]}"))
    _log.error("a store call failed", exc_info=error)
    return wire.to_flight(InternalError("the store failed; its log says why"))


class StoreServer:
    """A store server on two ports, listening from construction to `close`.

    An acknowledgement is sent, and a DoPut ends, when the rows are committed and synced to disk.

    Args:
        folder: The LanceDB folder; created if absent. No other process may write to it.
        host: Address to bind.
        port: Data port; 0 takes a free one.
        meta_port: Port of ListFlights, GetFlightInfo and the namespaces; 0 takes a free one.

    Raises:
        StoreError: The folder cannot be used.
        SetupError: A port is taken.
    """

    def __init__(self, folder: Path, *, host: str, port: int, meta_port: int) -> None:
        self._store = LanceStore(folder)
        self._ingest = Ingest(self._store)
        actions = Actions(self._store, self._ingest, folder)
        self._data = _listen(
            host, port, lambda at: _DataServer(at, self._store, self._ingest, actions)
        )
        self.port = self._data.port
        self.address = _address(host, self.port)
        try:
            self._meta = _listen(
                host, meta_port, lambda at: _MetaServer(at, self._store, actions, self.address)
            )
        except SetupError:
            self._data.shutdown()
            raise
        self.meta_port = self._meta.port
        self.meta_address = _address(host, self.meta_port)
        actions.meta_port = self.meta_port

    def close(self, timeout_s: float) -> bool:
        """Commits what was received, refuses the rest, stops listening.

        Returns:
            False where commits took longer than `timeout_s`, or a client keeps its call open;
            every acknowledged row is stored in any case.
        """
        committed = self._ingest.close(timeout_s)
        # `shutdown` waits for open streams without a limit, so it gets a thread and a limit.
        threads = [
            threading.Thread(target=server.shutdown, name="shutdown", daemon=True)
            for server in (self._data, self._meta)
        ]
        deadline = time.monotonic() + END_CALLS_S
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        self._store.close()
        return committed and not any(thread.is_alive() for thread in threads)


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    """What both ports answer."""

    def __init__(self, location: str, store: LanceStore, actions: Actions) -> None:
        self._store = store
        self._actions = actions
        self._handlers = actions.data
        super().__init__(location)

    @_guarded
    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> list[Any]:
        handler = self._handlers.get(action.type)
        if handler is None:
            raise InvalidCommandError(
                f"there is no action {action.type[:100]!r}; there are {', '.join(self._handlers)}",
                field="action",
                allowed=list(self._handlers),
            )
        body = wire.decode_object(action.body.to_pybytes(), f"the action {action.type}")
        return [flight.Result(result) for result in handler[1](body)]

    @_guarded
    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        return [(name, about) for name, (about, _) in self._handlers.items()]

    @_guarded
    def do_get(
        self, context: flight.ServerCallContext, ticket: flight.Ticket
    ) -> flight.FlightDataStream:
        asked = Ticket.parse(ticket.ticket)
        if asked.search is not None:
            found = self._actions.search(asked.search)
            return flight.RecordBatchStream(found)
        rows = self._store.scan(
            asked.dataset, columns=asked.columns, filters=asked.filters, limit=asked.limit
        )
        return flight.GeneratorStream(rows.schema, _guarded_batches(rows))


class _DataServer(_Server):
    """The data port: DoPut, DoExchange, DoGet, DoAction."""

    def __init__(self, location: str, store: LanceStore, ingest: Ingest, actions: Actions) -> None:
        self._ingest = ingest
        super().__init__(location, store, actions)

    @_guarded
    def do_put(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.FlightMetadataWriter,
    ) -> None:
        if not descriptor.path:
            raise InvalidCommandError("missing flight descriptor path", field="dataset")
        dataset = descriptor.path[0].decode(errors="replace")
        check_dataset(dataset)
        if self._ingest.pressure(dataset) > SLOW_DOWN_AT:
            notice = {"status": "slow_down", "reason": "wal_pressure"}
            writer.write(json.dumps(notice).encode())
        pending: list[Future[int]] = []
        upload = _Upload(self._ingest, dataset)
        for _, _, done in upload.read(reader, context):
            pending.append(done)
            while pending and pending[0].done():
                pending.pop(0).result()
        for done in pending:
            done.result()

    @_guarded
    def do_exchange(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.MetadataRecordBatchWriter,
    ) -> None:
        path = [part.decode(errors="replace") for part in descriptor.path or ()]
        if len(path) == 2 and path[0] == wire.INGEST:
            check_dataset(path[1])
            self._exchange_ingest(context, path[1], reader, writer)
        elif descriptor.command == b"VectorSearch":
            self._exchange_search(reader, writer)
        else:
            raise InvalidCommandError(
                "this DoExchange names nothing to do; give the path "
                f"[{wire.INGEST!r}, dataset] or the command VectorSearch",
                field="descriptor",
                allowed=[wire.INGEST, "VectorSearch"],
            )

    def _exchange_ingest(
        self,
        context: flight.ServerCallContext,
        dataset: str,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.MetadataRecordBatchWriter,
    ) -> None:
        acks = _Acks(writer)
        try:
            for batch_id, rows, done in _Upload(self._ingest, dataset).read(reader, context):
                acks.put(batch_id, rows, done)
        finally:
            acks.close()
        if acks.error is not None:
            raise acks.error

    def _exchange_search(
        self, reader: flight.MetadataRecordBatchReader, writer: flight.MetadataRecordBatchWriter
    ) -> None:
        begun = False
        for chunk in reader:
            if chunk.data is None:
                continue
            for query in _queries(chunk.data):
                found = self._actions.search(query).combine_chunks()
                if not begun:
                    writer.begin(found.schema)
                    begun = True
                batches = found.to_batches() or [
                    pa.RecordBatch.from_pylist([], schema=found.schema)
                ]
                for batch in batches:
                    writer.write_batch(batch)


class _MetaServer(_Server):
    """The meta port: ListFlights, GetFlightInfo, DoGet, DoAction and the namespaces."""

    def __init__(
        self, location: str, store: LanceStore, actions: Actions, data_address: str
    ) -> None:
        self._data_address = data_address
        super().__init__(location, store, actions)
        self._handlers = actions.meta

    @_guarded
    def list_flights(
        self, context: flight.ServerCallContext, criteria: bytes
    ) -> Iterator[flight.FlightInfo]:
        return iter([self._info(info) for info in self._store.datasets()])

    @_guarded
    def get_flight_info(
        self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor
    ) -> flight.FlightInfo:
        name = descriptor.path[0] if descriptor.path else descriptor.command or b""
        info = self._store.dataset(name.decode(errors="replace"))
        if info is None:
            raise unknown_dataset(name.decode(errors="replace"))
        return self._info(info)

    def _info(self, info: DatasetInfo) -> flight.FlightInfo:
        return flight.FlightInfo(
            info.schema,
            flight.FlightDescriptor.for_path(info.name),
            [flight.FlightEndpoint(info.name.encode(), [self._data_address])],
            total_records=info.num_rows,
            total_bytes=info.num_bytes or -1,
        )


class _Upload:
    """One stream of rows: checked, grouped by what its client says, handed to the ingest."""

    def __init__(self, ingest: Ingest, dataset: str) -> None:
        self._ingest = ingest
        self._dataset = dataset
        self._stream = Stream()
        self._group: list[pa.RecordBatch] = []
        self._group_rows = 0

    def read(
        self, reader: flight.MetadataRecordBatchReader, context: flight.ServerCallContext
    ) -> Iterator[tuple[int, int, Future[int]]]:
        """Every message's number, its rows, and the future of its commit.

        Messages of a group (`{"group_rows": N, "mode": ...}` in their metadata) share one future
        and are given out when all N rows are there. A group that does not get whole is dropped.
        """
        waiting: list[tuple[int, int]] = []
        number = 0
        for chunk in reader:
            if chunk.data is None:
                continue
            batch = chunk.data
            _check_rows(batch)
            group_rows, mode = _group(chunk.app_metadata)
            self._group.append(batch)
            self._group_rows += batch.num_rows
            waiting.append((number, batch.num_rows))
            number += 1
            if group_rows is not None and self._group_rows < group_rows:
                if sum(one.nbytes for one in self._group) > MAX_GROUP_BYTES:
                    raise BatchTooLargeError(
                        f"a group of rows is over {MAX_GROUP_BYTES >> 20} MiB; send smaller groups"
                    )
                continue
            done = self._ingest.submit(
                self._dataset,
                self._group,
                mode=mode,
                whole=group_rows is not None,
                stream=self._stream,
            )
            for batch_id, rows in waiting:
                yield batch_id, rows, done
            self._group, self._group_rows, waiting = [], 0, []
        if self._group and not context.is_cancelled():
            raise InvalidCommandError(
                f"the stream ended within a group: {self._group_rows} rows came of those that "
                "`group_rows` announced; none of them is stored",
                field="group_rows",
            )


class _Acks:
    """Writes acknowledgements in order from a thread of its own, as commits end."""

    def __init__(self, writer: flight.MetadataRecordBatchWriter) -> None:
        self.error: Exception | None = None
        self._writer = writer
        self._queue: queue.Queue[tuple[int, int, Future[int]] | None] = queue.Queue(MAX_UNREAD_ACKS)
        self._thread = threading.Thread(target=self._loop, name="acks", daemon=True)
        self._thread.start()

    def put(self, batch_id: int, rows: int, done: Future[int]) -> None:
        """Promises an acknowledgement; raises what became of an earlier one."""
        if self.error is not None:
            raise self.error
        self._queue.put((batch_id, rows, done))

    def close(self) -> None:
        """Waits until all that was promised is written."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is not None:
                continue
            batch_id, rows, done = item
            try:
                done.result()
                self._write({"status": "acked", "batch_id": batch_id, "rows": rows})
            except Exception as error:  # noqa: BLE001 - raised by the handler
                self.error = error
                if isinstance(error, FletcherError):
                    # The handler may be blocked in a read; a client that waits for this
                    # acknowledgement has to hear of it now.
                    self._refuse(batch_id, error)

    def _refuse(self, batch_id: int, error: FletcherError) -> None:
        try:
            self._write({"status": "error", "batch_id": batch_id, **error.to_dict()})
        except pa.ArrowException as gone:
            _log.info("the client of a refused batch is gone: %s", gone)

    def _write(self, ack: dict[str, Any]) -> None:
        self._writer.write_metadata(json.dumps(ack).encode())


def _check_rows(batch: pa.RecordBatch) -> None:
    """Refuses rows that no search could find, and arrays that are not what they say."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InvalidCommandError(f"the rows are damaged: {str(error)[:200]}") from None
    names = batch.schema.names
    if len(set(names)) != len(names):
        raise ColumnTypeError("two columns have the same name", field="columns")
    for name in ("id", "vector"):
        if name not in names:
            raise UnknownColumnError(
                f"the rows have no column `{name}`, they have {', '.join(names)[:300]}",
                field=name,
                allowed=["id", "vector", "timestamp"],
            )
    id_type, vector_type = batch.schema.field("id").type, batch.schema.field("vector").type
    if not (pa.types.is_integer(id_type) or pa.types.is_string(id_type)):
        raise ColumnTypeError(
            f"`id` is {id_type}, expected utf8 or an integer",
            field="id",
            allowed=["utf8", "int64", "uint64"],
        )
    if not pa.types.is_fixed_size_list(vector_type):
        raise ColumnTypeError(
            f"`vector` is {vector_type}, expected a fixed size list of numbers", field="vector"
        )
    if "batch_key" in names and not pa.types.is_string(batch.schema.field("batch_key").type):
        raise ColumnTypeError("`batch_key` is no utf8", field="batch_key")


def _group(metadata: pa.Buffer | None) -> tuple[int | None, WriteMode]:
    """(rows of the group that a message belongs to, mode) of a message's metadata."""
    if metadata is None or not metadata.size:
        return None, "append"
    try:
        fields = json.loads(metadata.to_pybytes())
    except (ValueError, RecursionError):
        fields = None
    # Longbow reads no metadata, so what is not ours means nothing.
    if not isinstance(fields, dict):
        return None, "append"
    rows, mode = fields.get("group_rows"), fields.get("mode", "append")
    if mode not in ("append", "upsert", "overwrite"):
        raise InvalidCommandError(
            f"`mode` is {str(mode)[:100]!r}",
            field="mode",
            allowed=["append", "upsert", "overwrite"],
        )
    return (rows if type(rows) is int and rows >= 0 else None), mode


def _queries(batch: pa.RecordBatch) -> Iterator[Query]:
    """The searches of a VectorSearch batch, one a row."""
    for name in ("dataset", "query_vector"):
        if name not in batch.schema.names:
            raise UnknownColumnError(
                f"VectorSearch needs the column `{name}`; it came with "
                f"{', '.join(batch.schema.names)[:300]}",
                field=name,
                allowed=["dataset", "k", "ef", "query_vector"],
            )
    for row in batch.to_pylist():
        yield Query.from_json(
            {
                "dataset": row["dataset"],
                "vector": row["query_vector"],
                **({"k": row["k"]} if row.get("k") is not None else {}),
            }
        )


def _guarded_batches(rows: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    try:
        yield from rows
    except Exception as error:  # noqa: BLE001
        raise _flight_error(error) from None


def _listen(host: str, port: int, make: Callable[[str], Any]) -> Any:
    try:
        return make(_location(host, port))
    except (pa.ArrowException, OSError) as error:
        raise SetupError(
            f"`port` {port} on {host} cannot be listened on: it is taken, or the address is not "
            "this machine's; give another, or 0 for a free one",
            field="port",
        ) from error


def _location(host: str, port: int) -> str:
    return f"grpc+tcp://[{host}]:{port}" if ":" in host else f"grpc+tcp://{host}:{port}"


def _address(host: str, port: int) -> str:
    return _location(host, port).replace("grpc+tcp", "grpc")
