"""The thread that makes a dataset's groups durable, many with one sync.

Rows that wait here are in memory and not acknowledged. Rows that have passed are on disk, are
acknowledged, and go to the committer. A full journal or disk holds rows back: their streams hold
their memory, and clients wait. Rows that may be duplicates of pending rows are held back, too.

`WriteQueue` decides under the writer's lock; the writer acts without it.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence

from fletcher.delivery.actions import (
    CloseSegment,
    GiveUp,
    Stop,
    Unwritten,
    Wait,
    Write,
    shutting_down,
)
from fletcher.delivery.committer import Committer
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.groups import Rows
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.segment import GroupInfo, JournaledGroup
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload
from fletcher.errors import FletcherError, InternalError, JournalFullError, StoreUnavailableError

log = logging.getLogger(__name__)

WriterAction = Wait | Write | GiveUp | CloseSegment | Stop

# Rows of one sync: enough that its milliseconds are little beside the time to write them.
_SYNC_ROWS = 20_000


class WriteQueue:
    """State of one writer: `decide` returns actions, `note_outcome` ends them.

    Not thread-safe. All times are of `time.monotonic`.

    Args:
        patience_s: How long rows that cannot be journaled are tried.
    """

    def __init__(self, patience_s: float, timing: DeliveryTiming) -> None:
        self.stopped = False  # nothing is accepted any more
        self._patience_s = patience_s
        self._timing = timing
        self._waiting: deque[Rows] = deque()
        self._held: list[Rows] = []  # tried before
        self._next_try = 0.0
        self._deadline = 0.0
        self._needs_room = False
        self._failed: GiveUp | None = None
        self._holds_rows = False
        self._close_at = math.inf  # for the open segment

    def append_rows(self, rows: Rows) -> None:
        self._waiting.append(rows)

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._held or self._failed or self._holds_rows)

    def decide(self, now: float) -> WriterAction:
        """The next action; report its outcome, except of Wait and Stop."""
        action = self._next_action(now)
        self._holds_rows = isinstance(action, Write | GiveUp)
        return action

    def note_outcome(self, action: WriterAction, outcome: Unwritten | None, now: float) -> None:
        """Learn how an action went; None: all is done."""
        self._holds_rows = False
        if isinstance(action, Write):
            self._close_at = now + self._timing.segment_idle_s
            self._held = []
            if outcome is None:
                pass
            elif outcome.retryable and now <= self._deadline:
                self._held = outcome.rows
                self._next_try = now + self._timing.journal_poll_s
                self._needs_room = True
            else:
                self._failed = GiveUp(outcome.rows, outcome.error)

    def _next_action(self, now: float) -> WriterAction:
        if self.stopped:
            rows = [*(self._failed.rows if self._failed else ()), *self._held, *self._waiting]
            self._failed, self._held = None, []
            self._waiting.clear()
            return Stop(rows)
        if self._failed is not None:
            failed, self._failed = self._failed, None
            return failed
        if self._held:
            return self._retry(now)
        if self._waiting:
            self._deadline = now + self._patience_s
            return Write(self._take_rows())
        if self._close_at <= now:
            self._close_at = math.inf
            return CloseSegment()
        return Wait(self._close_at)

    def _retry(self, now: float) -> WriterAction:
        """Make room by closing the open segment, then try rows again after a pause."""
        if self._needs_room:
            self._needs_room = False
            return CloseSegment(flush=True)
        return Write(self._held) if self._next_try <= now else Wait(self._next_try)

    def _take_rows(self) -> list[Rows]:
        """Take the oldest groups of one schema and one kind of key, for one sync."""
        taken: list[Rows] = []
        num_rows = 0
        while self._waiting:
            rows = self._waiting[0]
            num_rows += rows.num_rows
            if taken and (
                num_rows > _SYNC_ROWS
                or rows.schema != taken[0].schema
                or rows.upload.dedupe_by != taken[0].upload.dedupe_by
            ):
                break
            taken.append(self._waiting.popleft())
        return taken


class JournalWriter:
    """One of a dataset's journal writers; its thread starts with the first rows.

    Args:
        journal: Recovered.
        patience_s: How long a full journal, or the right to decide what is a duplicate, is waited
            for before an upload fails.
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
        # Held from the check whether rows are still wanted until they are on disk.
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit_rows(self, rows: Rows) -> None:
        """Queue a group. Never blocks: the streams' allowances bound what is queued."""
        with self._changed:
            stopped = self._queue.stopped
            if not stopped:
                self._queue.append_rows(rows)
                self._changed.notify_all()
                if self._thread is None:
                    name = f"journal-writer-{self._dataset}"
                    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                    self._thread.start()
        if stopped:
            _give_up([rows], shutting_down())

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no rows of failed uploads are being written; False: some may be."""
        written = self._writing.acquire(timeout=timeout_s)
        if written:
            self._writing.release()
        return written

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._queue.idle

    def close(self) -> None:
        """End the thread after its current write; rows that wait are given up."""
        with self._changed:
            self._queue.stopped = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    # What follows is called on the writer's thread only.

    def _run(self) -> None:
        while True:
            action = self._next_action()
            if isinstance(action, Stop):
                break
            outcome = self._carry_out(action)
            with self._changed:
                self._queue.note_outcome(action, outcome, time.monotonic())
                self._changed.notify_all()
        _give_up(action.rows, shutting_down())

    def _next_action(self) -> WriterAction:
        with self._changed:
            while True:
                action = self._queue.decide(time.monotonic())
                if not isinstance(action, Wait):
                    return action
                left_s = action.until - time.monotonic()
                self._changed.wait(left_s if left_s < math.inf else None)

    def _carry_out(self, action: WriterAction) -> Unwritten | None:
        match action:
            case Write(rows):
                return self._write(rows)
            case GiveUp(rows, error):
                _give_up(rows, error)
            case CloseSegment(flush):
                self._journal.close()
                if flush:
                    self._committer.flush()
        return None

    def _write(self, rows: list[Rows]) -> Unwritten | None:
        wanted = rows
        try:
            has_room = self._journal.space.wait_for_room(self._timing.journal_poll_s)
            with self._writing:
                # Checked each time: a try may take long, and the client may send the rows again.
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
            return Unwritten(wanted, error, retryable)
        except Exception:
            log.exception("journaling for `%s` failed", self._dataset)
            failure = InternalError("the journal failed; the server's log has the cause")
            return Unwritten(wanted, failure, retryable=False)
        return None

    def _journal_groups(self, groups: Sequence[Rows]) -> None:
        with self._committer.destination.telemetry.stage_duration.time(stage="journal"):
            journaled = self._journal.append_groups(
                [(_info_of(group), group.load_batch()) for group in groups], groups[0].schema
            )
        for group, on_disk in zip(groups, journaled, strict=True):
            self._dedupe_index.add_rows(group)
            # Before the acknowledgement, so that what its client sends then is stored behind it.
            self._committer.submit_rows(journaled_rows(group.upload, on_disk, self._journal))
            group.upload.secure_rows(group.first, group.last)
            group.on_released()


def journaled_rows(
    upload: Upload, on_disk: JournaledGroup, journal: Journal, *, in_doubt: bool = False
) -> Rows:
    """Rows of a journaled group for a committer; `in_doubt`: the store may hold them."""
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
        on_refused=functools.partial(journal.reject_group, on_disk),
        in_doubt=in_doubt,
        excluded=info.excluded,
    )


def _info_of(rows: Rows) -> GroupInfo:
    upload = rows.upload
    return GroupInfo(
        upload.upload_id, rows.first, rows.last, rows.failed, upload.upsert, rows.excluded
    )


def _release_abandoned(rows: Sequence[Rows]) -> list[Rows]:
    """Release rows of failed uploads; their clients send them again."""
    wanted: list[Rows] = []
    for group in rows:
        if group.abandoned:
            group.on_released()
        else:
            wanted.append(group)
    return wanted


def _give_up(rows: Sequence[Rows], error: FletcherError) -> None:
    for group in rows:
        group.upload.fail(error)
        group.on_released()
