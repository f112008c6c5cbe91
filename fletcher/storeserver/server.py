"""Server of `fletcher store`: offers Longbow's Flight calls on LanceDB tables."""

# ruff: noqa: ARG002 - Flight passes a context to every handler

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import (
    ConfigError,
    InvalidCommandError,
    SetupError,
    StoreError,
    UnknownColumnError,
    UnsupportedCallError,
)
from fletcher.net.address import FlightAddress
from fletcher.net.flight_answers import (
    action_results,
    action_types,
    flight_info,
    flight_list,
    generator_stream,
    schema_result,
    table_stream,
)
from fletcher.net.flight_errors import handler_errors
from fletcher.net.ports import check_port
from fletcher.stores import protocol
from fletcher.stores.base import DatasetInfo
from fletcher.stores.exact_search import existing_dataset
from fletcher.stores.lance.store import LanceStore
from fletcher.stores.staging import check_stored
from fletcher.storeserver.actions import Actions, answer_action
from fletcher.storeserver.ingest import Ingest
from fletcher.storeserver.requests import DoGetRequest, SearchRequest, convert_request
from fletcher.storeserver.upload_call import AckWriter, check_declared, read_groups
from fletcher.util.insist import insist
from fletcher.util.locks import FileLock
from fletcher.util.threads import start_thread

_log = logging.getLogger(__name__)

SLOW_DOWN_AT = 0.8
# Time for calls to end by themselves at shutdown, once all rows are committed.
END_CALLS_S = 1.0


@contextmanager
def _handling(context: Any, *, as_status: bool = False) -> Iterator[None]:
    """Turn any exception of a handler into one that `handler_errors` raises."""
    with handler_errors(context, _log, as_status=as_status):
        try:
            yield
        except pa.ArrowInvalid as error:
            # The stream cannot be decoded. Arrow's message is safe to send: it names no file.
            reason = f"the stream cannot be read: {str(error)[:300]}"
            raise InvalidCommandError(reason) from None


def _handled(handler: Callable[..., Any]) -> Any:
    """Decorator that runs a handler inside `_handling`."""
    as_status = handler.__name__ == "get_schema"

    @wraps(handler)
    def handle(server: Any, context: Any, *args: Any) -> Any:
        with _handling(context, as_status=as_status):
            return handler(server, context, *args)

    return handle


