"""Making files survive a power loss."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def sync_path(path: str) -> None:
    """Syncs a file or a folder to its disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing, whose names survive a power loss.

    A folder that is there is synced too: whoever made it may have died before that.

    Raises:
        OSError: It cannot be made.
    """
    above = [path, *path.parents]
    lowest = next(index for index, one in enumerate(above) if one.exists())
    for one in reversed(above[: lowest + 1]):
        one.mkdir(exist_ok=True)
        with contextlib.suppress(PermissionError):  # a folder that is not ours
            sync_path(str(one.parent))
