"""The thread that makes a dataset's groups durable, with one sync for many groups.

Rows that wait here are in memory and not acknowledged. The writer puts them on disk, passes them to
the committer and acknowledges them. While the journal or the disk is full, rows wait: their streams
keep the memory reserved, and clients wait. Rows that may be duplicates of pending rows wait, too.

`WriteQueue` chooses an action under the writer's lock. The writer carries it out without the lock.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from fletcher.delivery import actions
from fletcher.delivery.committer import Committer
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.groups import Rows
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.segment import GroupInfo, JournaledGroup
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload
from fletcher.errors import FletcherError, JournalFullError, StoreUnavailableError
from fletcher.util.insist import insist
from fletcher.util.threads import start_thread

log = logging.getLogger(__name__)

WriterAction = actions.Wait | actions.Write | actions.GiveUp | actions.CloseSegment | actions.Stop

# Limit of rows for one sync. Writing so many rows takes far longer than the sync's milliseconds.
_SYNC_ROWS = 20_000


class WriteQueue:
    """State of one writer, and the choice of its next action. Not thread-safe.

    `decide` returns an action, and `note_outcome` takes the action's outcome. All times are from
    `time.monotonic`.

    Args:
        patience_s: How long the writer keeps trying to journal the same rows before it gives up.
    """

    def __init__(self, patience_s: float, timing: DeliveryTiming) -> None:
        self.stopped = False  # if True, rows are no longer accepted
        self._patience_s = patience_s
        self._timing = timing
        self._waiting: deque[Rows] = deque()
        self._held: list[Rows] = []  # rows whose last write failed
        self._next_try = 0.0
        self._deadline = 0.0
        self._needs_room = False
        self._failed: actions.GiveUp | None = None
        self._holds_rows = False
        self._close_at = math.inf  # time to close the open segment

    def append_rows(self, rows: Rows) -> None:
        self._waiting.append(rows)

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._held or self._failed or self._holds_rows)

    def decide(self, now: float) -> WriterAction:
        """The next action.

        The caller reports its outcome to `note_outcome`, except that of Wait and Stop.
        """
        action = self._next_action(now)
        self._holds_rows = isinstance(action, actions.Write | actions.GiveUp)
        return action

    def note_outcome(
        self, action: WriterAction, outcome: actions.Unwritten | None, now: float
    ) -> None:
        """Learn the outcome of an action; None if it succeeded."""
        self._holds_rows = False
        if not isinstance(action, actions.Write):
            return
        self._close_at = now + self._timing.segment_idle_s
        self._held = []
        if outcome is not None and outcome.retryable and now <= self._deadline:
            self._held = outcome.rows
            self._next_try = now + self._timing.journal_poll_s
            self._needs_room = True
        elif outcome is not None:
            self._failed = actions.GiveUp(outcome.rows, outcome.error)

    def _next_action(self, now: float) -> WriterAction:
        if self.stopped:
            rows = [*(self._failed.rows if self._failed else ()), *self._held, *self._waiting]
            stop = actions.Stop(rows)
            self._failed, self._held = None, []
            self._waiting.clear()
            return stop
        if self._failed is not None:
            failed, self._failed = self._failed, None
            return failed
        if self._held:
            return self._retry(now)
        if self._waiting:
            self._deadline = now + self._patience_s
            write = actions.Write(self._next_rows())
            for _ in write.rows:
                self._waiting.popleft()
            return write
        if self._close_at <= now:
            self._close_at = math.inf
            return actions.CloseSegment()
        return actions.Wait(self._close_at)

    def _retry(self, now: float) -> WriterAction:
        """Close the open segment to make room, then write the held rows after a pause."""
        if self._needs_room:
            self._needs_room = False
            return actions.CloseSegment(flush=True)
        return actions.Write(self._held) if self._next_try <= now else actions.Wait(self._next_try)

    def _next_rows(self) -> list[Rows]:
        """The oldest rows for one sync, all with the same schema and `dedupe_by`."""
        taken: list[Rows] = []
        num_rows = 0
        for rows in self._waiting:
            num_rows += rows.num_rows
            if taken and (
                num_rows > _SYNC_ROWS
                or rows.schema != taken[0].schema
                or rows.upload.dedupe_by != taken[0].upload.dedupe_by
            ):
                break
            taken.append(rows)
        return taken


class JournalWriter:
    """One of a dataset's journal writers. Its thread starts with the first rows.

    Args:
        journal: The dataset's journal, on which `recover` was called.
        patience_s: How long the writer waits for room in the journal, or for the right to decide
            which rows are duplicates, before an upload fails.
    """

    def __init__(
        self,
        journal: Journal,
        committer: Committer,
        dedupe_index: DedupeIndex,
        patience_s: float,
        timing: DeliveryTiming,
    ) -> None:
        self._journal = journal
        self._committer = committer
        self._dedupe_index = dedupe_index
        self._timing = timing
        self._dataset = committer.destination.dataset
        self._changed = threading.Condition()
        self._queue = WriteQueue(patience_s, timing)
        # Held from the check that rows' uploads have not failed until the rows are on disk.
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit_rows(self, rows: Rows) -> None:
        """Queue rows.

        Raises OverloadedError, without queueing the rows, if the thread cannot start.
        """
        with self._changed:
            stopped = self._queue.stopped
            if not stopped:
                if self._thread is None:
                    self._thread = start_thread(f"journal-writer-{self._dataset}", self._run)
                self._queue.append_rows(rows)
                self._changed.notify_all()
        if stopped:
            _give_up([rows], actions.shutting_down())

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no rows of failed uploads are being written; False on a timeout."""
        written = self._writing.acquire(timeout=timeout_s)
        if written:
            self._writing.release()
        return written

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._queue.idle

    def close(self) -> None:
        """End the thread after its current write, and give up the waiting rows."""
        with self._changed:
            self._queue.stopped = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    # The methods below are called on the writer's thread only.

    def _run(self) -> None:
        what = f"`{self._dataset}`: the journal writer"
        while not isinstance(action := insist(self._next_action, what), actions.Stop):
            outcome = insist(functools.partial(self._carry_out, action), what)
            insist(functools.partial(self._note_outcome, action, outcome), what)
        _give_up(action.rows, actions.shutting_down())

    def _note_outcome(self, action: WriterAction, outcome: actions.Unwritten | None) -> None:
        with self._changed:
            self._queue.note_outcome(action, outcome, time.monotonic())
            self._changed.notify_all()

    def _next_action(self) -> WriterAction:
        with self._changed:
            while True:
                action = self._queue.decide(time.monotonic())
                if not isinstance(action, actions.Wait):
                    return action
                left_s = action.until - time.monotonic()
                self._changed.wait(left_s if left_s < math.inf else None)

    def _carry_out(self, action: WriterAction) -> actions.Unwritten | None:
        """The outcome of an action. May be called again if it raised an error."""
        match action:
            case actions.Write(rows):
                return self._write(rows)
            case actions.GiveUp(rows, error):
                _give_up(rows, error)
            case actions.CloseSegment(flush):
                insist(self._journal.close, f"`{self._dataset}`: closing a segment")
                if flush:
                    insist(self._committer.flush, f"`{self._dataset}`: a flush")
        return None

    def _write(self, rows: list[Rows]) -> actions.Unwritten | None:
        wanted = rows
        try:
            has_room = self._journal.space.wait_for_room(self._timing.journal_poll_s)
            with self._writing:
                # Checked before every attempt: attempts take time, and meanwhile an upload may fail
                # and its client send the rows again.
                wanted = _release_abandoned(rows)
                if not wanted:
                    return None
                if not has_room:
                    raise self._journal.space.full_error()
                poll_s = self._timing.journal_poll_s
                with self._dedupe_index.deciding(wanted, wait_s=poll_s) as decided:
                    self._journal_groups(decided)
        except FletcherError as error:
            retryable = isinstance(error, JournalFullError | StoreUnavailableError)
            return actions.Unwritten(wanted, error, retryable)
        except BaseException as error:
            log.exception("journaling for `%s` failed", self._dataset)
            failure = StoreUnavailableError("the journal fails; the server's log has the cause")
            # A defect is reported at once. Want of memory or files may pass.
            passes = isinstance(error, OSError | MemoryError)
            return actions.Unwritten(wanted, failure, retryable=passes)
        return None

    def _journal_groups(self, groups: Sequence[Rows]) -> None:
        with self._committer.destination.telemetry.stage_duration.time(stage="journal"):
            journaled = self._journal.append_groups(
                [(_info_of(group), group.load_batch()) for group in groups], groups[0].schema
            )
        # From here on the groups are on disk. Rows that are not handed over would wait until the
        # next start, while their client sends them again.
        for group, on_disk in zip(groups, journaled, strict=True):
            for step in self._handover(group, on_disk):
                insist(step, f"`{self._dataset}`: handing over journaled rows")

    def _handover(self, group: Rows, on_disk: JournaledGroup) -> Iterator[Callable[[], None]]:
        """Steps after a group was journaled.

        The committer gets the rows before the acknowledgement, so that rows that the client sends
        after it are stored after this group.
        """
        yield lambda: self._dedupe_index.add_rows(group)
        yield lambda: self._committer.submit_rows(
            journaled_rows(group.upload, on_disk, self._journal)
        )
        yield lambda: group.upload.secure_rows(group.first, group.last)
        yield lambda: self._journal.rejected.drop_replaced(
            group.upload.upload_id, group.upload.covers
        )
        yield group.on_released


