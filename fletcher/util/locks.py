"""Exclusive locks between processes, which end with the process that holds them.

The `filelock` package takes locks on files, on file descriptors that this module opens and closes.
The package's class `FileLock` is not used, for two reasons. It releases the lock at interpreter
exit, when other threads may still write. Where the file system has no `flock`, it falls back to a
marker file, which stays after the process has ended.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import weakref
from collections.abc import Iterable
from pathlib import Path


class FileLock:
    """An exclusive advisory lock on a file, held from construction to `release`.

    The kernel releases the lock when the process ends, even by a crash. The file stays; its
    existence does not mean that it is locked. `remove` deletes it. Child processes do not inherit
    the lock, because its descriptor closes on exec. A second lock on the same file conflicts, even
    in the same process.

    A missing file is created with the permissions `mode`. Its folder must exist. If the file is
    locked already, `wait` makes the constructor wait until the lock is released.

    Raises:
        BlockingIOError: The file is locked already, and `wait` is off.
        OSError: The file cannot be opened or locked.
    """

    def __init__(self, path: Path, *, wait: bool = False, mode: int = 0o644) -> None:
        from filelock import lock_descriptor  # takes 10 ms, and few processes lock files

        self._path = path
        self._file: int | None = None
        while True:
            file = self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
            try:
                if not lock_descriptor(file, blocking=wait):
                    raise BlockingIOError(f"{path} is locked by another holder")
                if is_at(file, path):
                    return
            except BaseException:
                self.release()
                raise
            self.release()  # its holder removed the file meanwhile, so others lock a new one

    def release(self) -> None:
        """Release the lock. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def remove(self) -> None:
        """Delete the file, then release the lock.

        Whoever waits for the lock makes a new file.
        """
        if self._file is not None:
            with contextlib.suppress(OSError):  # it stays, which harms nobody
                self._path.unlink(missing_ok=True)
        self.release()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class NameLock:
    """An exclusive lock on names among the processes of this machine, until `release`.

    Each name is bound as an abstract Unix socket. So no file is left, any user's process conflicts,
    and the kernel releases the lock when the process ends. Containers with separate networks have
    separate names. The lock is also released when the object is deleted.

    Raises:
        BlockingIOError: A name is locked already, perhaps in this process.
        OSError: The lock cannot be taken.
    """

    def __init__(self, names: Iterable[str]) -> None:
        with contextlib.ExitStack() as held:
            for name in names:
                held.callback(os.close, _bind_name(name))
            self._release = weakref.finalize(self, held.pop_all().close)
        self._release.atexit = False  # other threads may still write then

    def release(self) -> None:
        """Release the lock. Idempotent. Thread-safe."""
        self._release()

    def __enter__(self) -> NameLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_at(file: int, path: Path) -> bool:
    """Whether an open file or folder is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _bind_name(name: str) -> int:
    """The descriptor of an abstract Unix socket, which has no file."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        try:
            bound.bind(f"\0fletcher-{digest}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BlockingIOError(f"{name} is locked by another holder") from None
            raise
        return bound.detach()
