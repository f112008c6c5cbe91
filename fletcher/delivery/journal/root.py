"""A home's journals: which there are, who has them, and what makes their files wait again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fletcher.delivery.journal.segment import REJECTED, SENT, WAITING
from fletcher.errors import ConfigError
from fletcher.util.durable import make_folder, sync_path


def journal_folders(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Store's folder, dataset and folder of each journal under `root`."""
    for store in sorted(path for path in root.glob("*") if path.is_dir()):
        for folder in sorted(path for path in store.glob("*") if path.is_dir()):
            yield store.name, folder.name, folder


def revive_segments(folder: Path) -> int:
    """Makes sent and rejected segments wait again, as new ones behind the others; how many."""
    used = [int(path.stem.partition("-")[0]) for path in folder.glob("0*")]
    number = max(used, default=-1) + 1
    again = sorted(path for path in folder.iterdir() if path.suffix in (SENT, REJECTED))
    for path in again:
        path.rename(folder / f"{number:012d}{WAITING}")
        number += 1
    sync_path(str(folder))
    return len(again)


def lock_journal(folder: Path) -> int:
    """Takes the journal for this process until the descriptor that is returned is closed.

    Raises:
        ConfigError: The folder cannot be used, or another process has it.
    """
    try:
        make_folder(folder)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the journal's folder {str(folder)!r} cannot be written: {error.strerror}; give "
            "another `home`, or `--max-journal 0` to go without a journal",
            field="home",
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(
            f"another server uses the journal in {str(folder)!r}; give each its own `home`, or "
            "`--max-journal 0` to go without a journal",
            field="home",
        ) from None
    return descriptor