def journaled_rows(
    upload: Upload, on_disk: JournaledGroup, journal: Journal, *, in_doubt: bool = False
) -> Rows:
    """Rows of a journaled group for a committer.

    `in_doubt`: the store may hold the rows already.
    """
    info = on_disk.info
    return Rows(
        upload,
        on_disk.schema,
        info.first,
        info.num_rows,
        on_disk.num_bytes,
        info.failed,
        on_disk.read_batch,
        on_released=functools.partial(journal.settle_group, on_disk),
        journaled=True,
        on_refused=functools.partial(journal.rejected.add_group, on_disk),
        in_doubt=in_doubt,
        revived=on_disk.revived,
        excluded=info.excluded,
    )


def _info_of(rows: Rows) -> GroupInfo:
    upload = rows.upload
    return GroupInfo(
        upload.upload_id, rows.first, rows.last, rows.failed, upload.upsert, rows.excluded
    )


def _release_abandoned(rows: Sequence[Rows]) -> list[Rows]:
    """Release the rows of failed uploads, and return the other rows.

    The clients of failed uploads send their rows again.
    """
    wanted: list[Rows] = []
    for group in rows:
        if group.abandoned:
            insist(group.on_released, "releasing rows")
        else:
            wanted.append(group)
    return wanted


def _give_up(rows: Sequence[Rows], error: FletcherError) -> None:
    for group in rows:
        insist(functools.partial(group.upload.fail, error), "giving up rows")
        insist(group.on_released, "giving up rows")
