"""Answers of a DoExchange: vectors in the order of rows, and the call's failure."""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.core.command import EmbedCommand
from fletcher.errors import BatchTooLargeError, CancelledError
from fletcher.net.compression import CallCompression
from fletcher.net.flight_errors import HANDLER_ERRORS, StatusError, to_flight_error
from fletcher.net.message_size import OVERHEAD_BYTES, batch_bytes, cut_batch
from fletcher.serving.callers import Caller
from fletcher.serving.session import EmbedSession
from fletcher.serving.slice_result import SliceResult

log = logging.getLogger(__name__)

MAX_REPORTED_ERRORS = 1000
# Arrow cannot send a batch of 2 GiB. Half of that leaves room for the other columns.
_MAX_WHOLE_BYTES = 1 << 30
# Longest wait for a client to cancel its call, which takes it a millisecond or two.
_CANCEL_WAIT_S = 0.05


class AnswerWriter(AbstractContextManager["AnswerWriter"]):
    """Writer of a call's messages, and of its failure before its end.

    As a context, it sends the failure.

    If a call ends while one thread of the client writes and another one reads, pyarrow does what
    gRPC forbids, and the client's process aborts. The failure is therefore sent as a message first,
    with a batch of no rows: clients in other languages cannot read a message without a batch. The
    client then cancels the call, which is safe. The server waits a moment for the cancellation.
    """

    def __init__(self, context: Any, writer: Any) -> None:
        self._context = context
        self._writer = writer
        self._schema: pa.Schema | None = None
        self._failed = False

    def begin(self, schema: pa.Schema, compression: CallCompression) -> None:
        """Send the schema of the answers."""
        self._writer.begin(schema, options=compression.options)
        self._schema, self._compression = schema, compression

    def write_batch(self, caller: Caller, batch: pa.RecordBatch, metadata: bytes) -> None:
        """Write a batch; blocks while the client does not read.

        Raises CancelledError if the client is gone.
        """
        started_s = time.perf_counter()
        try:
            with caller.writing():
                self._writer.write_with_metadata(batch, metadata)
        except (pa.ArrowException, OSError) as error:  # pyarrow raises several kinds
            raise CancelledError(f"the client is gone: {str(error)[:200]}") from None
        self._compression.record_write(batch, time.perf_counter() - started_s)

    def send_failure(self, error: flight.FlightError | StatusError) -> None:
        """Send the failure as JSON, at most once; do nothing if the client is gone."""
        if not error.extra_info or self._failed:
            return
        self._failed = True
        with suppress(flight.FlightError, pa.ArrowException, OSError):
            if self._schema is None:
                self._schema = pa.schema([])
                self._writer.begin(self._schema)
            nothing = pa.RecordBatch.from_pylist([], schema=self._schema)
            self._writer.write_with_metadata(nothing, error.extra_info)

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, HANDLER_ERRORS):
            self.send_failure(error)
            deadline = time.monotonic() + _CANCEL_WAIT_S
            while not self._context.is_cancelled() and time.monotonic() < deadline:
                time.sleep(_CANCEL_WAIT_S / 25)


class _Message:
    """An answer in the making: rows, and the errors among them as JSON."""

    def __init__(self, row_first: int) -> None:
        self.row_first = row_first
        self.parts: list[pa.RecordBatch] = []
        self.errors: list[msgspec.Raw] = []
        self.num_rows = 0
        self.num_bytes = OVERHEAD_BYTES

    def add_rows(self, batch: pa.RecordBatch, errors: list[bytes], max_bytes: int) -> None:
        """Add rows, and as many of their errors as fit.

        The error of a single row is always added.
        """
        self.parts.append(batch)
        self.num_rows += batch.num_rows
        self.num_bytes += batch_bytes(batch)
        for error in errors:
            if self.num_rows > 1 and self.num_bytes + len(error) + 1 > max_bytes:
                break
            self.errors.append(msgspec.Raw(error))
            self.num_bytes += len(error) + 1


