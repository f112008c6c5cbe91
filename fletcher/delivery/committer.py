"""The only thread that appends a dataset's groups to its store, with retry.

A committer owns the dataset's only writer. It appends the rows of all uploads to the dataset, so
that many small uploads make few large commits. Before a group is first sent, its first and last row
and therefore its `batch_key` are fixed. If an append ends without an answer, the committer asks the
store which keys are missing, and sends only the groups with these keys again.

Rows come from memory or from the journal. If the store stays unavailable, rows in memory are given
up and their upload fails. Journaled rows wait without limit.

Rows in memory are checked for duplicates before they are first sent. From then until these rows are
settled, the committer holds the right to decide, so that no other thread compares rows with them
while it is unknown whether they will be stored.

`CommitQueue` chooses an action under the committer's lock. The committer carries it out without the
lock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import pyarrow as pa

from fletcher.config.delivery import DeliveryConfig
from fletcher.delivery import actions
from fletcher.delivery.append_size import AppendSize
from fletcher.delivery.breaker import RETRYABLE
from fletcher.delivery.commit_queue import Action, CommitQueue, Outcome
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.groups import Destination, Group, Rows, WriterKind, writer_kind
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.timing import DeliveryTiming
from fletcher.errors import FletcherError, InternalError, OverloadedError, StoreUnavailableError
from fletcher.stores.base import DatasetWriter, WriteMode

log = logging.getLogger(__name__)


class Committer:
    """A dataset's writer and its thread. Thread-safe.

    Args:
        journal: The dataset's journal. If it is None, rows stay in memory until they are stored.
        on_idle: Called on the committer's thread after some idle time. The thread ends if it
            returns True.
    """

    def __init__(
        self,
        destination: Destination,
        config: DeliveryConfig,
        timing: DeliveryTiming,
        dedupe_index: DedupeIndex,
        journal: Journal | None,
        on_idle: Callable[[], bool],
    ) -> None:
        self.destination = destination
        self.append_size = AppendSize(config.slow_append_s, timing.retry)
        self._timing = timing
        self._dedupe_index = dedupe_index
        self._journal = journal
        self._on_idle = on_idle
        self._changed = threading.Condition()
        self._queue = CommitQueue(
            config, destination.breaker, self.append_size, timing.committer_linger_s
        )
        # Used on the committer's thread only:
        self._may_decide = False  # whether it holds the right to decide which rows are duplicates
        self._writer: DatasetWriter | None = None
        self._writer_kind: WriterKind | None = None
        destination.breaker.add_listener(self._wake)
        name = f"committer-{destination.dataset}"
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def request_opening(self, schema: pa.Schema, mode: WriteMode) -> Future[None]:
        """Request that the dataset is prepared for rows of `schema`.

        The returned future ends when the dataset is ready, or with the error. A caller that stops
        waiting must cancel the future, so that the dataset is not emptied later.
        """
        opening = actions.Opening(schema, mode)
        with self._changed:
            if self._queue.stopped:
                opening.ready.set_exception(actions.shutting_down())
            else:
                self._queue.request_opening(opening)
                opening.ready.add_done_callback(lambda _: self._wake())
                self._changed.notify_all()
        return opening.ready

    def submit_rows(self, rows: Rows) -> None:
        with self._changed:
            stopped = self._queue.stopped
            if not stopped:
                self._queue.waiting.append_rows(rows)
                self._changed.notify_all()
        if stopped:
            self._give_up([rows], actions.shutting_down())

    def flush(self) -> None:
        with self._changed:
            self._queue.request_flush()
            self._changed.notify_all()

    def drop_abandoned(self) -> None:
        """Release the rows of failed uploads, which clients send again."""
        with self._changed:
            abandoned, in_doubt = self._queue.remove_abandoned()
            if in_doubt:  # must precede the release of the right to decide on the other thread
                self._dedupe_index.invalidate()
            self._changed.notify_all()
        for rows in abandoned:
            rows.on_released()

    def close(self) -> None:
        """End the thread after its current action; give up waiting and later rows."""
        with self._changed:
            self._queue.stopped = True
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._queue.idle

    @property
    def num_waiting_rows(self) -> int:
        return self._queue.waiting.num_rows

    @property
    def holds_dataset(self) -> bool:
        return self._writer is not None

    def close_writer(self) -> None:
        """Close the dataset's writer. Called on the committer's thread only.

        The next append or opening opens another writer.
        """
        writer, self._writer, self._writer_kind = self._writer, None, None
        if writer is not None:
            try:
                writer.close()
            except Exception:
                log.exception("closing `%s`", self.destination.dataset)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # The methods below are called on the committer's thread only.

    def _run(self) -> None:
        while True:
            action = self._next_action()
            if isinstance(action, actions.Stop):
                break
            outcome = self._carry_out(action)
            with self._changed:
                self._queue.note_outcome(action, outcome, time.monotonic())
                self._changed.notify_all()
        self.destination.breaker.remove_listener(self._wake)
        for opening in action.openings:
            if opening.ready.set_running_or_notify_cancel():
                opening.ready.set_exception(actions.shutting_down())
        self._give_up(action.rows, actions.shutting_down())
        self._dedupe_index.invalidate()
        self._release_decision()
        self.close_writer()

    def _next_action(self) -> Action:
        with self._changed:
            while True:
                if self._may_decide and not self._queue.has_decided_groups:
                    self._release_decision()
                action = self._queue.decide(time.monotonic())
                if not isinstance(action, actions.Wait):
                    return action
                self._changed.wait(action.until - time.monotonic())

    def _release_decision(self) -> None:
        if self._may_decide:
            self._may_decide = False
            self._dedupe_index.release_decision()

    def _carry_out(self, action: Action) -> Outcome:
        match action:
            case actions.Open(opening):
                self._open(opening)
            case actions.Append(groups):
                return self._append(groups)
            case actions.Reject(group, error):
                self._settle_groups([group], error)
                self._dedupe_index.invalidate()
            case actions.GiveUp(rows, error, in_doubt):
                if in_doubt:
                    self._dedupe_index.invalidate()
                self._give_up(rows, error)
            case actions.Release(rows, in_doubt):
                if in_doubt:
                    self._dedupe_index.invalidate()
                for one in rows:
                    one.on_released()
            case actions.Rest():
                return self._on_idle()
        return None

    def _open(self, opening: actions.Opening) -> None:
        ready, breaker = opening.ready, self.destination.breaker
        if not ready.set_running_or_notify_cancel():
            return
        try:
            breaker.require_ready(self._queue)
            with breaker.guard_call(self._queue, proof=False):
                self._open_writer(opening.schema, opening.mode)
        except FletcherError as error:
            ready.set_exception(error)
        except Exception:
            log.exception("cannot open `%s`", self.destination.dataset)
            ready.set_exception(InternalError(f"`{self.destination.dataset}` cannot be opened"))
        else:
            ready.set_result(None)

    def _append(self, groups: Sequence[Group]) -> Outcome:
        try:
            outcome = self._store_groups(groups)
            if isinstance(outcome, actions.Stored):
                self._settle_groups(groups[: outcome.num_groups], None)
        except Exception:
            log.exception("`%s`: delivery failed", self.destination.dataset)
            self._dedupe_index.invalidate()
            error = InternalError("delivery failed; the server's log has the cause")
            for rows in (rows for group in groups for rows in group.rows):
                rows.upload.fail(error)
                if not rows.journaled:
                    rows.on_released()
            return None
        return outcome

    def _store_groups(self, groups: Sequence[Group]) -> Outcome:
        """Mark duplicates in uploads with `dedupe`, and store the groups that may be sent."""
        started = time.monotonic()
        num_groups = len(groups)
        decides = not groups[0].rows[0].journaled and any(group.dedupe_by for group in groups)
        if decides and not self._may_decide:
            self._may_decide = self._dedupe_index.acquire_decision(self._timing.decision_wait_s)
            if not self._may_decide:
                error = self._dedupe_index.pending_error()
                return actions.Unavailable(0, time.monotonic() - started, error)
        try:
            with self.destination.breaker.guard_call(self._queue):
                if decides:
                    num_groups = self._dedupe_index.decide_groups(groups)
                slow_down = self._append_groups(groups[:num_groups])
        except RETRYABLE as error:
            self.destination.telemetry.store_retries.add()
            self.close_writer()
            # Log only the first failure in a row. Log a refusal as too much only if the append had
            # full size, because a store with a low limit refuses again and again.
            news = self.append_size.share == 1 or not isinstance(error, OverloadedError)
            available = self.destination.breaker.unavailable_since is None
            if news and available and self._queue.failing is None:
                log.warning("`%s`: %s; trying again", self.destination.dataset, error)
            return actions.Unavailable(num_groups, time.monotonic() - started, error)
        except FletcherError as error:
            return actions.Refused(num_groups, error)
        except Exception:
            log.exception("`%s`: the store failed", self.destination.dataset)
            text = "storing failed in an unexpected way; the server's log has the cause"
            return actions.Refused(num_groups, InternalError(text))
        return actions.Stored(num_groups, time.monotonic() - started, slow_down)

    def _open_writer(self, schema: pa.Schema, mode: WriteMode) -> DatasetWriter:
        """The writer for rows of `schema`. Mode `overwrite` empties the dataset first.

        Raises:
            FletcherError: As in `Store.open_writer`, or because the journal's disk fails.
        """
        kind = writer_kind(schema, upsert=mode == "upsert")
        if self._writer is None or self._writer_kind != kind or mode == "overwrite":
            self.close_writer()
            if mode == "overwrite" and self._journal is not None:
                with _journal_errors():
                    self._journal.forget_settled()
            stored = schema.append(pa.field("batch_key", pa.utf8()))
            self._writer = self.destination.store.open_writer(
                self.destination.dataset, stored, mode
            )
            self._writer_kind = kind
            if mode == "overwrite":
                self._dedupe_index.invalidate()
        return self._writer

    def _append_groups(self, groups: Sequence[Group]) -> bool:
        """Store groups of one kind, except groups in doubt that the store has already.

        Groups in doubt whose rows replace others are always sent again. The store may lack their
        key only because later rows replaced theirs; those later rows are sent again as well, in the
        same order. Returns whether the store asks for a rest.

        Raises:
            FletcherError: As in `DatasetWriter.append`, or because the journal's disk fails.
        """
        telemetry = self.destination.telemetry
        (schema, _, upsert), journaled = groups[0].rows[0].kind
        null_vectors = self.destination.store.capabilities.null_vectors
        writer = self._open_writer(schema, "upsert" if upsert else "append")
        wanted = {group.batch_key: group for group in groups}
        in_doubt = [key for key, group in wanted.items() if group.in_doubt and not upsert]
        if in_doubt:
            for key in set(in_doubt).difference(writer.missing_keys(in_doubt)):
                del wanted[key]
        rows = {key: group.to_batch(null_vectors=null_vectors) for key, group in wanted.items()}
        batches = [batch for batch in rows.values() if batch.num_rows]
        num_rows = sum(batch.num_rows for batch in batches)
        if upsert and not journaled and self._journal is not None:
            # Settled groups in the journal must not be sent again later and replace these rows.
            # (Journaled rows need no sync here: they are sent again after the rows they replace.)
            with _journal_errors():
                self._journal.sync_notes()
        with (
            telemetry.stage_duration.time(stage="append"),
            telemetry.span("append", rows=num_rows, groups=len(batches)),
        ):
            slow_down = bool(batches) and writer.append(batches)
        counts_groups = self.destination.store.capabilities.counts_groups
        unknown = [
            key
            for key, group in wanted.items()
            if not group.is_recognized(rows[key].num_rows, counts_groups=counts_groups)
        ]
        if unknown and self._journal is not None:
            with _journal_errors():
                self._journal.settled_groups.add_keys(unknown)
        return slow_down

    def _settle_groups(self, groups: Sequence[Group], error: FletcherError | None) -> None:
        null_vectors = error is None and self.destination.store.capabilities.null_vectors
        for rows in (rows for group in groups for rows in group.rows):
            try:
                self._settle_rows(rows, error, null_vectors=null_vectors)
            except Exception:  # such as a full disk; these rows stay in the journal
                text = "`%s`: rows %d-%d cannot be settled"
                log.exception(text, self.destination.dataset, rows.first, rows.last)

    def _settle_rows(self, rows: Rows, error: FletcherError | None, *, null_vectors: bool) -> None:
        if error is not None:
            rows.upload.fail(error)
            rows.on_refused(error.message)
        else:
            num_stored = rows.num_rows - len(rows.places_not_stored(null_vectors=null_vectors))
            self.destination.telemetry.rows_stored.add(num_stored)
            if not rows.journaled:
                self._dedupe_index.add_rows(rows)
            rows.upload.settle_rows(rows.first, rows.last, stored=num_stored)
        rows.on_released()

    def _give_up(self, taken: Sequence[Rows], error: FletcherError) -> None:
        for rows in taken:
            if not rows.journaled:
                rows.upload.fail(error)
                rows.on_released()


@contextlib.contextmanager
def _journal_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(f"the journal's disk fails: {error.strerror}") from None
