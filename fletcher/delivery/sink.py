"""One dataset's sink: its journal writers, if it has a journal, and its committer."""

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
        journal: None: rows stay in memory until they are stored.
        on_idle: Called after some idle time; True lets the sink end.

    Attributes:
        users: Number of connections that use the sink; guarded by `Delivery`. Its maker is the
            first: the committer may offer to end before the constructor returns.
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
        self.committer = Committer(
            destination, config, timing, self.dedupe_index, journal, self._may_end
        )
        # Rows of uploads with `dedupe` may have to wait until rows in doubt are settled; a writer
        # for them alone lets the others pass.
        self._writers: list[JournalWriter] = []
        if journal is not None:
            self._writers = [
                JournalWriter(
                    journal, self.committer, self.dedupe_index, config.store_retry_s, timing
                )
                for _ in range(2)
            ]

    def submit_rows(self, rows: Rows) -> None:
        """Queue rows. Never blocks: the streams' allowances bound what is queued."""
        if self._writers and rows.upload.terms.durability == "journal":
            self._writers[rows.upload.dedupe_by is not None].submit_rows(rows)
        else:
            self.committer.submit_rows(rows)

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no rows of uploads that failed before are being journaled."""
        return all(writer.wait_written(timeout_s) for writer in self._writers)

    def flush(self) -> None:
        self.committer.flush()

    def wait_idle(self, timeout_s: float) -> bool:
        """Flush until nothing is under way; False if something still is."""
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
        """Close all but the committer, which calls this as it ends.

        Groups that are left on disk are counted by the dataset's next sink.
        """
        self._close_journal()
        if self.journal is not None:
            self.journal.release_space()

    def close(self) -> None:
        """End the threads: rows in memory are given up, journaled rows stay on disk."""
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
        """Whether the committer, on whose thread this is called, may end."""
        if self.users:  # without a lock: `on_idle` sees later users
            return False
        # Before the sink is forgotten, because a new sink may open the dataset from then on.
        self.committer.close_writer()
        if self.journal is not None:
            self.journal.sweep()
        return self._on_idle(self)
