"""Sending of rows to a Flight store: one call per append."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import InternalError, StoreUnavailableError, from_json
from fletcher.net.flight_errors import store_error
from fletcher.stores import protocol
from fletcher.stores.flight.connection import FAILURES, FlightConnection, store_call


class NotIngestError(Exception):
    """The store answered a DoExchange without storing: it has no acknowledged ingest."""


def cut_rows(rows: pa.RecordBatch, message_bytes: int) -> list[pa.RecordBatch]:
    """Cut rows into slices of about `message_bytes`, without a copy; at least one."""
    step = max(1, rows.num_rows * message_bytes // max(rows.nbytes, 1))
    return [rows.slice(first, step) for first in range(0, max(rows.num_rows, 1), step)]


class IngestCall:
    """An open DoExchange call, after its rows were acknowledged. Not thread-safe."""

    def __init__(self, writer: Any, reader: Any, what: str) -> None:
        self._writer = writer
        self._reader = reader
        self._what = what

    def end(self) -> None:
        """End the call.

        Raises:
            StoreUnavailableError: The store ended it before.
        """
        with store_call(self._what):
            try:
                self._writer.done_writing()
                with contextlib.suppress(StopIteration):
                    _next_ack(self._reader)  # raises the cause if the store ended the call
                self._writer.close()
            finally:
                _end_call(self._writer)

    def __del__(self) -> None:
        self._reader.cancel()  # else the end of a call that is still open waits for the store
        _end_call(self._writer)


def exchange_rows(
    connection: FlightConnection,
    dataset: str,
    messages: Sequence[pa.RecordBatch],
    metadata: bytes | None = None,
    *,
    await_first: bool = False,
    held_s: float = 0.0,
) -> IngestCall:
    """Send rows by DoExchange and wait for the acknowledgement of every message.

    Args:
        connection: Connection to the store.
        dataset: Dataset that receives the rows.
        messages: Rows to send; at least one message.
        metadata: Sent with every message.
        await_first: Wait for the first message's acknowledgement before sending the second message.
            A store without acknowledged ingest sends another answer and ends the call. That answer
            would be lost if more messages were being sent.
        held_s: Time for which the call may stay open after the last acknowledgement.

    Raises:
        NotIngestError: The store has no acknowledged ingest; nothing is stored.
        StoreUnavailableError: The store failed or stalled; some rows may be stored.
        RequestError: The store refuses the rows.
    """
    what = f"writing to dataset `{dataset}`"
    descriptor = flight.FlightDescriptor.for_path(protocol.INGEST, dataset)
    with store_call(what):
        write = connection.compression.options(messages[0])
        options = connection.call_options(held_s=held_s)
        writer, reader = connection.data_client.do_exchange(descriptor, options)
        try:
            _exchange_messages(
                writer, reader, messages, metadata, write, what=what, await_first=await_first
            )
        except BaseException as error:
            reader.cancel()  # else closing the call may wait for the store
            _end_call(writer)
            if isinstance(error, pa.ArrowNotImplementedError):
                raise NotIngestError from error
            raise
    return IngestCall(writer, reader, what)


def _exchange_messages(
    writer: Any,
    reader: Any,
    messages: Sequence[pa.RecordBatch],
    metadata: bytes | None,
    write: pa.ipc.IpcWriteOptions,
    *,
    what: str,
    await_first: bool,
) -> None:
    sent: list[int] = []
    acked = 0
    broken = False
    try:
        # Unlike DoPut's, this writer takes no options from the call.
        writer.begin(messages[0].schema, options=write)
        for message in messages:
            sent.append(message.num_rows)
            if metadata is None:
                writer.write_batch(message)
            else:
                writer.write_with_metadata(message, metadata)
            if await_first and not acked:
                _await_acks(reader, sent, what)
                acked = 1
    except FAILURES:
        broken = True  # if the call has ended, the next read raises the cause
        _end_rows(writer)
    _await_acks(reader, sent[acked:], what)
    if broken:
        with contextlib.suppress(StopIteration):
            _next_ack(reader)  # raises the cause if no message was sent
        raise _ended_early(what)


def put_rows(
    connection: FlightConnection, dataset: str, messages: Sequence[pa.RecordBatch]
) -> bool:
    """Send rows by DoPut, which confirms only that the store received them.

    A message without rows declares the columns: Longbow checks their types and stores nothing.

    Returns:
        Whether the store asks to slow down because its write-ahead log is nearly full.

    Raises:
        StoreUnavailableError: The store failed or stalled; some rows may be stored.
        RequestError: The store refuses the rows.
    """
    what = f"writing to dataset `{dataset}`"
    with store_call(what):
        options = connection.call_options(connection.compression.options(messages[0]))
        descriptor = flight.FlightDescriptor.for_path(dataset)
        writer, answers = connection.data_client.do_put(descriptor, messages[0].schema, options)
        try:
            broken = slow_down = False
            try:
                for message in messages:
                    if message.num_rows:
                        writer.write_batch(message)
                writer.done_writing()
            except FAILURES:
                broken = True  # `close` raises the cause
                _end_rows(writer)
            while (answer := answers.read()) is not None:
                slow_down = slow_down or b"slow_down" in answer.to_pybytes()
            writer.close()
            if broken:
                raise _ended_early(what)
        finally:
            _end_call(writer)
    return slow_down


def _await_acks(reader: Any, sent: list[int], what: str) -> None:
    """Read one acknowledgement per message; `sent` has the messages' numbers of rows."""
    for number, rows in enumerate(sent):
        try:
            answer = _next_ack(reader)
        except StopIteration:
            raise StoreUnavailableError(
                f"the store ended the call while {what}: {number} of {len(sent)} messages were "
                "acknowledged"
            ) from None
        status = answer.get("status")
        if not isinstance(status, str):  # the rows may be stored, so they must not be put again
            raise StoreUnavailableError(f"the store's answer cannot be read, while {what}")
        if status == "error":
            error = from_json(json.dumps(answer)) or InternalError("it gave no reason")
            raise store_error(error, what)
        if status != "acked":
            raise NotIngestError
        if answer.get("rows") != rows:
            raise StoreUnavailableError(
                f"the store acknowledged {answer.get('rows')} rows of {rows} while {what}"
            )


def _next_ack(reader: Any) -> dict[str, Any]:
    while True:
        chunk = reader.read_chunk()
        if chunk.app_metadata is not None and chunk.app_metadata.size:
            try:
                answer = json.loads(chunk.app_metadata.to_pybytes())
            except (ValueError, RecursionError):
                answer = {}
            return answer if isinstance(answer, dict) else {}


def _ended_early(what: str) -> StoreUnavailableError:
    return StoreUnavailableError(f"the store ended the call while {what}")


def _end_rows(writer: Any) -> None:
    """End the rows of a call after an error.

    If the error is local, the store still waits for more rows.
    """
    with contextlib.suppress(*FAILURES):
        writer.done_writing()


def _end_call(writer: Any) -> None:
    """Close a call that may have failed, before Arrow's destructor logs an error."""
    with contextlib.suppress(*FAILURES):
        writer.close()
