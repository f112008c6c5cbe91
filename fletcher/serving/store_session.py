"""One connection of an upload: rows to the store, acknowledgements back."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import pyarrow as pa

from fletcher.core.owner import plain_id
from fletcher.delivery.dedupe.prefilter import DedupePrefilter
from fletcher.delivery.dedupe.stored_vector_reader import StoredVectorReader
from fletcher.delivery.groups import Rows
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.upload import Upload
from fletcher.errors import FletcherError, InvalidCommandError, OverloadedError
from fletcher.pipeline.input.intake import Skip
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.stream import unexpected_failure
from fletcher.serving.background import BackgroundTask
from fletcher.serving.service import Service
from fletcher.serving.session import EmbedCall, EmbedSession
from fletcher.serving.slice_result import RowRanges, SliceResult
from fletcher.serving.store_checks import (
    check_output,
    checked_store,
    checking_times,
    model_of,
    widened,
)
from fletcher.util.insist import insist

log = logging.getLogger(__name__)

_POLL_S = 0.5


class AckQueue:
    """Unacknowledged batches of one connection. Not thread-safe.

    Batches are acknowledged in the order of receipt, as soon as all their rows are covered. One
    acknowledgement stands for its batch and for all batches before it. A slow reader therefore gets
    fewer acknowledgements, instead of a growing queue of them.

    Args:
        upload_id: Name of the upload, for the acknowledgements.
        covers: Returns whether rows, given by first and last offset, may be acknowledged.
    """

    def __init__(self, upload_id: str, covers: Callable[[int, int], bool]) -> None:
        self._upload_id = upload_id
        self._covers = covers
        self._batches: deque[tuple[int, int, int]] = deque()

    def append_batch(self, batch_id: int, row_first: int, row_last: int) -> None:
        """Add a batch that was received and submitted.

        For a batch without rows, `row_last` is before `row_first`.
        """
        self._batches.append((batch_id, row_first, row_last))

    @property
    def is_due(self) -> bool:
        """Whether the oldest batch may be acknowledged."""
        if not self._batches:
            return False
        _, first, last = self._batches[0]
        return last < first or self._covers(first, last)

    def next_ack(self, counts: Callable[[], dict[str, int]]) -> dict[str, Any] | None:
        """Remove all batches that are due, and return their acknowledgement.

        Returns None if no batch is due. `counts` returns row counts to add to the acknowledgement.
        """
        due = []
        while self.is_due:
            due.append(self._batches.popleft())
        if not due:
            return None
        return {
            "type": "ack",
            "upload_id": self._upload_id,
            "batch_id": due[-1][0],
            "row_first": due[0][1],
            "row_last": due[-1][2],
            **counts(),
        }


class StoreSession(AbstractContextManager["StoreSession"]):
    """Context of one connection that embeds and stores rows of an upload.

    One thread calls `open_input`, `admit`, `submit_batch` and `end_input`. After `admit`, a second
    thread iterates over `acknowledgements`. The session starts a third thread, which passes vectors
    to the sink. The session overrides the fields of `call` that are the same for all uploads.

    Attributes:
        upload: The upload; set by `admit`.

    Raises:
        FletcherError: On entering, as with `EmbedSession`, or if the store does not take such rows.
    """

    upload: Upload
    _session: EmbedSession
    _output: pa.Schema
    _sink: DatasetSink
    _acks: AckQueue
    _skip: Skip | None
    _delivering: BackgroundTask

    def __init__(self, service: Service, call: EmbedCall) -> None:
        self._service = service
        self._call = call
        self._command = call.command
        self._exits = ExitStack()
        self._ended = False
        self._leaving = threading.Lock()
        self._left = False  # this connection no longer counts among the upload's
        self._num_claimed = self._num_delivered = 0  # rows claimed here, and those with the sink

    def __enter__(self) -> StoreSession:
        command, service = self._command, self._service
        store = checked_store(service, command)
        # A dataset has vectors of one model, so an alias chooses a model per dataset, not per
        # upload.
        dataset = command.dataset or ""
        divided = service.models.is_divided(command.model)
        call = replace(
            self._call,
            command=widened(command, store.capabilities.dtypes),
            dtypes=store.capabilities.dtypes,
            include_text=True,
            whole_rows=True,
            small_is_interactive=False,
            alias_key=dataset,
            dataset_model=model_of(store, dataset) if divided else None,
        )
        with ExitStack() as exits:
            self._session = exits.enter_context(EmbedSession(service, call))
            check_output(self._session, store)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    def open_input(self, schema: pa.Schema) -> None:
        """Check the input's schema. Raises as `EmbedSession.open_input`."""
        self._output = self._session.open_input(schema)
        command = self._command
        if not self._session.intake.has_ids and (command.dedupe == "id" or command.mode == "delta"):
            asked = "`dedupe` is id" if command.dedupe == "id" else "`mode` is delta"
            raise InvalidCommandError(
                f"{asked}, but the input has no column `id`; name the ids' column in `id_column`",
                field="id_column",
            )

    def admit(self) -> None:
        """Open a stream, and open or resume the upload.

        Raises:
            OverloadedError, DrainingError: As `EmbedSession.admit`.
            FletcherError: As `Delivery.open_upload`.
        """
        service, session = self._service, self._session
        span = session.admit(bulk=self._command.priority != "interactive")
        self.upload, self._sink = service.delivery.open_upload(self._command, self._output)
        upload = self.upload
        self._exits.callback(self._close_upload)
        span.set_attributes(dataset=upload.dataset, upload_id=plain_id(upload.upload_id))
        in_memory = self._command.durability == "memory"
        covers = (lambda _first, _last: True) if in_memory else upload.covers
        self._acks = AckQueue(plain_id(upload.upload_id), covers)
        self._skip = None
        if upload.dedupe_by is not None:
            vectors = None
            if self._command.mode == "delta":
                vectors = StoredVectorReader(self._sink.committer.destination, self._output)
            index = self._sink.dedupe_index
            self._skip = DedupePrefilter(index, upload, vectors).check_rows
        if self._sink.committer.destination.store.capabilities.nanosecond_times:
            self._skip = checking_times(self._output, self._skip)
        self._delivering = BackgroundTask("upload-deliver", self._deliver, self._fail)
        self._exits.callback(self._delivering.wait)
        self._exits.callback(session.close)
        if self._call.caller is not None:
            self._call.caller.bind(self)

    def submit_batch(self, batch: pa.RecordBatch, batch_id: int, row_first: int) -> None:
        """Submit a batch, without rows that the upload has already.

        See `EmbedSession.submit_batch`. After an error of an unknown kind the upload fails, because
        rows may be claimed that nobody has.
        """
        try:
            self._session.submit_batch(
                batch, batch_id, row_first, skip=self._skip, claim=self._claim
            )
            with self.upload.changed:
                self._acks.append_batch(batch_id, row_first, row_first + batch.num_rows - 1)
                self.upload.changed.notify_all()
        except FletcherError:
            raise
        except BaseException as error:
            failure = self.fail()
            with contextlib.suppress(BaseException):
                log.exception("upload %s: a batch cannot be submitted", self.upload.upload_id)
            raise failure from error

    def fail(self) -> FletcherError:
        """Fail the upload after an error of an unknown kind, and return its error."""
        failure = unexpected_failure()
        insist(functools.partial(self._fail, failure), "failing an upload")
        return failure

    def end_input(self) -> None:
        """End the input, and wait until the sink has all vectors."""
        self._session.end_input()
        self._delivering.wait()
        if self._delivering.error is not None:
            self._fail(self._delivering.error)  # fail again: more rows were claimed meanwhile
        with self.upload.changed:
            self._ended = True
            self.upload.changed.notify_all()

    def acknowledgements(self) -> Iterator[dict[str, Any]]:
        """Yield acknowledgements as they become due, and the summary last.

        The iterator ends when the upload has failed, or after `end_input` once all rows are
        settled. Iterate to the end even if the client is gone. Until then, the upload's rows take
        the stream's memory, and this iterator flushes them to the store if the server shuts down.
        """
        upload, draining = self.upload, self._service.admission.draining
        finished = False
        while not finished:
            with upload.changed:
                upload.changed.wait_for(lambda: self._acks.is_due or self._is_finished, _POLL_S)
                finished = self._is_finished
                ack = self._acks.next_ack(upload.counts)
            if ack is not None:
                yield ack
            if draining.is_set():
                self._sink.flush()
        self._complete_upload()
        yield upload.summary(self._session.spec.model)

    def _complete_upload(self) -> None:
        try:
            self._service.delivery.complete_upload(self._command, self.upload, self._sink)
        except FletcherError as error:
            self.upload.fail(error)

    def close(self) -> None:
        """Drop rows that the sink does not have, and wake waiting threads. Thread-safe."""
        self._session.close()
        with self.upload.changed:
            self.upload.changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether all rows of the upload that were received are acknowledged."""
        return self._session.idle and self.upload.in_flight == 0

    def abandon(self, error: FletcherError) -> None:
        """Drop what is not acknowledged, and give the call's place back.

        Rows that another connection of the upload may wait for are embedded and stored all the
        same. Call again: that connection may leave, too. Thread-safe.
        """
        with self._leaving:
            if not self._left:
                self._left = True
                self._service.delivery.leave_upload(self.upload, error)
        if self.upload.failure is not None or self.idle:
            self._session.abandon(error)

    @property
    def _is_finished(self) -> bool:
        return self.upload.failure is not None or (self._ended and self.upload.in_flight == 0)

    def _claim(self, row_slice: RowSlice) -> RowRanges:
        """Claim a slice's rows that the upload has not received before."""
        num_rows = row_slice.num_rows
        if not num_rows:
            return []
        new = self.upload.claim_rows(row_slice.row_first, row_slice.row_first + num_rows - 1)
        num_new = sum(last - first + 1 for first, last in new)
        num_known = num_rows - num_new
        self._num_claimed += num_new
        if num_known:
            self._service.telemetry.rows_deduplicated.add(num_known)
        return new

    def _deliver(self) -> None:
        for result in self._session.results(plain_id(self.upload.upload_id)):
            self._deliver_slice(result)
            del result  # free its memory: the next result may take long
        self._sink.flush()

    def _deliver_slice(self, result: SliceResult) -> None:
        """Submit the claimed rows of a slice to the sink."""
        row_slice, errors, ranges = result.row_slice, result.errors, result.ranges or []
        ids = result.failed_ids()
        reused = [] if row_slice.stored is None else row_slice.stored.rows.tolist()
        for index, (first, last) in enumerate(ranges):
            low, high = first - row_slice.row_first, last - row_slice.row_first
            failed = sorted(row for row in errors if low <= row <= high)
            for row in failed:
                self.upload.report_failed_row(row_slice.row_first + row, ids[row], errors[row])
            begin, end = result.place(low), result.place(high + 1)
            is_last = index == len(ranges) - 1
            self._sink.submit_rows(
                Rows.from_batch(
                    self.upload,
                    result.batch.slice(begin, end - begin),
                    first,
                    tuple(result.place(row) - begin for row in failed),
                    # The slice's memory is free once its last rows are stored.
                    result.hold() if is_last else lambda: None,
                    # If rows have several chunks, no row is skipped.
                    tuple(row - low for row in row_slice.skipped.tolist() if low <= row <= high),
                    num_rows=last - first + 1,
                )
            )
            self._num_delivered += last - first + 1
            num_reused = sum(low <= row <= high for row in reused)
            self._service.telemetry.rows_reused.add(num_reused)

    def _fail(self, error: Exception) -> None:
        """Fail the upload; a client may resume it and send unacknowledged rows again."""
        assert isinstance(error, FletcherError)  # BackgroundTask raises no other
        self._session.close()
        if self._left and self.upload.failure is None:  # other connections feed the upload
            if self._num_claimed == self._num_delivered:
                return
            error = OverloadedError("another connection of this upload ended; send again")
        self.upload.fail(error)

    def _close_upload(self) -> None:
        with self._leaving:
            left, self._left = self._left, True
        self._service.delivery.close_upload(self.upload, self._sink, left=left)
