"""Writing to a Flight store: one call an append, with a deadline, acknowledged where possible."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import flight

from fletcher.core.schema import parse_batch_key
from fletcher.errors import (
    InternalError,
    StoreUnavailableError,
    from_json,
)
from fletcher.net.flight_errors import from_store_error, store_error
from fletcher.stores import wire
from fletcher.stores.base import Filter, WriteMode
from fletcher.stores.longbow import longbow_batch, without_stored
from fletcher.stores.schemas import check_compatible, conform

_log = logging.getLogger(__name__)

_FAILURES = (pa.ArrowException, flight.FlightError, OSError)


class _Connection(Protocol):
    """Where writers send to."""

    def client(self) -> flight.FlightClient: ...
    def options(self, write: pa.ipc.IpcWriteOptions | None = None) -> flight.FlightCallOptions: ...
    def write_options(self, first: pa.RecordBatch) -> pa.ipc.IpcWriteOptions: ...


class FletcherWriter:
    """Writes to a store server of Fletcher's; see `DatasetWriter`. One thread owns it.

    An append travels as one group, which the server commits whole or not at all.
    """

    def __init__(
        self,
        store: _Connection,
        dataset: str,
        schema: pa.Schema,
        mode: WriteMode,
    ) -> None:
        self._store = store
        self._dataset = dataset
        self._schema = schema
        self._mode: WriteMode = mode

    def begin(self) -> None:
        """Creates the dataset, or empties it, or has its schema checked.

        Raises:
            RequestError: The dataset does not take rows of this schema.
            StoreUnavailableError: The store does not answer.
        """
        self._send([pa.RecordBatch.from_pylist([], schema=self._schema)], self._mode)
        # Emptied once; what follows is appended.
        self._mode = "upsert" if self._mode == "upsert" else "append"

    def append(self, batches: Sequence[pa.RecordBatch]) -> bool:
        """See `DatasetWriter.append`."""
        for batch in batches:
            check_compatible(self._dataset, self._schema, batch.schema)
        rows = [conform(batch, self._schema) for batch in batches if batch.num_rows]
        if rows:
            self._send([pa.concat_batches(rows)], self._mode)
        return False

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        """See `DatasetWriter.missing_keys`."""
        body = {"dataset": self._dataset, "batch_keys": list(batch_keys)}
        action = flight.Action(wire.MISSING_KEYS, json.dumps(body).encode())
        try:
            results = list(self._store.client().do_action(action, self._store.options()))
            return list(json.loads(results[0].body.to_pybytes())["missing"])
        except _FAILURES as error:
            what = f"asking what dataset `{self._dataset}` holds"
            raise from_store_error(error, what) from error

    def close(self) -> None:
        """See `DatasetWriter.close`. Every append was a call of its own, so nothing is open."""

    def _send(self, batches: list[pa.RecordBatch], mode: WriteMode) -> None:
        group = {"group_rows": sum(batch.num_rows for batch in batches), "mode": mode}
        exchange(self._store, self._dataset, batches, json.dumps(group).encode())


class _Reader(_Connection, Protocol):
    """What a LongbowWriter needs of its store."""

    def count_keys(self, dataset: str, filters: Sequence[Filter]) -> Counter[str]: ...


class NotIngestError(Exception):
    """The store answered a DoExchange without storing: it has no acknowledged ingest."""


class LongbowWriter:
    """Writes to a Longbow; see `DatasetWriter`. One thread owns it.

    Rows go by its acknowledged DoExchange, or by DoPut where a store has none. Longbow appends
    whatever comes, so after a doubtful send `missing_keys` reads back how many rows of a key are
    there, and the next `append` of that key sends only the rest.

    Args:
        store: Where to send and ask.
        dataset: Created on the first append.
        schema: As `longbow_schema` gives it.
    """

    def __init__(self, store: _Reader, dataset: str, schema: pa.Schema) -> None:
        self._store = store
        self._dataset = dataset
        self._schema = schema
        self._stored: Counter[str] = Counter()
        self._use_put = False
        self._proven = False

    def append(self, batches: Sequence[pa.RecordBatch]) -> bool:
        """See `DatasetWriter.append`. A failure may leave the first rows of a group stored."""
        stored = self._stored.copy()
        rows = [
            longbow_batch(without_stored(batch, stored), self._schema)
            for batch in batches
            if batch.num_rows
        ]
        rows = [batch for batch in rows if batch.num_rows]
        slow_down = bool(rows) and self._send([pa.concat_batches(rows)])
        for batch in batches:
            for key in batch.column("batch_key").unique().to_pylist() if self._stored else ():
                self._stored.pop(key, None)
        return slow_down

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        """See `DatasetWriter.missing_keys`. Reads the rows back, a call a key."""
        missing = []
        for key in batch_keys:
            counts = self._store.count_keys(self._dataset, [Filter("batch_key", "=", key)])
            parsed = parse_batch_key(key)
            # Rows without a vector were never sent, so a group may be whole with fewer rows: it
            # counts as missing, and its next append finds nothing left to send.
            if parsed is None or counts[key] < parsed[2] - parsed[1] + 1:
                self._stored[key] = counts[key]
                missing.append(key)
        return missing

    def close(self) -> None:
        """See `DatasetWriter.close`. Every append was a call of its own, so nothing is open."""

    def _send(self, batches: list[pa.RecordBatch]) -> bool:
        if not self._use_put:
            try:
                exchange(self._store, self._dataset, batches, None, probe=not self._proven)
            except NotIngestError:
                _log.info("the store has no acknowledged ingest; rows go by DoPut")
                self._use_put = True
            else:
                self._proven = True
                return False
        return put(self._store, self._dataset, batches)


def exchange(
    store: _Connection,
    dataset: str,
    batches: Sequence[pa.RecordBatch],
    metadata: bytes | None,
    *,
    probe: bool = False,
) -> None:
    """Sends rows by DoExchange and waits for the acknowledgement of every message.

    Args:
        store: Where to.
        dataset: Where the rows go.
        batches: At least one; sliced into messages.
        metadata: Sent with every message.
        probe: Wait for the first message's acknowledgement before the second is sent. A store
            without this way of ingest answers something else and ends the call, and that answer
            is lost where more is being sent.

    Raises:
        NotIngestError: The store does not ingest this way; nothing is stored.
        StoreUnavailableError: It failed or stalled; some rows may be stored.
        RequestError: It refuses the rows.
    """
    what = f"writing to dataset `{dataset}`"
    descriptor = flight.FlightDescriptor.for_path(wire.INGEST, dataset)
    try:
        write = store.write_options(batches[0])
        writer, reader = store.client().do_exchange(descriptor, store.options())
    except _FAILURES as error:
        raise from_store_error(error, what) from error
    try:
        sent: list[int] = []
        acked = 0
        broken = False
        try:
            # Unlike DoPut's, this writer takes no options from the call.
            writer.begin(batches[0].schema, options=write)
            for message in _messages(batches):
                sent.append(message.num_rows)
                if metadata is None:
                    writer.write_batch(message)
                else:
                    writer.write_with_metadata(message, metadata)
                if probe and not acked:
                    _await_acks(reader, sent, what)
                    acked = 1
            writer.done_writing()
        except _FAILURES:
            # Says only that the call is over; what is read next says why.
            broken = True
        _await_acks(reader, sent[acked:], what)
        if broken:
            with contextlib.suppress(StopIteration):
                _next_ack(reader)  # where not one message went out, only this says why
            raise StoreUnavailableError(f"the store ended the call while {what}", field="store")
        writer.close()
    except pa.ArrowNotImplementedError as error:
        raise NotIngestError from error
    except _FAILURES as error:
        raise from_store_error(error, what) from error
    finally:
        _let_go(writer)


def _await_acks(reader: Any, sent: list[int], what: str) -> None:
    for number, rows in enumerate(sent):
        try:
            answer = _next_ack(reader)
        except StopIteration:
            raise StoreUnavailableError(
                f"the store ended the call while {what}: {number} of {len(sent)} messages were "
                "acknowledged",
                field="store",
            ) from None
        if answer.get("status") == "error":
            error = from_json(json.dumps(answer)) or InternalError("it gave no reason")
            raise store_error(error, what)
        if answer.get("status") != "acked":
            raise NotIngestError
        if answer.get("rows") != rows:
            raise StoreUnavailableError(
                f"the store acknowledged {answer.get('rows')} rows of {rows} while {what}",
                field="store",
            )


def _next_ack(reader: Any) -> dict[str, Any]:
    while True:
        chunk = reader.read_chunk()
        if chunk.app_metadata is not None and chunk.app_metadata.size:
            try:
                answer = json.loads(chunk.app_metadata.to_pybytes())
            except ValueError:
                answer = {}
            return answer if isinstance(answer, dict) else {}


def put(store: _Connection, dataset: str, batches: Sequence[pa.RecordBatch]) -> bool:
    """Sends rows by DoPut; a return means that the store took them, no more.

    Returns:
        Whether the store asks to slow down: its write-ahead log is nearly full.

    Raises:
        StoreUnavailableError: The store failed or stalled; some rows may be stored.
        RequestError: It refuses the rows.
    """
    what = f"writing to dataset `{dataset}`"
    try:
        options = store.options(store.write_options(batches[0]))
        writer, answers = store.client().do_put(
            flight.FlightDescriptor.for_path(dataset), batches[0].schema, options
        )
    except _FAILURES as error:
        raise from_store_error(error, what) from error
    try:
        broken = slow_down = False
        try:
            for message in _messages(batches):
                writer.write_batch(message)
            writer.done_writing()
        except _FAILURES:
            broken = True  # `close` says why
        while (answer := answers.read()) is not None:
            slow_down = slow_down or b"slow_down" in answer.to_pybytes()
        writer.close()
        if broken:
            raise StoreUnavailableError(f"the store ended the call while {what}", field="store")
    except _FAILURES as error:
        raise from_store_error(error, what) from error
    finally:
        _let_go(writer)
    return slow_down


def _let_go(writer: Any) -> None:
    """Ends a call that may have failed; left to its destructor, Arrow says so on standard error."""
    with contextlib.suppress(*_FAILURES):
        writer.close()


def _messages(batches: Sequence[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield from wire.slices(batch)
