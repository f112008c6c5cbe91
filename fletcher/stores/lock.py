"""One writer a dataset, one server a folder: advisory locks that die with their process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from fletcher.errors import StoreError, StoreUnavailableError


class _FileLock:
    """Held from construction to `release`.

    The kernel drops it when the process ends, however it ends; the file stays and means nothing.

    Raises:
        BlockingIOError: Somebody else holds it.
        OSError: The file cannot be opened or locked.
    """

    def __init__(self, path: Path) -> None:
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Lets it go. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class WriterLock(_FileLock):
    """The right to write to one dataset.

    Lance rebases a stale commit silently, so two writers would store a group twice unseen.

    Raises:
        StoreUnavailableError: Somebody else holds it.
        OSError: Its file cannot be opened.
    """

    def __init__(self, path: Path, dataset: str) -> None:
        try:
            super().__init__(path)
        except BlockingIOError as error:
            raise StoreUnavailableError(
                f"dataset `{dataset}` is being written by another process or upload; wait for it "
                "to end, or let both write through one server",
                field="dataset",
                retry_after_ms=1000,
            ) from error


class ServerLock(_FileLock):
    """The right to serve a folder; who writes to a dataset of it still takes its WriterLock.

    Raises:
        StoreError: Another server holds it, or its file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        try:
            # No dataset's lock: a dataset has a name.
            super().__init__(folder / ".lock")
        except BlockingIOError:
            raise StoreError(
                f"the folder {folder} is served by another `fletcher store`; use that one, or "
                "give this one a `path` of its own",
                field="path",
            ) from None
        except OSError as error:
            raise StoreError(
                f"the folder {folder} cannot be locked: {error.strerror}", field="path"
            ) from None
