"""Vectors back by DoExchange: one thread writes, one reads, the caller iterates."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.client.connection import Connection, descriptor
from fletcher.client.messages import Message, RowError, row_errors
from fletcher.core.command import EmbedCommand
from fletcher.errors import (
    DeadlineExceededError,
    FletcherError,
    InternalError,
    UnavailableError,
    from_json,
)
from fletcher.net.flight_errors import from_flight_error

# What waits for the caller, besides one batch of any size; more waits in the server, which stops
# reading then.
_MAX_WAITING = 4
_MAX_WAITING_BYTES = 16 << 20
_CLOSE_TIMEOUT_S = 5.0
# How long a thread may take to leave a call that failed, for another to begin; one that is in the
# caller's input may never.
_LEAVE_TIMEOUT_S = 2.0
_LOOK_S = 0.05


class _WriteError(Exception):
    def __init__(self, error: FletcherError) -> None:
        super().__init__(error.message)
        self.error = error


class Exchange:
    """An iterator over batches with vectors: one for each batch that was sent, in their order.

    Batches larger than `TransferOptions.message_bytes` travel in pieces, which are joined again: a
    whole batch of vectors is held. Batches without rows are left out. With
    `EmbedCommand.continuous` there is a batch whenever chunks are complete instead. Leaving it
    early, by `close` or at the end of `with`, cancels the call. When the server fails, answers that
    it sent shortly before may be lost: gRPC drops them.

    Where the server refuses for now, goes, or is away, before its first answer, the exchange begins
    anew, up to `max_retries` times: until then what was sent is kept, if it is no more than
    `window_bytes`.

    Attributes:
        errors: Why rows of the batch last returned have a null vector, in the order of rows; at
            most the first 1,000 of each piece.

    Args:
        connection: To the server.
        schema: Of what is sent.
        outgoing: What is sent; read in a thread of its own.
        options: What to do with the text.
    """

    def __init__(
        self,
        connection: Connection,
        schema: pa.Schema,
        outgoing: Iterator[Message],
        options: EmbedCommand,
    ) -> None:
        self.errors: tuple[RowError, ...] = ()
        self._connection = connection
        self._options = options
        self._input_schema = schema
        self._messages = outgoing
        self._in_input = False
        self._left = False  # by a caller who does not wait for the input
        self._kept: list[Message] | None = []  # to be sent again; None: the call cannot begin anew
        self._kept_bytes = 0
        self._num_retries = 0
        self._changed = threading.Condition()
        self._waiting: deque[tuple[pa.RecordBatch, tuple[RowError, ...]]] = deque()
        self._schema: pa.Schema | None = None
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        """Begins the call."""
        self._last_pieces: set[int] = set()  # `batch_id`s on the wire that end a batch of the input
        self._num_rows: dict[int, int] = {}  # of messages that wait for their answer, by `batch_id`
        self._rows_sent = 0
        self._rows_answered = 0
        self._all_sent = False
        self._written = False  # the writing thread is done, whether it sent all or not
        self._failure: BaseException | None = None
        self._read_all = False
        self._last_activity = time.monotonic()
        self._writer: Any = None
        self._reader: Any = None
        self._threads: list[threading.Thread] = []
        try:
            with self._connection.errors():
                self._writer, self._reader = self._connection.flight.do_exchange(
                    descriptor(self._options), self._connection.stream_options()
                )
        except UnavailableError as error:  # nobody is there now: a call that gave no answer
            self._failure = error
            self._written = self._read_all = True
            return
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("exchange-write", self._write), ("exchange-read", self._read))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def schema(self) -> pa.Schema:
        """The output's schema; waits for the first answer."""
        self._wait(lambda: self._schema is not None)
        if self._schema is None:
            raise InternalError(f"{self._connection.address} ended the exchange without a schema")
        return self._schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self

    def __next__(self) -> pa.RecordBatch:
        """The next batch.

        Raises:
            FletcherError: The server refused or failed; DeadlineExceededError where it owes an
                answer for `stall_timeout_s`.
            Exception: What the input raised.
        """
        if self._closed:
            raise StopIteration
        self._wait(lambda: bool(self._waiting))
        with self._changed:
            if self._waiting:
                if not self._has_room():
                    # The server was not heard because the caller took its time.
                    self._last_activity = time.monotonic()
                batch, self.errors = self._waiting.popleft()
                self._changed.notify_all()
                return batch
            # The server may end the call a moment before the writing thread knows that it sent all.
            self._changed.wait_for(lambda: self._written, _CLOSE_TIMEOUT_S)
            complete = self._all_sent and self._rows_answered == self._rows_sent
            if self._failure is None and not complete:
                self._failure = UnavailableError(
                    f"{self._connection.address} ended the exchange after {self._rows_answered} of "
                    f"{self._rows_sent} rows"
                )
        self.close()
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the call, cancelling what is not done. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            finished = self._read_all and self._all_sent and self._failure is None
        self._end(_CLOSE_TIMEOUT_S, cancel=not finished, leave_input=True)

    def _end(self, timeout_s: float, *, cancel: bool, leave_input: bool = False) -> bool:
        """Ends the call; False where a thread of it has not ended, such as one in the input.

        With `leave_input` that one is not waited for: it ends when the input has something for it.
        """
        if self._reader is None:
            return True
        if cancel:
            self._reader.cancel()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            while thread.is_alive() and time.monotonic() < deadline:
                if leave_input and self._in_input and thread is self._threads[0]:
                    with self._changed:
                        self._left = not self._written
                    break
                thread.join(min(_LOOK_S, max(0.0, deadline - time.monotonic())))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._close_writer()
        return True

    def _close_writer(self) -> None:
        """Else pyarrow does it on deletion, and prints what the call ended with."""
        with suppress(FletcherError), self._connection.errors():
            self._writer.close()

    def _begin_anew(self, failure: BaseException) -> bool:
        """Whether the call begins again, after a pause: it failed for now and gave no answer."""
        transfer = self._connection.transfer
        if not isinstance(failure, UnavailableError) or self._num_retries >= transfer.max_retries:
            return False
        with self._changed:
            if self._kept is None or self._closed:
                return False
        if not self._end(_LEAVE_TIMEOUT_S, cancel=True):
            return False
        self._num_retries += 1
        with self._changed:
            if self._kept is None or self._changed.wait_for(
                lambda: self._closed, self._connection.retry_delay_s(self._num_retries, failure)
            ):
                return False
            self._messages = itertools.chain(self._kept, self._messages)
            self._kept, self._kept_bytes = [], 0
        self._begin()
        return True

    def _wait(self, done: Callable[[], bool]) -> None:
        """Waits until `done`, or the call has ended; raises what ended it."""
        timeout_s = self._connection.transfer.stall_timeout_s
        while True:
            with self._changed:
                if done():
                    return
                if self._failure is None and self._read_all:
                    return
                failure = self._failure
                if failure is None:
                    owes = bool(self._num_rows) or self._all_sent
                    left = self._last_activity + timeout_s - time.monotonic()
                    if owes and left <= 0:
                        failure = self._failure = DeadlineExceededError(
                            f"{self._connection.address} has answered nothing for {timeout_s:g} s"
                        )
                    else:
                        # Woken by every change; by the clock while an answer is owed.
                        self._changed.wait(left if owes else timeout_s)
                        continue
            if not self._begin_anew(failure):
                self.close()
                raise failure

    def _write(self) -> None:
        try:
            write = self._connection.write_options(self._first_batch())
            self._call(lambda: self._writer.begin(self._input_schema, options=write))
            for message in iter(self._next, None):
                with self._changed:
                    self._keep(message)
                    if self._closed or self._failure is not None:
                        break
                    if not self._num_rows:
                        self._last_activity = time.monotonic()
                    self._rows_sent += message.batch.num_rows
                    self._num_rows[message.batch_id] = message.batch.num_rows
                    if message.last:
                        self._last_pieces.add(message.batch_id)
                    self._changed.notify_all()
                self._call(self._writer.write_with_metadata, message.batch, message.metadata())
            else:
                self._call(self._writer.done_writing)
                with self._changed:
                    self._all_sent = True
                    self._last_activity = time.monotonic()
                    self._changed.notify_all()
        except _WriteError as failed:
            # A write fails because the call has ended, and the reader then knows why.
            with self._changed:
                self._changed.wait_for(lambda: self._read_all, _CLOSE_TIMEOUT_S)
            self._fail(failed.error)
        except BaseException as error:  # noqa: BLE001 - the caller's input raised: it gets it back
            with self._changed:
                self._kept = None
            self._fail(error)
            self._reader.cancel()
        with self._changed:
            self._written = True
            self._changed.notify_all()
        if self._left:
            self._close_writer()

    def _next(self) -> Message | None:
        """The next of what is sent; waits for the caller's input."""
        self._in_input = True
        try:
            return next(self._messages, None)
        finally:
            self._in_input = False

    def _first_batch(self) -> pa.RecordBatch | None:
        """What the call will begin with, where its compression depends on that."""
        if not self._connection.measures:
            return None
        first = self._next()
        if first is None:
            return None
        self._messages = itertools.chain([first], self._messages)
        return first.batch

    def _keep(self, message: Message) -> None:
        """Keeps what is sent, in case that the call begins anew; the lock is held."""
        if self._kept is not None:
            self._kept.append(message)
            self._kept_bytes += message.num_bytes
            if self._kept_bytes > self._connection.transfer.window_bytes:
                self._kept = None

    def _call(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            with self._connection.errors():
                write(*arguments)
        except FletcherError as error:
            raise _WriteError(error) from None

    def _read(self) -> None:
        try:
            self._read_batches()
        except Exception as exc:  # noqa: BLE001 - of a thread: handed to the caller's
            self._fail(from_flight_error(exc, self._connection.address))
        with self._changed:
            self._read_all = True
            self._changed.notify_all()

    def _read_batches(self) -> None:
        expected = 0
        parts: list[pa.RecordBatch] = []
        errors: tuple[RowError, ...] = ()
        while True:
            try:
                chunk = self._reader.read_chunk()
            except StopIteration:
                if self._schema is None:
                    self._learn_schema()
                return
            if chunk.data is None:
                _raise_failure(chunk.app_metadata)
                continue
            if self._schema is None:
                self._learn_schema()
            batch_id, found, last = _answer(chunk.app_metadata)
            if batch_id not in (None, expected):
                raise InternalError(
                    f"the server answered batch {batch_id} where batch {expected} was due"
                )
            parts.append(chunk.data)
            errors += found
            with self._changed:
                self._kept = None
                self._last_activity = time.monotonic()
                whole = False
                # Of none that waits is what the end of the input completed.
                if last is not False and expected in self._num_rows:
                    num_rows = self._num_rows.pop(expected)
                    self._rows_answered += chunk.data.num_rows if last is None else num_rows
                    whole = expected in self._last_pieces
                    self._last_pieces.discard(expected)
                    expected += 1
            if self._options.continuous:
                parts, whole = [chunk.data], chunk.data.num_rows > 0
            if whole:
                batch = pa.concat_batches(parts) if len(parts) > 1 else parts[0]
                parts = []
                if not self._hand_over(batch, errors):
                    return
                errors = ()

    def _learn_schema(self) -> None:
        """Takes the output's schema.

        Not before the first message: asking for it would pass over what says that the call failed.
        """
        try:
            schema = self._reader.schema
        except flight.FlightInternalError as error:
            if str(error).startswith("Server never sent a data message"):
                return  # it ended the call well and without an answer
            raise
        with self._changed:
            self._schema = schema
            self._changed.notify_all()

    def _hand_over(self, batch: pa.RecordBatch, errors: tuple[RowError, ...]) -> bool:
        """Queues a batch for the caller, and waits for room for the next; False: it left."""
        with self._changed:
            self._waiting.append((batch, errors))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._has_room())
            return not self._closed

    def _has_room(self) -> bool:
        num_bytes = sum(batch.get_total_buffer_size() for batch, _ in self._waiting)
        return len(self._waiting) < _MAX_WAITING and num_bytes < _MAX_WAITING_BYTES

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


def _raise_failure(metadata: pa.Buffer | None) -> None:
    """Raises what a message without a batch tells, before the call ends.

    It may wait for us to send; and pyarrow may abort the process where a call that one thread reads
    ends while another writes. Here it is cancelled, when the thread that reads has left it.
    """
    failure = from_json(metadata.to_pybytes()) if metadata is not None else None
    if failure is not None:
        raise failure


def _answer(metadata: pa.Buffer | None) -> tuple[int | None, tuple[RowError, ...], bool | None]:
    """The `batch_id` and errors that came with a batch; whether it ends its batch, if it may not.

    Where rows are chunks, a batch is answered by any number of messages.
    """
    if metadata is None:
        return None, (), None
    try:
        fields = json.loads(metadata.to_pybytes())
        found = row_errors(fields.get("errors", []))
        return fields.get("batch_id"), found, fields.get("last")
    except (ValueError, AttributeError):
        raise InternalError("the server sent a batch with metadata that is not JSON") from None
