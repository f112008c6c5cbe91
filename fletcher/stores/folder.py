"""Folder of an embedded store: its creation, its writers and their locks."""

from __future__ import annotations

import threading
from pathlib import Path

from fletcher.errors import StoreError, StoreUnavailableError
from fletcher.stores.base import DatasetWriter
from fletcher.util.durable import make_folder
from fletcher.util.locks import FileLock


class StoreFolder:
    """Folder of an embedded store, with its open writers. Thread-safe.

    Args:
        path: Created if missing.

    Raises:
        StoreError: The folder cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            make_folder(path)
        except OSError as error:
            raise StoreError(
                f"the store's folder {path} cannot be made: {error.strerror}; give `store` "
                "or `home` a folder that can be written",
                field="store",
            ) from error
        self._mutex = threading.Lock()
        self._writers: set[DatasetWriter] = set()

    def lock_dataset(self, dataset: str) -> FileLock:
        """Take the right to write to a dataset.

        Lance rebases a stale commit silently, so two writers would store a group twice unnoticed.

        Raises:
            StoreUnavailableError: Another writer holds the lock, or its file cannot be opened.
        """
        try:
            return FileLock(self.path / f".{dataset}.lock")
        except BlockingIOError as error:
            raise StoreUnavailableError(
                f"dataset `{dataset}` is being written by another process or upload; wait for it "
                "to end, or let both write through one server",
                field="dataset",
                retry_after_ms=1000,
            ) from error
        except OSError as error:
            raise StoreUnavailableError(
                f"dataset `{dataset}` cannot be locked for writing: {error.strerror}",
                field="dataset",
            ) from error

    def add_writer(self, writer: DatasetWriter) -> None:
        """Keep a writer for `close_writers`."""
        with self._mutex:
            self._writers.add(writer)

    def remove_writer(self, writer: DatasetWriter) -> None:
        """Forget a closed writer."""
        with self._mutex:
            self._writers.discard(writer)

    def close_writers(self) -> None:
        """Close the writers that are still open."""
        with self._mutex:
            writers = list(self._writers)
        for writer in writers:
            writer.close()
