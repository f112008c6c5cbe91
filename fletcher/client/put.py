"""Uploads by DoPut: a window of unacknowledged messages, and resumption.

The caller's thread reads the source and waits. A second thread writes, and a third one reads
acknowledgements. The caller's thread is therefore never blocked inside a call that cannot be
interrupted.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from fletcher.client.connection import Connection, descriptor
from fletcher.client.messages import (
    Ack,
    Message,
    PutSummary,
    as_batches,
    end_marker,
    messages,
    parse_reply,
)
from fletcher.core.command import EmbedCommand
from fletcher.core.ranges import RangeSet
from fletcher.errors import (
    DeadlineExceededError,
    FletcherError,
    InternalError,
    OverloadedError,
    UnavailableError,
    UnknownDatasetError,
    UploadConflictError,
)
from fletcher.net.flight_errors import from_flight_error

_log = logging.getLogger(__name__)

OnAck = Callable[[Ack], None]
# Retries, for some seconds, while the store answers and only the dataset cannot be used.
_DATASET_RETRIES = 5


class UploadSession:
    """One upload over one or more connections; see `Client.put` for the arguments.

    The options have a `dataset` and an `upload_id`. `data` is read once.
    """

    def __init__(
        self,
        connection: Connection,
        data: Any,
        options: EmbedCommand,
        *,
        row_offset: int,
        end: bool,
        on_ack: OnAck | None,
    ) -> None:
        self._connection = connection
        self._transfer = connection.transfer
        self._options = options
        self._end = end
        self._on_ack = on_ack
        self._schema, batches = as_batches(data)
        self._unread: Iterator[Message] = messages(
            batches, max_bytes=self._transfer.message_bytes, row_offset=row_offset
        )
        self._batch_ids = itertools.count()
        self._unacknowledged: deque[Message] = deque()
        self._row_offset = self._next_row = row_offset
        self._acknowledged = row_offset  # rows before this one are no longer kept
        self._stored: list[tuple[int, int]] = []  # inclusive ranges that the server reported
        self._rows_skipped = 0
        self._progress = 0

    def send_rows(self, *, ask_first: bool) -> PutSummary:
        """Send all rows and return the server's summary.

        With `ask_first`, rows of this upload that the server already has are skipped.

        Raises:
            FletcherError: The server refused the upload, or the retries allowed by
                `TransferOptions` failed.
        """
        asked = not ask_first
        failures = 0
        since_s = time.monotonic()
        while True:
            progress = self._progress
            try:
                if not asked:
                    self._stored = self._ask_stored()
                    asked = True
                return replace(self._send_all(), rows_skipped=self._rows_skipped)
            except UnavailableError as error:
                if self._options.durability == "memory" and self._next_row > self._row_offset:
                    raise  # the server cannot tell which rows arrived
                if self._progress > progress:
                    failures, since_s = 0, time.monotonic()
                failures += 1
                stuck = time.monotonic() - since_s > self._transfer.stall_timeout_s
                most = self._transfer.max_retries
                if error.field == "dataset":  # it is damaged, or another program writes to it
                    most = min(most, _DATASET_RETRIES)
                if stuck or failures > most:
                    raise
                # Do not ask if a busy server acknowledged no row: it took none, or will skip the
                # repeated ones. The question would wait for the store and add load.
                asked &= isinstance(error, OverloadedError) and self._progress == progress
                if failures == 1:
                    _log.warning("upload %s: %s; retrying", self._options.upload_id, error)
                time.sleep(self._connection.retry_delay_s(failures, error))

    def _ask_stored(self) -> list[tuple[int, int]]:
        """Ask the server which rows it has, and drop kept messages with these rows."""
        body = {"upload_id": self._options.upload_id, "dataset": self._options.dataset}
        if self._options.store is not None:
            body["store"] = self._options.store
        try:
            answer = self._connection.action("upload_status", body)
            stored = [(int(first), int(last)) for first, last in answer["ranges"]]
        except UnknownDatasetError:
            stored = []
        except DeadlineExceededError as error:  # a server whose store hangs: retryable
            raise UnavailableError(error.message) from None
        except (KeyError, TypeError, ValueError):
            raise InternalError("the server's `upload_status` has no `ranges`") from None
        if self._acknowledged > self._row_offset and not _covered(
            stored, self._row_offset, self._acknowledged - 1
        ):
            raise UploadConflictError(
                f"acknowledged rows of upload `{self._options.upload_id}` (rows up to number "
                f"{self._acknowledged - 1}) are gone from dataset `{self._options.dataset}`, or "
                "its store refused them after all; send the whole upload again",
                field="upload_id",
            )
        self._unacknowledged = deque(
            one for one in self._unacknowledged if not _covered(stored, one.row_first, one.row_last)
        )
        return stored

    def _send_all(self) -> PutSummary:
        call = _PutCall(self._connection, self._options, self._schema, self._first_batch())
        try:
            for message in itertools.chain(list(self._unacknowledged), self._new_messages()):
                call.wait_for_room(message.num_bytes, lambda: self._note(call))
                call.send(message)
            call.finish_input(end_marker(self._next_row) if self._end else None)
            return call.result(lambda: self._note(call))
        finally:
            self._note(call, quietly=True)
            call.abandon()

    def _new_messages(self) -> Iterator[Message]:
        """Messages of the rows that were never sent and that the server does not have."""
        for message in self._unread:
            self._next_row = message.row_last + 1
            parts = [
                message.cut(first, last, next(self._batch_ids))
                for first, last in RangeSet(self._stored).missing(
                    message.row_first, message.row_last
                )
            ]
            self._rows_skipped += message.batch.num_rows - sum(one.batch.num_rows for one in parts)
            self._unacknowledged.extend(parts)  # before one of them can fail
            yield from parts

    def _first_batch(self) -> pa.RecordBatch | None:
        """The call's first batch, if the choice of compression depends on it."""
        if not self._connection.compression.needs_batch:
            return None
        if self._unacknowledged:
            return self._unacknowledged[0].batch
        first = next(self._unread, None)
        if first is None:
            return None
        self._unread = itertools.chain([first], self._unread)
        return first.batch

    def _note(self, call: _PutCall, *, quietly: bool = False) -> None:
        """Drop messages that the newest acknowledgement covers, and call `on_ack`.

        With `quietly`, `on_ack` is not called.
        """
        ack = call.take_ack()
        if ack is None:
            return
        self._progress = max(self._progress, ack.rows_received)
        while self._unacknowledged and self._unacknowledged[0].batch_id <= ack.batch_id:
            self._acknowledged = self._unacknowledged.popleft().row_last + 1
        if self._on_ack is not None and not quietly:
            self._on_ack(ack)


