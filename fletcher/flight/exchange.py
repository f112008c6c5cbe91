"""DoExchange: text in, vectors back, in the order of the client's batches."""

from __future__ import annotations

import functools
import json
import logging
import time
import uuid
from contextlib import AbstractContextManager, suppress
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.core.command import EmbedCommand
from fletcher.errors import (
    BatchTooLargeError,
    CancelledError,
    FletcherError,
)
from fletcher.flight.commands import refuse_unused
from fletcher.flight.middleware import embed_call
from fletcher.flight.reading import read_messages, read_schema, wait_first
from fletcher.net.compression import CallCompression
from fletcher.net.flight_errors import HANDLER_ERRORS, StatusError, to_flight_error
from fletcher.serving.background import BackgroundTask
from fletcher.serving.callers import Caller
from fletcher.serving.service import Service
from fletcher.serving.session import EmbedSession
from fletcher.serving.slice_result import SliceResult
from fletcher.util.insist import insist

log = logging.getLogger(__name__)

_to_json = json.JSONEncoder(ensure_ascii=False).encode

MAX_REPORTED_ERRORS = 1000
# Arrow cannot send a batch of 2 GiB. Half of that leaves room for the other columns.
_MAX_OUTPUT_BYTES = 1 << 30
# Longest wait for a client to cancel its call, which takes it a millisecond or two.
_CANCEL_WAIT_S = 0.05


class Ending(AbstractContextManager["Ending"]):
    """Context that reports an exchange's failure to the client before the call ends.

    If a call ends while one thread of the client writes and another one reads, pyarrow does what
    gRPC forbids, and the client's process aborts. The failure is therefore sent as a message first.
    The client then cancels the call, which is safe. The server waits a moment for the cancellation.
    """

    def __init__(self, context: Any, writer: Any) -> None:
        self._context = context
        self._writer = writer
        self._sent = False

    def send_failure(self, error: flight.FlightError | StatusError) -> None:
        """Send the failure as JSON, at most once; do nothing if the client is gone."""
        if error.extra_info and not self._sent:
            self._sent = True
            with suppress(flight.FlightError, pa.ArrowException, OSError):
                self._writer.write_metadata(error.extra_info)

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, HANDLER_ERRORS):
            self.send_failure(error)
            deadline = time.monotonic() + _CANCEL_WAIT_S
            while not self._context.is_cancelled() and time.monotonic() < deadline:
                time.sleep(_CANCEL_WAIT_S / 25)


def exchange(
    service: Service,
    command: EmbedCommand,
    caller: Caller,
    reader: Any,
    writer: Any,
    ending: Ending,
) -> None:
    """Answer one DoExchange call.

    The call's own thread reads and submits batches. A second thread writes answers.
    """
    refuse_unused("DoExchange", command.to_mapping())
    with EmbedSession(service, embed_call("do_exchange", command, caller)) as session:
        output = session.open_input(read_schema(reader))
        # Begin before the first batch arrives: a client may wait for the schema before it sends.
        writing_as = service.answers.for_call(caller.peer(), output)
        writer.begin(output, options=writing_as.options)
        # A client that sends nothing takes no stream.
        messages, first = wait_first(read_messages(reader, caller, continuous=command.continuous))
        if first is None and caller.is_cancelled():
            return
        bulk = first is not None and first.batch is not None and session.intake.is_bulk(first.batch)
        session.admit(bulk=bulk)
        upload_id = command.upload_id or uuid.uuid4().hex
        answers = _Answers(session, upload_id, _Writer(caller, writer, writing_as), ending)
        expected = (FletcherError, flight.FlightError)
        answering = BackgroundTask(
            "exchange-writer", answers.write_results, answers.report_failure, expected
        )
        with answering:
            try:
                for message in messages:
                    service.admission.check_draining()
                    if message.batch is not None:
                        _check_size(message.batch.num_rows, session)
                        ends, row_first = message.metadata.document_end, message.row_first
                        session.submit_batch(
                            message.batch, message.batch_id, row_first, document_end=ends
                        )
                if not caller.is_cancelled():
                    session.submit_rest()
            finally:  # an error is raised after earlier batches are answered
                insist(functools.partial(_end_input, session, caller), "ending a call's input")
                answering.join()