class Answers:
    """Messages that answer the batches of one call.

    A batch is answered by one or more messages of at most `answer_bytes`, or by one message if
    that is 0. The last one says so. Chunks that are rows are sent as soon as they are ready.
    """

    def __init__(
        self, session: EmbedSession, command: EmbedCommand, writer: AnswerWriter, caller: Caller
    ) -> None:
        self._session = session
        self._writer = writer
        self._caller = caller
        chunking = session.spec.chunking
        self._chunk_rows = chunking is not None and chunking.rows
        self._is_whole = not command.answer_bytes
        # The parts of an answer are copied once while they are put together.
        self._max_whole_bytes = min(_MAX_WHOLE_BYTES, session.max_kept_bytes // 2)
        self._max_bytes = min(command.answer_bytes or _MAX_WHOLE_BYTES, self._max_whole_bytes)
        self._message: _Message | None = None
        self._num_errors = 0

    def check_size(self, num_rows: int) -> None:
        """Refuse a batch whose dense vectors are too large for the one answer.

        Raises:
            BatchTooLargeError: They are.
        """
        spec = self._session.spec
        if self._is_whole and spec.output == "dense":
            self._check_bytes(num_rows, num_rows * spec.num_bytes)

    def write_results(self, upload_id: str) -> None:
        """Write all results; runs on a separate thread."""
        for result in self._session.results(upload_id):
            self._write_result(result)
            del result  # the next one may be long in coming

    def report_failure(self, error: Exception) -> None:
        """Wake the reading thread if it waits for memory, and send the failure now.

        The reading thread may be blocked until the client sends something, and the call cannot end
        before that. Without a message, a client that waits for vectors would not learn of the
        failure.
        """
        self._session.close()
        self._writer.send_failure(to_flight_error(error, log))

    def _write_result(self, result: SliceResult) -> None:
        row_slice = result.row_slice
        # One text in many rows takes little memory before it is written out for each.
        self._check_bytes(result.batch.num_rows, batch_bytes(result.batch))
        for row_first, batch, errors in self._cut(result):
            message = self._message or _Message(row_first)
            num_bytes = message.num_bytes + batch_bytes(batch)
            if self._is_whole:
                self._check_bytes(message.num_rows + batch.num_rows, num_bytes)
            elif message.parts and num_bytes > self._max_bytes:
                self._send(row_slice.batch_id, last=False)
                message = _Message(row_first)
            message.add_rows(batch, errors, self._max_bytes)
            self._message = message
        pending = self._message
        is_large = pending is not None and pending.num_bytes > self._max_bytes
        if row_slice.last or is_large or (self._chunk_rows and result.batch.num_rows):
            self._send(row_slice.batch_id, last=row_slice.last)
        elif pending is not None:
            # The parts and their copy, which is the answer.
            self._session.keep_bytes(2 * pending.num_bytes)
        if row_slice.last:
            self._num_errors = 0

    def _cut(self, result: SliceResult) -> Iterator[tuple[int, pa.RecordBatch, list[bytes]]]:
        """Parts of a result that fit in a message: first row, output rows, errors as JSON."""
        reports = result.error_reports(MAX_REPORTED_ERRORS - self._num_errors)
        self._num_errors += len(reports)
        errors = [msgspec.json.encode(one) for one in reports]
        room = self._max_bytes - OVERHEAD_BYTES - min(self._max_bytes // 2, sum(map(len, errors)))
        batches = [result.batch] if self._is_whole else cut_batch(result.batch, room)
        row_slice, place = result.row_slice, 0
        rows = range(row_slice.num_rows)
        # Output rows at which the rows with errors begin.
        places = [result.place(one["row"] - row_slice.row_first) for one in reports]
        for batch in batches:
            end = place + batch.num_rows
            first = bisect_right(rows, place, key=result.place) - 1 if rows else 0
            its = [one for one, at in zip(errors, places, strict=True) if place <= at < end]
            yield row_slice.row_first + max(0, first), batch, its
            place = end

    def _send(self, batch_id: int | None, *, last: bool) -> None:
        message, self._message = self._message, None
        if message is None:
            return
        parts = message.parts
        batch = pa.concat_batches(parts) if len(parts) > 1 else parts[0]
        metadata = {
            "batch_id": batch_id,
            "row_first": message.row_first,
            "last": last,
            "errors": message.errors,
        }
        if len(parts) > 1:
            self._session.keep_bytes(2 * message.num_bytes)
        self._writer.write_batch(self._caller, batch, msgspec.json.encode(metadata))
        self._session.keep_bytes(0)

    def _check_bytes(self, num_rows: int, num_bytes: int) -> None:
        most = self._max_whole_bytes
        if num_bytes > most:
            raise BatchTooLargeError(
                f"{num_rows} rows of a batch make more than {most} bytes of vectors and text; send "
                "smaller batches",
                allowed=[f"<= {most} bytes"],
            )
