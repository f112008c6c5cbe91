"""Making files survive a power loss."""

from __future__ import annotations

import os


def sync_path(path: str) -> None:
    """Syncs a file or a folder to its disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