def _end_input(session: EmbedSession, caller: Caller) -> None:
    if caller.is_cancelled():
        session.abandon(CancelledError("the client ended the exchange before its end"))
    session.end_input()


class _Writer:
    """Writer of answers to one caller."""

    def __init__(self, caller: Caller, writer: Any, writing_as: CallCompression) -> None:
        self._caller = caller
        self._writer = writer
        self._writing_as = writing_as

    def write_batch(self, batch: pa.RecordBatch, metadata: dict[str, Any]) -> None:
        """Write a batch; blocks while the client does not read.

        Raises CancelledError if the client is gone.
        """
        started_s = time.perf_counter()
        try:
            with self._caller.writing():
                self._writer.write_with_metadata(batch, _to_json(metadata).encode())
        except (pa.ArrowException, OSError) as error:  # pyarrow raises several kinds
            raise CancelledError(f"the client is gone: {str(error)[:200]}") from None
        self._writing_as.record_write(batch, time.perf_counter() - started_s)


class _Answers:
    """Writer of answers: joins the results of a session to one answer per batch."""

    def __init__(
        self,
        session: EmbedSession,
        upload_id: str,
        writer: _Writer,
        ending: Ending,
    ) -> None:
        self._session = session
        self._upload_id = upload_id
        self._writer = writer
        self._ending = ending
        # A batch may have any number of chunks, so chunks are sent slice by slice.
        chunking = session.spec.chunking
        self._chunk_rows = chunking is not None and chunking.rows
        self._parts: list[pa.RecordBatch] = []
        self._parts_bytes = 0
        self._max_bytes = _max_output_bytes(session)
        self._errors: list[dict[str, Any]] = []

    def write_results(self) -> None:
        """Write all results; runs on a separate thread."""
        for result in self._session.results(self._upload_id):
            self._append_result(result)
            del result  # the next one may be long in coming

    def report_failure(self, error: Exception) -> None:
        """Wake the reading thread if it waits for memory, and send the failure now.

        The reading thread may be blocked until the client sends something, and the call cannot end
        before that. Without a message, a client that waits for vectors would not learn of the
        failure.
        """
        self._session.close()
        self._ending.send_failure(to_flight_error(error, log))

    def _append_result(self, result: SliceResult) -> None:
        """Add a result to its batch's answer; write the answer after the last slice."""
        batch, row_slice = result.batch, result.row_slice
        if result.errors:
            self._errors += result.error_reports(MAX_REPORTED_ERRORS - len(self._errors))
        self._parts.append(batch)
        self._parts_bytes += batch.nbytes
        is_last = row_slice.last or (self._chunk_rows and batch.num_rows > 0)
        if self._parts_bytes > self._max_bytes:
            raise _too_large(sum(part.num_rows for part in self._parts), self._max_bytes)
        if len(self._parts) > 1 or not is_last:
            # The parts and their copy, which is the answer.
            self._session.keep_bytes(2 * self._parts_bytes)
        if is_last:
            whole = pa.concat_batches(self._parts) if len(self._parts) > 1 else self._parts[0]
            metadata: dict[str, Any] = {"batch_id": row_slice.batch_id, "errors": self._errors}
            if self._chunk_rows:
                metadata["last"] = row_slice.last
            self._parts, self._parts_bytes, self._errors = [], 0, []
            self._writer.write_batch(whole, metadata)
            self._session.keep_bytes(0)


def _max_output_bytes(session: EmbedSession) -> int:
    """Largest answer to a batch: it is copied once while the answer is put together."""
    return min(_MAX_OUTPUT_BYTES, session.max_kept_bytes // 2)


def _check_size(num_rows: int, session: EmbedSession) -> None:
    """Refuse a batch whose dense vectors would be too large for one answer."""
    spec, most = session.spec, _max_output_bytes(session)
    if spec.output == "dense" and num_rows * spec.num_bytes > most:
        raise _too_large(num_rows, most)


def _too_large(num_rows: int, most: int) -> BatchTooLargeError:
    return BatchTooLargeError(
        f"{num_rows} rows of a batch make more than {most} bytes of vectors and text; send smaller "
        "batches",
        allowed=[f"<= {most} bytes"],
    )
