"""One dataset's sink: its committer and, with a journal, its journal writers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fletcher.config.delivery import DeliveryConfig
from fletcher.delivery.committer import Committer
from fletcher.delivery.dedupe.index import DedupeIndex, DedupeMemory
from fletcher.delivery.groups import Destination, Rows
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.segment import JournaledGroup
from fletcher.delivery.journal.writer import JournalWriter
from fletcher.delivery.timing import DeliveryTiming


class DatasetSink:
    """Takes rows of uploads to one dataset. Thread-safe.

    Args:
        journal: The dataset's journal. If it is None, rows stay in memory until they are stored.
        on_idle: Called after some idle time. The sink ends if it returns True.

    Attributes:
        users: Number of connections that use the sink; guarded by the lock of `Delivery`. It is 1
            from the start, for the creator of the sink: the committer may offer to end before the
            constructor returns.
        recovered: Groups that an earlier process left in the journal, settled ones included.
    """

    def __init__(
        self,
        destination: Destination,
        config: DeliveryConfig,
        timing: DeliveryTiming,
        journal: Journal | None,
        dedupe_memory: DedupeMemory,
        on_idle: Callable[[DatasetSink], bool],
    ) -> None:
        self.users = 1
        self.journal = journal
        self.recovered: list[JournaledGroup] = journal.recover() if journal is not None else []
        self.dedupe_index = DedupeIndex(destination, journal, dedupe_memory)
        self._timing = timing
        self._on_idle = on_idle
        try:
            self.committer = Committer(
                destination, config, timing, self.dedupe_index, journal, self._may_end
            )
        except BaseException:  # the next sink of the dataset counts the journal again
            if journal is not None:
                journal.release_space()
            raise
        # The first writer is for uploads without `dedupe`, the second for uploads with it. Rows
        # with `dedupe` may have to wait until rows in doubt are settled, and must not delay others.
        self._writers: list[JournalWriter] = []
        if journal is not None:
            self._writers = [
                JournalWriter(
                    journal, self.committer, self.dedupe_index, config.store_retry_s, timing
                )
                for _ in range(2)
            ]

    def submit_rows(self, rows: Rows) -> None:
        """Queue rows. Never blocks: the streams' memory budget limits the queue."""
        if self._writers and rows.upload.terms.durability == "journal":
            self._writers[rows.upload.dedupe_by is not None].submit_rows(rows)
        else:
            self.committer.submit_rows(rows)

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no rows of failed uploads are being journaled; False on a timeout."""
        return all(writer.wait_written(timeout_s) for writer in self._writers)

    def flush(self) -> None:
        self.committer.flush()

    def wait_idle(self, timeout_s: float) -> bool:
        """Flush until the sink is idle; False if it still is not after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        waited = threading.Event()
        while not self.idle and time.monotonic() < deadline:
            self.flush()
            waited.wait(self._timing.flush_poll_s)
        return self.idle

    @property
    def idle(self) -> bool:
        """Whether no rows wait, are being journaled or are being stored."""
        return all(writer.idle for writer in self._writers) and self.committer.idle

    def retire(self) -> None:
        """Close everything except the committer. Called on the committer's thread.

        The sizes of groups that stay on disk are no longer counted. The dataset's next sink counts
        them again.
        """
        self._close_journal()
        if self.journal is not None:
            self.journal.release_space()
            self.journal.remove_empty_folder()

    def close(self) -> None:
        """End the threads. Rows in memory are given up; journaled rows stay on disk."""
        self._close_journal()
        self.committer.close()
        if self.committer.thread is not threading.current_thread():
            self.committer.thread.join(self._timing.close_timeout_s)

    def _close_journal(self) -> None:
        for writer in self._writers:
            writer.close()
        if self.journal is not None:
            self.journal.close()
        self.dedupe_index.close()

    def _may_end(self) -> bool:
        """Whether the committer may end. Called on the committer's thread."""
        if self.users:  # read without a lock, because `on_idle` checks again under a lock
            return False
        # Close the writer before `on_idle` forgets the sink: after that, a new sink may open the
        # dataset.
        self.committer.close_writer()
        if self.journal is not None:
            self.journal.sweep()
        return self._on_idle(self)
