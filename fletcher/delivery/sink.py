"""A dataset's way out of the house: its lane, and its journal before that where there is one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fletcher.config.delivery import DeliveryConfig
from fletcher.delivery.appender import Appender
from fletcher.delivery.breaker import Breaker
from fletcher.delivery.committer import Committer
from fletcher.delivery.dedupe.index import DedupeIndex, DedupeMemory
from fletcher.delivery.groups import Rows
from fletcher.delivery.journal.journal import Journal, JournalSpace
from fletcher.delivery.journal.segment import JournaledGroup
from fletcher.delivery.journal.settled_groups import SettledGroups
from fletcher.delivery.journal.writer import JournalWriter
from fletcher.stores.base import Store
from fletcher.telemetry.tracing import Telemetry


class DatasetSink:
    """Takes rows of uploads to one dataset.

    Args:
        store: The store.
        dataset: The dataset's name.
        config: Groups, appends, retries.
        breaker: The store's.
        telemetry: Where counts, durations and spans go.
        on_idle: Asked when nothing is under way; True lets the route end.
        journal: The dataset's journal; None: rows stay in memory until they are stored.
        space: What all journals share.
        known_space: Memory for what is known of datasets.
    """

    def __init__(
        self,
        store: Store,
        dataset: str,
        config: DeliveryConfig,
        breaker: Breaker,
        telemetry: Telemetry,
        on_idle: Callable[[DatasetSink], bool],
        *,
        journal: Journal | None,
        space: JournalSpace | None,
        dedupe_memory: DedupeMemory,
    ) -> None:
        # Guarded by Delivery. Who makes it is the first: the lane may ask before this is done.
        self.users = 1
        self.journal = journal
        self.left_behind: list[JournaledGroup] = journal.recover() if journal is not None else []
        self.dedupe_index = DedupeIndex(store, dataset, journal, dedupe_memory, telemetry)
        self._unsent = SettledGroups(journal.folder) if journal is not None else None
        self._on_idle = on_idle
        self._appender = Appender(
            store,
            dataset,
            telemetry,
            self.dedupe_index,
            on_empty=self._forget,
            on_replace=self._keep_settled,
            unsent=self._unsent,
        )
        self.committer = Committer(
            store,
            dataset,
            config,
            breaker,
            telemetry,
            self.dedupe_index,
            self._appender,
            on_idle=self._may_end,
        )
        # Two threads: rows of uploads that may have to wait for the store, to be told from those
        # that are in doubt there, hold up no others.
        self._outboxes: list[JournalWriter] = []
        if journal is not None and space is not None:
            self._outboxes = [
                JournalWriter(
                    journal,
                    space,
                    self.committer,
                    self.dedupe_index,
                    patience_s=config.store_retry_s,
                    telemetry=telemetry,
                )
                for _ in range(2)
            ]

    def submit_rows(self, rows: Rows) -> None:
        """Queues rows; never blocks, the streams' allowances bound what can be here."""
        if self._outboxes and rows.upload.journaled:
            self._outboxes[rows.upload.dedupe_by is not None].submit_rows(rows)
        else:
            self.committer.submit_rows(rows)

    def wait_written(self, timeout_s: float) -> bool:
        """Waits until nothing is journaled any more of uploads that failed before."""
        return all(journal_writer.wait_written(timeout_s) for journal_writer in self._outboxes)

    def flush(self) -> None:
        """Somebody waits for the rows that are here: don't wait for more."""
        self.committer.flush()

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until nothing is under way; False where something still is."""
        deadline = time.monotonic() + timeout_s
        waited = threading.Event()
        while not self.idle and time.monotonic() < deadline:
            self.committer.flush()
            waited.wait(0.02)
        return self.idle

    def _may_end(self) -> bool:
        """Whether the lane's thread, which asks, may end."""
        if self.users:  # seen without a lock: whoever comes from now on is seen by `on_idle`
            return False
        # Before the route is forgotten, for another one may open the dataset from then on.
        self._appender.close()
        if self.journal is not None:
            self.journal.sweep()
        return self._on_idle(self)

    def _forget(self) -> None:
        """The dataset is about to be emptied. Raises OSError."""
        if self.journal is not None and self._unsent is not None:
            self.journal.close()
            self.journal.sweep()
            self.journal.sync_notes()
            self._unsent.clear()

    def _keep_settled(self) -> None:
        """Rows that are in no journal are about to replace others. Raises OSError."""
        if self.journal is not None:
            self.journal.sync_notes()

    def release(self) -> None:
        """Closes the journal of a route that is idle and will not be used again."""
        for journal_writer in self._outboxes:
            journal_writer.close()
        if self.journal is not None:
            self.journal.close()
        self.dedupe_index.close()

    def leave(self) -> None:
        """`release`, and what is left on disk is counted by the dataset's next route."""
        self.release()
        if self.journal is not None:
            self.journal.leave()

    def close(self) -> None:
        """Ends the threads: what is in memory is given up, what is journaled stays on disk."""
        self.release()
        self.committer.close()
        if self.committer.thread is not threading.current_thread():
            self.committer.thread.join(30.0)

    @property
    def idle(self) -> bool:
        """Nothing is queued, journaled or being stored."""
        return all(journal_writer.idle for journal_writer in self._outboxes) and self.committer.idle
