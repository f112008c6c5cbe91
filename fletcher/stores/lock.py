"""One writer a dataset: an advisory lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from fletcher.errors import StoreUnavailableError


class WriterLock:
    """The right to write to one dataset, held from construction to `release`.

    Lance rebases a stale commit silently, so two writers would store a group twice unseen. The
    kernel drops the lock when the process ends, however it ends; the file stays and means nothing.

    Raises:
        StoreUnavailableError: Somebody else holds it.
    """

    def __init__(self, path: Path, dataset: str) -> None:
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise StoreUnavailableError(
                f"dataset `{dataset}` is being written by another process or upload; wait for it "
                "to end, or let both write through one server",
                field="dataset",
                retry_after_ms=1000,
            ) from error

    def release(self) -> None:
        """Lets the dataset go. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
