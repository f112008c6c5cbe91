"""One DoExchange call: a thread writes messages, another reads answers."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.client.connection import Connection, descriptor
from fletcher.client.messages import Message, RowError
from fletcher.core.command import EmbedCommand
from fletcher.errors import FletcherError, InternalError, UnavailableError, from_json
from fletcher.net.flight_errors import from_flight_error

Answer = tuple[pa.RecordBatch, tuple[RowError, ...]]

_JOIN_TICK_S = 0.05


class ExchangeInput:
    """The caller's messages, kept until the first answer in case of a retry.

    Methods are called on a call's writing thread. `forget`, `can_rewind` and `rewind` may be called
    on any thread that holds the exchange's lock.
    """

    def __init__(self, messages: Iterator[Message], max_kept_bytes: int) -> None:
        self.is_waiting = False  # whether the writing thread is inside the caller's iterator
        self._messages = messages
        self._max_kept_bytes = max_kept_bytes  # once more than this was sent, nothing is kept
        self._kept: list[Message] | None = []
        self._kept_bytes = 0

    def next_message(self) -> Message | None:
        """The next message, None at the end; blocks as long as the caller's iterator does."""
        self.is_waiting = True
        try:
            return next(self._messages, None)
        finally:
            self.is_waiting = False

    def peek_batch(self) -> pa.RecordBatch | None:
        """The batch of the next message, which `next_message` still returns."""
        first = self.next_message()
        if first is None:
            return None
        self._messages = itertools.chain([first], self._messages)
        return first.batch

    def keep_message(self, message: Message) -> None:
        """Keep a message that is about to be sent."""
        if self._kept is not None:
            self._kept.append(message)
            self._kept_bytes += message.num_bytes
            if self._kept_bytes > self._max_kept_bytes:
                self._kept = None

    def forget(self) -> None:
        """Drop the kept messages: they must not be sent again."""
        self._kept = None

    @property
    def can_rewind(self) -> bool:
        """Whether every message that was sent is kept."""
        return self._kept is not None

    def rewind(self) -> None:
        """Put the kept messages back in front of the messages to come."""
        self._messages = itertools.chain(self._kept or (), self._messages)
        self._kept, self._kept_bytes = [], 0