class StoreServer:
    """A store server that listens on two ports, from its construction until `close`.

    Rows are committed and synced to disk before they are acknowledged, and before a DoPut ends.

    Args:
        folder: Folder of the LanceDB tables; created if missing. No other process may write to it.
        host: Address on which both ports listen.
        port: Port for data; 0 selects a free port.
        meta_port: Port for ListFlights, GetFlightInfo and the namespaces; 0 selects a free port.

    Raises:
        ConfigError: A port is taken, or both ports are the same.
        StoreError: The folder cannot be used, or another server uses it.
        SetupError: The server cannot listen on a port.
    """

    def __init__(self, folder: Path, *, host: str, port: int, meta_port: int) -> None:
        if port == meta_port != 0:
            raise ConfigError(
                f"`port` and `meta_port` are both {port}; give each its own", field="meta_port"
            )
        check_port(host, port)
        check_port(host, meta_port, field="meta_port")
        with ExitStack() as undo:
            self._store = undo.enter_context(closing(LanceStore(folder)))
            self._lock = undo.enter_context(_lock_folder(folder))
            self._ingest = Ingest(self._store)
            actions = Actions(self._store, self._ingest, folder)
            self._data = _listen(host, port, lambda at: _DataServer(at, actions))
            undo.callback(self._data.shutdown)
            self.port = self._data.port
            self.address = FlightAddress(host, self.port).uri
            self._meta = _listen(host, meta_port, lambda at: _MetaServer(at, actions, self.address))
            undo.pop_all()
        self.meta_port = actions.meta_port = self._meta.port
        self.meta_address = FlightAddress(host, self.meta_port).uri

    def close(self, timeout_s: float) -> bool:
        """Commit the received rows, refuse new ones, and stop listening.

        Returns:
            False if commits take longer than `timeout_s`, or if a client keeps its call open. All
            acknowledged rows are stored even then.
        """
        committed = self._ingest.close(timeout_s)
        # `shutdown` waits for open calls without a time limit, so each one runs on its own thread.
        deadline = time.monotonic() + END_CALLS_S
        threads = []
        for server in (self._data, self._meta):
            start = partial(start_thread, "shutdown", server.shutdown)
            threads.append(insist(start, "the end of a port"))
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        self._store.close()
        self._lock.release()
        return committed and not any(thread.is_alive() for thread in threads)


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    """Flight calls that both ports answer."""

    def __init__(self, location: str, actions: Actions) -> None:
        self._actions = actions
        self._store = actions.store
        self._handlers = actions.data
        super().__init__(location)

    @_handled
    def do_action(self, context: Any, action: Any) -> list[Any]:
        body = action.body.to_pybytes()
        return action_results(answer_action(self._handlers, action.type, body))

    @_handled
    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        return action_types({name: action.about for name, action in self._handlers.items()})

    @_handled
    def do_get(self, context: Any, ticket: Any) -> flight.FlightDataStream:
        request = DoGetRequest.from_ticket(ticket.ticket)
        if request.search is not None:
            return table_stream(self._actions.search_rows(request.search))
        rows = self._store.scan(
            request.dataset,
            columns=request.columns,
            filters=self._actions.filters_of(request.dataset, request.filters),
            limit=request.limit,
        )
        return generator_stream(rows.schema, _handled_batches(context, rows))

    @_handled
    def get_schema(self, context: Any, descriptor: Any) -> flight.SchemaResult:
        return schema_result(self._named_dataset(descriptor).schema)

    def _named_dataset(self, descriptor: Any) -> DatasetInfo:
        name = descriptor.path[0] if descriptor.path else descriptor.command or b""
        return existing_dataset(self._store, name.decode(errors="replace"))


class _DataServer(_Server):
    """The data port: DoPut, DoExchange, DoGet, DoAction."""

    @_handled
    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        if not descriptor.path:
            raise InvalidCommandError(
                "missing flight descriptor path: give [dataset]", field="dataset"
            )
        dataset = descriptor.path[0].decode(errors="replace")
        check_stored(dataset)
        ingest = self._actions.ingest
        if ingest.pressure(dataset) > SLOW_DOWN_AT:
            notice = {"status": "slow_down", "reason": "wal_pressure"}
            writer.write(json.dumps(notice).encode())
        pending: list[Future[int]] = []
        has_rows = False
        for _, _, done in read_groups(ingest, dataset, reader, context):
            has_rows = True
            pending.append(done)
            while pending and pending[0].done():
                pending.pop(0).result()
        for done in pending:
            done.result()
        if not has_rows:
            check_declared(self._store, dataset, reader.schema)

    @_handled
    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        path = [part.decode(errors="replace") for part in descriptor.path or ()]
        if len(path) == 2 and path[0] == protocol.INGEST:
            check_stored(path[1])
            self._exchange_ingest(context, path[1], reader, writer)
        elif descriptor.command == b"VectorSearch":
            self._exchange_search(reader, writer)
        else:
            raise InvalidCommandError(
                "`descriptor` names neither an ingest nor a search; expected the path "
                f"[{protocol.INGEST!r}, dataset] or the command VectorSearch",
                field="descriptor",
                allowed=[protocol.INGEST, "VectorSearch"],
            )

    @_handled
    def list_flights(self, context: Any, criteria: bytes) -> Iterator[flight.FlightInfo]:
        raise _on_other_port("ListFlights", "data", "meta")

    @_handled
    def get_flight_info(self, context: Any, descriptor: Any) -> flight.FlightInfo:
        raise _on_other_port("GetFlightInfo", "data", "meta")

    def _exchange_ingest(self, context: Any, dataset: str, reader: Any, writer: Any) -> None:
        acks = AckWriter(writer)
        try:
            for batch_id, rows, done in read_groups(self._actions.ingest, dataset, reader, context):
                acks.queue_ack(batch_id, rows, done)
        finally:  # gRPC would end the process if a thread wrote to a call that has ended
            insist(acks.close, "ending a call's acknowledgements")
        if acks.error is not None:
            raise acks.error

    def _exchange_search(self, reader: Any, writer: Any) -> None:
        begun = False
        for chunk in reader:
            if chunk.data is None:
                continue
            for request in _search_requests(chunk.data):
                found = self._actions.search_rows(request).combine_chunks()
                if not begun:
                    writer.begin(found.schema)
                    begun = True
                none = pa.RecordBatch.from_pylist([], schema=found.schema)
                for batch in found.to_batches() or [none]:
                    writer.write_batch(batch)


