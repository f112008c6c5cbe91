"""Files and folders that survive a crash or a power cut.

No library is used, because libraries for atomic writes do not sync the folder, or are no longer
maintained.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


def sync_path(path: Path | str) -> None:
    """Sync a file's content, or a folder's list of names, to disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_regular(path: Path) -> bytes:
    """Read a file; refuse anything else, because reading a named pipe may never end.

    Raises:
        OSError: The path is no regular file, or the file cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and sync their names to disk.

    The name of an existing folder is synced, too, because the process that made the folder may have
    died before the sync.
    """
    ancestors = [path, *path.parents]
    lowest = next(index for index, folder in enumerate(ancestors) if folder.exists())
    for folder in reversed(ancestors[: lowest + 1]):
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(PermissionError):  # the parent belongs to another user
            sync_path(folder.parent)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a folder to `target` durably; an old `target` gets the folder's name.

    Both names change at once, so `target` is a complete folder at any time, and after a crash. On a
    file system that cannot exchange names, a crash between two renames can leave no `target`, and
    the old one as `FOLDER.old`.

    Raises:
        OSError: A folder cannot be renamed.
    """
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        aside = folder.with_name(f"{folder.name}.old")
        target.rename(aside)
        try:
            folder.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(folder)
    sync_path(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two paths at once; False if the system cannot."""
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextlib.contextmanager
def atomic_path(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` durably when the block ends.

    At any time, and after a crash, readers find either the old file or the complete new one. If the
    block raises an exception, the temporary file is deleted and `path` stays as it was.

    Args:
        path: The file to write; its folder must exist.
        unique: Use a random temporary name, for writers that share no lock. The default name is
            `.NAME.tmp`. The next writer uses that name again, so crashes leave at most one such
            file.

    Raises:
        OSError: The file cannot be written, synced or renamed.
    """
    token = f".{secrets.token_hex(4)}" if unique else ""
    temporary = path.with_name(f".{path.name}{token}.tmp")
    try:
        yield temporary
        sync_path(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_atomically(path: Path, content: bytes | str, *, unique: bool = False) -> None:
    """Replace a file's content completely or not at all, see `atomic_path`.

    Text is encoded as UTF-8.
    """
    with atomic_path(path, unique=unique) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