class _PutCall:
    """One DoPut call with a writing and a reading thread. One other thread uses it."""

    def __init__(
        self,
        connection: Connection,
        options: EmbedCommand,
        schema: pa.Schema,
        first: pa.RecordBatch | None,
    ) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._to_write: deque[Message | bytes | None] = deque()
        self._in_window: deque[Message] = deque()
        self._window_bytes = 0
        self._ack: Ack | None = None
        self._summary: PutSummary | None = None
        self._error: FletcherError | None = None
        self._stopping = False
        self._ended = False
        self._closed = False
        self._last_activity = time.monotonic()
        with connection.errors():
            write = connection.compression.options(first)
            self._writer, self._reader = connection.flight.do_put(
                descriptor(options), schema, connection.stream_options(write)
            )
        for name, work in (("put-write", self._write), ("put-read", self._read)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def wait_for_room(self, num_bytes: int, on_progress: Callable[[], None]) -> None:
        """Wait until this number of bytes fits into the window, or the window is empty."""
        most = self._connection.transfer.window_bytes - num_bytes
        self._wait(lambda: not self._in_window or self._window_bytes <= most, on_progress)

    def send(self, message: Message) -> None:
        with self._changed:
            if not self._in_window:
                self._last_activity = time.monotonic()
            self._in_window.append(message)
            self._window_bytes += message.num_bytes
            self._to_write.append(message)
            self._changed.notify_all()

    def finish_input(self, marker: bytes | None) -> None:
        """End the input, with or without an end marker."""
        with self._changed:
            self._last_activity = time.monotonic()
            self._to_write.extend([None] if marker is None else [marker, None])
            self._changed.notify_all()

    def result(self, on_progress: Callable[[], None]) -> PutSummary:
        """Wait until the server has ended the call, and return its summary."""
        self._wait(lambda: self._closed, on_progress)
        with self._changed:
            if self._summary is None:
                raise UnavailableError(
                    f"{self._connection.address} ended the upload without a summary"
                )
            return self._summary

    def take_ack(self) -> Ack | None:
        """The newest acknowledgement that was not taken before; None: no new one."""
        with self._changed:
            ack, self._ack = self._ack, None
            return ack

    def abandon(self) -> None:
        """Stop writing and wait briefly for the call's end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed, self._connection.limits.abandon_s)

    def _wait(self, done: Callable[[], bool], on_progress: Callable[[], None]) -> None:
        """Wait until `done` returns true.

        Calls `on_progress` after acknowledgements and at the end, without holding the lock.
        """
        stall_timeout_s = self._connection.transfer.stall_timeout_s
        is_done = False
        while not is_done:
            with self._changed:
                left = self._last_activity + stall_timeout_s - time.monotonic()
                self._changed.wait_for(
                    lambda: done() or self._closed or self._ack is not None, max(0.0, left)
                )
                if self._closed:
                    if self._error is not None:
                        raise self._error
                    if not done():
                        raise UnavailableError(
                            f"{self._connection.address} ended the upload before its end"
                        )
                is_done = done()
                stalled = not is_done and self._ack is None
            if stalled and time.monotonic() >= self._last_activity + stall_timeout_s:
                raise DeadlineExceededError(
                    f"{self._connection.address} has acknowledged nothing for "
                    f"{stall_timeout_s:g} s; the upload can be resumed by its `upload_id`"
                )
            on_progress()

    def _write(self) -> None:
        patience_s = None
        try:
            while (item := self._next()) is not None:
                if isinstance(item, Message):
                    self._writer.write_with_metadata(item.batch, item.metadata())
                else:
                    self._writer.write_metadata(item)
        except Exception as exc:  # noqa: BLE001 - of a thread, raised to the caller
            self._fail(exc)
            patience_s = self._connection.limits.abandon_s
        try:
            self._writer.done_writing()
        except Exception as exc:  # noqa: BLE001 - the same
            self._fail(exc)
        # pyarrow may crash if a call is closed while another thread reads from it. After a failed
        # write, reading ends soon. If it does not, the caller is told to stop waiting.
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, patience_s):
                self._closed = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._ended)
        try:
            self._writer.close()
        except Exception as exc:  # noqa: BLE001 - it carries the call's status
            self._fail(exc)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next(self) -> Message | bytes | None:
        """Wait for the next message to send; None: stop writing.

        A summary before the end of the input means that the upload failed. The reason arrives when
        the call ends. The server may still be reading, and ends the call once writing has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._to_write or self._over)
            return None if self._over else self._to_write.popleft()

    @property
    def _over(self) -> bool:
        return self._ended or self._stopping or self._summary is not None

    def _read(self) -> None:
        try:
            while (reply := self._reader.read()) is not None:
                self._take(parse_reply(reply.to_pybytes()))
        except Exception as exc:  # noqa: BLE001 - of a thread, raised to the caller
            self._fail(exc)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take(self, reply: Ack | PutSummary | None) -> None:
        with self._changed:
            self._last_activity = time.monotonic()
            if isinstance(reply, PutSummary):
                self._summary = reply
            elif reply is not None:
                self._ack = reply
                while self._in_window and self._in_window[0].batch_id <= reply.batch_id:
                    self._window_bytes -= self._in_window.popleft().num_bytes
            self._changed.notify_all()

    def _fail(self, exc: Exception) -> None:
        """Keep the error; the server's own error replaces that of a failed write."""
        error = from_flight_error(exc, self._connection.address)
        with self._changed:
            if self._error is None or getattr(exc, "extra_info", None):
                self._error = error


def _covered(ranges: list[tuple[int, int]], first: int, last: int) -> bool:
    return any(low <= first and last <= high for low, high in ranges)
