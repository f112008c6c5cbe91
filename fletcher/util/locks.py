"""Exclusive locks between processes, bound to the life of their holder.

The `filelock` package takes the lock on a descriptor that stays ours. Its `FileLock` class is not
used: it releases at interpreter exit, when other threads may still write, and falls back to a mere
marker file, which outlives its process, where the file system has no `flock`.
"""

from __future__ import annotations

import os
from pathlib import Path


class FileLock:
    """An exclusive advisory lock on a file, held from construction to `release`.

    The kernel drops the lock when the process ends, however it ends. The file stays and means
    nothing. Child processes do not inherit the lock: its descriptor closes on exec. A second lock
    on the same file in the same process conflicts as well.

    A missing file is created with the permissions `mode`; its folder must exist. With `wait` a lock
    that another holds is waited for.

    Raises:
        BlockingIOError: Another lock on the file is held, and `wait` is off.
        OSError: The file cannot be opened or locked.
    """

    def __init__(self, path: Path, *, wait: bool = False, mode: int = 0o644) -> None:
        from filelock import lock_descriptor  # takes 10 ms, and few processes lock anything

        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            if not lock_descriptor(self._file, blocking=wait):
                raise BlockingIOError(f"{path} is locked by another holder")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