class _MetaServer(_Server):
    """The meta port: ListFlights, GetFlightInfo, DoGet, DoAction and the namespaces."""

    def __init__(self, location: str, actions: Actions, data_address: str) -> None:
        self._data_address = data_address
        super().__init__(location, actions)
        self._handlers = actions.meta

    @_handled
    def list_flights(self, context: Any, criteria: bytes) -> Iterator[flight.FlightInfo]:
        staged = criteria == protocol.STAGED
        infos = self._store.staged_datasets() if staged else self._store.datasets()
        return flight_list([self._info(info) for info in infos])

    @_handled
    def get_flight_info(self, context: Any, descriptor: Any) -> flight.FlightInfo:
        return self._info(self._named_dataset(descriptor))

    @_handled
    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        raise _on_other_port("DoPut", "meta", "data")

    @_handled
    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        raise _on_other_port("DoExchange", "meta", "data")

    def _info(self, info: DatasetInfo) -> flight.FlightInfo:
        endpoint = flight.FlightEndpoint(info.name.encode(), [self._data_address])
        return flight_info(info.schema, info.name, info.num_rows, info.num_bytes or -1, [endpoint])


def _on_other_port(call: str, port: str, other: str) -> UnsupportedCallError:
    return UnsupportedCallError(f"{call} is not supported on the {port} port; use the {other} port")


def _search_requests(batch: pa.RecordBatch) -> Iterator[SearchRequest]:
    """The searches in a batch of a VectorSearch exchange, one for each row."""
    for name in ("dataset", "query_vector"):
        if name not in batch.schema.names:
            raise UnknownColumnError(
                f"VectorSearch needs the column `{name}`; got "
                f"{', '.join(batch.schema.names)[:300]}",
                field=name,
                allowed=["dataset", "k", "ef", "query_vector", "score"],
            )
    for row in batch.to_pylist():
        query = row["query_vector"]
        is_multi = bool(query) and isinstance(query[0], list)
        fields = {"dataset": row["dataset"], "token_vectors" if is_multi else "vector": query}
        fields |= {one: row[one] for one in ("k", "score") if row.get(one) is not None}
        yield convert_request(SearchRequest, fields, "a row of VectorSearch")


def _lock_folder(folder: Path) -> FileLock:
    try:
        return FileLock(folder / ".lock")  # cannot be a dataset's lock, because datasets have names
    except BlockingIOError:
        raise StoreError(
            f"the folder {folder} is served by another `fletcher store`; use that server, or "
            "choose another `path`",
            field="path",
        ) from None
    except OSError as error:
        raise StoreError(
            f"the folder {folder} cannot be locked: {error.strerror}", field="path"
        ) from None


def _handled_batches(context: Any, rows: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with _handling(context):
        yield from rows


def _listen(host: str, port: int, make: Callable[[str], Any]) -> Any:
    try:
        return make(FlightAddress(host, port).uri)
    except (pa.ArrowException, OSError) as error:
        raise SetupError(
            f"`port` {port} on {host} cannot be listened on: it is taken, or the address is not "
            "one of this machine; choose another, or 0 for a free one",
            field="port",
        ) from error