class ExchangeCall:
    """One call, from construction to `end_call`.

    `changed` guards the attributes and is notified on every change. If the server is unavailable,
    `failure` is set from the start.
    """

    def __init__(
        self,
        connection: Connection,
        options: EmbedCommand,
        schema: pa.Schema,
        outgoing: ExchangeInput,
        changed: threading.Condition,
    ) -> None:
        self.answers: deque[Answer] = deque()  # answers that wait for the caller
        self.schema: pa.Schema | None = None  # the output's schema, after the first answer
        self.failure: BaseException | None = None  # why the call ended, or must end
        self.finished_reading = False  # no more answers will arrive
        self.all_sent = False  # the server has the whole input
        # Monotonic time, in seconds, of the last answer or of the message that awaits one.
        self.last_activity = time.monotonic()
        self.threads: list[threading.Thread] = []
        self._connection = connection
        self._limits = connection.limits
        self._continuous = options.continuous
        self._one_row_each = True  # whether each row is answered by one row, not by chunks
        self._input_schema = schema
        self._outgoing = outgoing
        self._changed = changed
        self._stopping = False
        self._finished_writing = False  # even if not all was sent
        self._closes_writer = False  # whether the writing thread closes the writer
        self._rows_pending: dict[int, int] = {}  # rows of unanswered messages, by `batch_id`
        self._final_ids: set[int] = set()  # `batch_id`s of messages that end a batch of the input
        self._rows_sent = 0
        self._rows_answered = 0
        self._writer: Any = None
        self._reader: Any = None
        try:
            with connection.errors():
                accepting = replace(options, accept_compression=("lz4", "zstd"))
                self._writer, self._reader = connection.flight.do_exchange(
                    descriptor(accepting), connection.stream_options()
                )
        except UnavailableError as error:
            self.failure = error
            self._finished_writing = self.finished_reading = True
            return
        self.threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("exchange-write", self._write), ("exchange-read", self._read))
        ]
        for thread in self.threads:
            thread.start()

    def take_answer(self) -> Answer | None:
        """Take the next complete batch and its errors; None: no batch is complete yet."""
        if not self.answers:
            return None
        if not self._has_room():
            # The reading thread paused because the caller took its time.
            self.last_activity = time.monotonic()
        answer = self.answers.popleft()
        self._changed.notify_all()
        return answer

    def seconds_to_stall(self, timeout_s: float) -> float | None:
        """Seconds left for the next answer; None: the server owes no answer now."""
        if not self._rows_pending and not self.all_sent:
            return None
        return self.last_activity + timeout_s - time.monotonic()

    def outcome(self) -> BaseException | None:
        """Failure of a call whose answers have ended; None if the call is complete."""
        # The server may end the call just before the writing thread notes that all was sent.
        self._changed.wait_for(lambda: self._finished_writing, self._limits.close_s)
        if self.failure is None and not (self.all_sent and self._rows_answered == self._rows_sent):
            self.failure = UnavailableError(
                f"{self._connection.address} ended the exchange after {self._rows_answered} of "
                f"{self._rows_sent} rows"
            )
        return self.failure

    def stop(self) -> None:
        """Ask both threads to end; `end_call` waits for them. Called without the lock."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def end_call(self, timeout_s: float, *, cancel: bool, leave_input: bool = False) -> bool:
        """End the call; return whether both threads ended. Called without the lock.

        Args:
            timeout_s: Longest wait for the threads.
            cancel: Whether to cancel the call, because the server may still be working.
            leave_input: Whether to stop waiting for a thread that is inside the caller's iterator.
        """
        if self._reader is None:
            return True
        if cancel:
            self._reader.cancel()
        deadline = time.monotonic() + timeout_s
        for thread in self.threads:
            while thread.is_alive() and time.monotonic() < deadline:
                if leave_input and self._outgoing.is_waiting and thread is self.threads[0]:
                    with self._changed:
                        self._closes_writer = not self._finished_writing
                    break
                thread.join(min(_JOIN_TICK_S, max(0.0, deadline - time.monotonic())))
        if any(thread.is_alive() for thread in self.threads):
            return False
        self._close_writer()
        return True

    def _close_writer(self) -> None:
        """Close the writer; if it were only deleted, pyarrow would print its error."""
        with suppress(FletcherError), self._connection.errors():
            self._writer.close()

    def _write(self) -> None:
        try:
            self._write_messages()
        except _WriteError as failed:
            # A write fails because the call has ended, and the reading thread then learns why.
            with self._changed:
                self._changed.wait_for(lambda: self.finished_reading, self._limits.close_s)
            self._fail(failed.error)
        except BaseException as error:  # noqa: BLE001 - of the caller's iterator, raised to it
            with self._changed:
                self._outgoing.forget()
            self._fail(error)
            self._reader.cancel()
        with self._changed:
            self._finished_writing = True
            self._changed.notify_all()
        if self._closes_writer:
            self._close_writer()

    def _write_messages(self) -> None:
        compression = self._connection.compression
        write = compression.options(
            self._outgoing.peek_batch() if compression.needs_batch else None
        )
        self._call(lambda: self._writer.begin(self._input_schema, options=write))
        for message in iter(self._outgoing.next_message, None):
            with self._changed:
                self._outgoing.keep_message(message)
                if self._stopping or self.failure is not None:
                    return
                if not self._rows_pending:
                    self.last_activity = time.monotonic()
                self._rows_sent += message.batch.num_rows
                self._rows_pending[message.batch_id] = message.batch.num_rows
                if message.last:
                    self._final_ids.add(message.batch_id)
                self._changed.notify_all()
            self._call(self._writer.write_with_metadata, message.batch, message.metadata())
        self._call(self._writer.done_writing)
        with self._changed:
            self.all_sent = True
            self.last_activity = time.monotonic()
            self._changed.notify_all()

    def _call(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            with self._connection.errors():
                write(*arguments)
        except FletcherError as error:
            raise _WriteError(error) from None

    def _read(self) -> None:
        try:
            self._read_batches()
        except Exception as exc:  # noqa: BLE001 - of a thread, raised to the caller
            self._fail(from_flight_error(exc, self._connection.address))
        with self._changed:
            self.finished_reading = True
            self._changed.notify_all()

    def _read_batches(self) -> None:
        expected = 0
        parts: list[pa.RecordBatch] = []
        errors: tuple[RowError, ...] = ()
        while True:
            try:
                chunk = self._reader.read_chunk()
            except StopIteration:
                if self.schema is None:
                    self._learn_schema()
                return
            if chunk.data is None:
                continue
            if not chunk.data.num_rows:
                _raise_failure(chunk.app_metadata)
            if self.schema is None:
                self._learn_schema()
            answer = _parse_metadata(chunk.app_metadata)
            if answer.batch_id not in (None, expected):
                raise InternalError(
                    f"the server answered batch {answer.batch_id} where batch {expected} was due"
                )
            parts.append(chunk.data)
            errors += answer.errors
            whole = self._count_answer(chunk.data.num_rows, expected, is_last=answer.last)
            expected += answer.last
            if self._continuous:
                parts, whole = [chunk.data], chunk.data.num_rows > 0
            if whole:
                batch = pa.concat_batches(parts) if len(parts) > 1 else parts[0]
                if not self._put_answer((batch, errors)):
                    return
                parts, errors = [], ()

    def _count_answer(self, num_rows: int, batch_id: int, *, is_last: bool) -> bool:
        """Count an answer's rows; return whether it completes a batch of the input."""
        with self._changed:
            self._outgoing.forget()
            self.last_activity = time.monotonic()
            if self._one_row_each:
                self._rows_answered += num_rows
            # Chunks that are completed only by the end of the input answer no message.
            if not is_last or batch_id not in self._rows_pending:
                return False
            num_pending = self._rows_pending.pop(batch_id)
            if not self._one_row_each:
                self._rows_answered += num_pending
            is_whole = batch_id in self._final_ids
            self._final_ids.discard(batch_id)
            return is_whole

    def _learn_schema(self) -> None:
        """Read the output's schema, which arrives with the first message.

        Asking for the schema earlier would skip a message that reports the call's failure.
        """
        try:
            schema = self._reader.schema
        except flight.FlightInternalError as error:
            if str(error).startswith("Server never sent a data message"):
                return  # the call ended well and without an answer
            raise
        with self._changed:
            self.schema = schema
            self._one_row_each = "chunk_index" not in schema.names
            self._changed.notify_all()

    def _put_answer(self, answer: Answer) -> bool:
        """Queue a batch for the caller and wait for room; False: the caller left."""
        with self._changed:
            self.answers.append(answer)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping or self._has_room())
            return not self._stopping

    def _has_room(self) -> bool:
        num_bytes = sum(batch.get_total_buffer_size() for batch, _ in self.answers)
        limits = self._limits
        return len(self.answers) < limits.max_answers and num_bytes < limits.max_answer_bytes

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _AnswerMetadata:
    batch_id: int | None = None
    errors: tuple[RowError, ...] = ()
    last: bool = True  # whether the message is the last answer to its batch


class _WriteError(Exception):
    def __init__(self, error: FletcherError) -> None:
        super().__init__(error.message)
        self.error = error


def _raise_failure(metadata: pa.Buffer | None) -> None:
    """Raise the error in a message without rows, before the call ends.

    The server may wait for the end of the input before it ends the call. If the call ended while
    one thread reads and another one writes, pyarrow might abort the process. The call is therefore
    cancelled once reading has stopped.
    """
    failure = from_json(metadata.to_pybytes()) if metadata is not None else None
    if failure is not None:
        raise failure


def _parse_metadata(metadata: pa.Buffer | None) -> _AnswerMetadata:
    if metadata is None:
        return _AnswerMetadata()
    try:
        return msgspec.json.decode(metadata.to_pybytes(), type=_AnswerMetadata)
    except msgspec.DecodeError:
        raise InternalError("the server sent a batch with metadata that is not JSON") from None
