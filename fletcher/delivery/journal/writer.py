"""Brings a dataset's groups into its journal, many with one sync, and from there to its lane.

What waits here is in memory and not acknowledged; what has passed is on disk and is. A journal that
is full, or whose disk is, holds groups back: their streams hold their memory, and clients wait. So
do rows that may be duplicates of rows that the lane has on their way (see `known`).
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from fletcher.delivery.committer import Committer
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.groups import Rows
from fletcher.delivery.journal.journal import Journal, JournalSpace
from fletcher.delivery.journal.segment import GroupInfo, JournaledGroup
from fletcher.delivery.upload import Upload
from fletcher.errors import FletcherError, InternalError, JournalFullError, StoreUnavailableError
from fletcher.telemetry.tracing import Telemetry

log = logging.getLogger(__name__)

# One sync for this much: enough that its milliseconds are little beside the writing.
_SYNC_ROWS = 20_000
_FULL_POLL_S = 0.2
# A segment that is still open takes room though all its groups are stored: it is ended when nothing
# more comes for this long. Shorter makes more files, longer keeps room from other datasets.
_IDLE_S = 1.0


class JournalWriter:
    """A dataset's journal and its thread.

    Args:
        journal: The dataset's; recovered.
        space: What all journals share.
        lane: Where groups go from here.
        known: What the dataset holds.
        patience_s: How long a full journal, or the right to decide what is a duplicate, is waited
            for before an upload gets an error.
        telemetry: Where durations go.
    """

    def __init__(
        self,
        journal: Journal,
        space: JournalSpace,
        committer: Committer,
        known: DedupeIndex,
        *,
        patience_s: float,
        telemetry: Telemetry,
    ) -> None:
        self._journal = journal
        self._space = space
        self._committer = committer
        self._known = known
        self._patience_s = patience_s
        self._telemetry = telemetry
        self._changed = threading.Condition()
        self._pending: deque[Rows] = deque()
        self._writing = False
        self._journaling = threading.Lock()  # from the choice of what is wanted till it is on disk
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None  # from the first group on

    def submit_rows(self, group: Rows) -> None:
        """Queues a group; never blocks, the streams' allowances bound what can be here."""
        with self._changed:
            closing = self._closing.is_set()
            if not closing:
                self._pending.append(group)
                self._changed.notify_all()
                if self._thread is None:
                    name = f"outbox-{self._committer.dataset}"
                    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                    self._thread.start()
        if closing:
            self._give_up([group], _shutting_down())

    def wait_written(self, timeout_s: float) -> bool:
        """Waits until nothing comes any more of uploads that failed before; False: it still may."""
        written = self._journaling.acquire(timeout=timeout_s)
        if written:
            self._journaling.release()
        return written

    @property
    def idle(self) -> bool:
        """Nothing waits to be journaled."""
        with self._changed:
            return not self._pending and not self._writing

    def close(self) -> None:
        """Ends the thread; what was not journaled is given up."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._something_to_do, _IDLE_S)
                taken = self._take()
                self._writing = bool(taken)
                if self._closing.is_set():
                    taken += self._pending
                    self._pending.clear()
                    self._writing = False
                    break
            if not taken:
                self._journal.close()
                with self._changed:
                    self._changed.wait_for(self._something_to_do)
                continue
            try:
                self._write(taken)
            except FletcherError as error:
                self._give_up(taken, error)
            except Exception:
                log.exception("journaling for `%s` failed", self._committer.dataset)
                self._give_up(taken, InternalError("the journal failed; the log has more"))
            with self._changed:
                self._writing = False
                self._changed.notify_all()
        self._give_up(taken, _shutting_down())

    def _something_to_do(self) -> bool:
        return bool(self._pending) or self._closing.is_set()

    def _take(self) -> list[Rows]:
        """The oldest groups of one schema and known by one, as many as one sync is good for."""
        taken: list[Rows] = []
        num_rows = 0
        while self._pending:
            group = self._pending[0]
            full = num_rows + group.num_rows > _SYNC_ROWS and not self._closing.is_set()
            if taken and (
                full
                or group.schema != taken[0].schema
                or group.upload.dedupe_by != taken[0].upload.dedupe_by
            ):
                break
            self._pending.popleft()
            taken.append(group)
            num_rows += group.num_rows
        return taken

    def _write(self, taken: list[Rows]) -> None:
        """Journals the rows; those that stay in `taken` where it fails are to be given up."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                has_room = self._space.wait_for_room(_FULL_POLL_S)
                with self._journaling:
                    # Each time: this may take long, and who sends them again be here already.
                    taken[:] = self._wanted(taken)
                    if not taken:
                        return
                    if not has_room:
                        raise self._space.full()
                    with self._known.deciding(taken, wait_s=_FULL_POLL_S) as decided:
                        self._journal_all(decided)
            except (JournalFullError, StoreUnavailableError):
                if self._closing.is_set() or time.monotonic() > deadline:
                    raise
                self._journal.close()  # its open segment may be what takes the room
                self._committer.flush()
                self._closing.wait(_FULL_POLL_S)
            else:
                return

    def _wanted(self, taken: Sequence[Rows]) -> list[Rows]:
        """Without rows of failed uploads: their clients were told, and send them again."""
        wanted: list[Rows] = []
        for group in taken:
            if group.upload.failure is None:
                wanted.append(group)
            else:
                group.released()
        return wanted

    def _journal_all(self, groups: Sequence[Rows]) -> None:
        with self._telemetry.stage_duration.time(stage="journal"):
            journaled = self._journal.append(
                [(_info(group), group.load()) for group in groups], groups[0].schema
            )
        for group, on_disk in zip(groups, journaled, strict=True):
            self._known.add(group)
            # Before it is acknowledged: what its client sends then goes to the store behind it.
            self._committer.submit_rows(from_journal(group.upload, on_disk, self._journal))
            group.upload.secure_rows(group.first, group.last)
            group.released()

    def _give_up(self, groups: Sequence[Rows], error: FletcherError) -> None:
        for group in groups:
            group.upload.fail(error)
            group.released()


def from_journal(
    upload: Upload, on_disk: JournaledGroup, journal: Journal, *, doubtful: bool = False
) -> Rows:
    """A journaled group on its way to the store."""
    info = on_disk.info
    return Rows(
        upload,
        on_disk.schema,
        info.first,
        info.last - info.first + 1,
        on_disk.num_bytes,
        info.failed,
        on_disk.load,
        released=functools.partial(journal.settle, on_disk),
        journaled=True,
        refused=functools.partial(journal.reject, on_disk),
        doubtful=doubtful,
        unsent=info.unsent,
    )


def _shutting_down() -> InternalError:
    return InternalError("the server is shutting down")


def _info(group: Rows) -> GroupInfo:
    return GroupInfo(
        group.upload.upload_id,
        group.first,
        group.last,
        group.failed,
        group.upload.upsert,
        group.unsent,
    )
