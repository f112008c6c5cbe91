"""Writing side of the store server: passes rows to one committer per dataset."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fletcher.stores.lance.store import LanceStore
from fletcher.storeserver.group_committer import GroupCommitter, draining
from fletcher.storeserver.submissions import SubmittedCall, SubmittedRows

# Longest wait for the commits of a staged dataset before it replaces another.
END_COMMITTER_S = 60.0


class Ingest:
    """Writing side of a store server. Thread-safe.

    Nothing else writes to the store.
    """

    def __init__(self, store: LanceStore) -> None:
        self._store = store
        self._mutex = threading.Lock()
        self._committers: dict[str, GroupCommitter] = {}
        self._closed = False

    def submit_rows(
        self, dataset: str, rows: SubmittedRows, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Future[int]:
        """Queue rows that are stored in one commit. Blocks while too much is pending.

        Args:
            dataset: Name of the dataset. The first write creates it.
            rows: Rows to store.
            is_cancelled: Callback that returns whether the client has given up. Such a client may
                have sent these rows again and newer rows after them. Rows that replace others are
                therefore refused if the client has given up.

        Returns:
            A future that ends when the rows are on disk. Its result is the number of stored rows,
            without repeats.

        Raises:
            DrainingError: The server is shutting down.
            StoreUnavailableError: The client has given up.
        """
        appends = rows.mode == "append"
        self._committer(dataset).submit(rows, (lambda: False) if appends else is_cancelled)
        return rows.done

    def call_committer(self, dataset: str, function: Callable[[GroupCommitter], Any]) -> Any:
        """Call a function on the dataset's commit thread, and return its result.

        The function is called after all rows that were submitted before.
        """
        call = SubmittedCall(function)
        self._committer(dataset).submit(call)
        return call.done.result()

    def end_committer(self, dataset: str) -> None:
        """Commit a dataset's submitted rows, and end its thread."""
        with self._mutex:
            committer = self._committers.pop(dataset, None)
        if committer is not None:
            committer.stop()
            committer.join(END_COMMITTER_S)

    def pressure(self, dataset: str) -> float:
        """Fill level of the dataset's queue, 0 to 1.

        Above 1 if the queue holds a single group larger than the limit.
        """
        with self._mutex:
            committer = self._committers.get(dataset)
        return committer.pressure if committer else 0.0

    def close(self, timeout_s: float) -> bool:
        """Refuse new rows and commit the submitted ones; False on a timeout."""
        with self._mutex:
            self._closed = True
            committers = list(self._committers.values())
        for committer in committers:
            committer.stop()
        deadline = time.monotonic() + timeout_s
        ended = [committer.join(deadline - time.monotonic()) for committer in committers]
        return all(ended)

    def _committer(self, dataset: str) -> GroupCommitter:
        with self._mutex:
            if self._closed:
                raise draining()
            if dataset not in self._committers:
                self._committers[dataset] = GroupCommitter(self._store, dataset)
            return self._committers[dataset]
