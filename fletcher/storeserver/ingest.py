"""Writing side of the store server: hands rows to a committer per dataset."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from fletcher.stores.base import WriteMode
from fletcher.stores.lance.store import LanceStore
from fletcher.storeserver.group_committer import (
    CommitStream,
    GroupCommitter,
    SubmittedRows,
    draining,
)


class Ingest:
    """Writing side of a store server. Thread-safe.

    Args:
        store: Receives the rows; it must have no other writer.
    """

    def __init__(self, store: LanceStore) -> None:
        self._store = store
        self._mutex = threading.Lock()
        self._committers: dict[str, GroupCommitter] = {}
        self._closed = False

    def submit_rows(
        self,
        dataset: str,
        batches: Sequence[pa.RecordBatch],
        *,
        mode: WriteMode,
        whole: bool,
        stream: CommitStream,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Future[int]:
        """Queue rows to be stored in one commit; blocks while too much is pending.

        Args:
            dataset: Created by the first write.
            batches: Rows of one schema.
            mode: `overwrite` empties the dataset first.
            whole: The batches hold all rows of their batch keys, so that a stored key is a repeat.
                Otherwise the same stream may send more rows of a key.
            stream: State of the call that sent the rows.
            is_cancelled: Whether the client has given up. It may have sent these rows again, and
                newer ones since, so rows that replace others or empty the dataset are then refused.

        Returns:
            The number of rows stored, without repeats, once they are on disk.

        Raises:
            DrainingError: The server is shutting down.
            StoreUnavailableError: The client has given up.
        """
        rows = SubmittedRows(list(batches), mode, whole, stream)
        self._committer(dataset).submit(rows, is_cancelled if mode != "append" else lambda: False)
        return rows.done

    def call_committer(self, dataset: str, function: Callable[[GroupCommitter], Any]) -> Any:
        """Call a function on the dataset's commit thread, after submitted rows."""
        return self._committer(dataset).submit_call(function).result()

    def pressure(self, dataset: str) -> float:
        """Fill level of the dataset's queue: 0 to 1, above 1 for a single large group."""
        with self._mutex:
            committer = self._committers.get(dataset)
        return committer.pressure if committer else 0.0

    def close(self, timeout_s: float) -> bool:
        """Refuse new rows and commit the submitted ones; False after the timeout."""
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
