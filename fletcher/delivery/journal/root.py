"""The folder of all journals of a server: its lock, contents and size limit."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fletcher.delivery.journal.segment import REJECTED, REVIVED, SENT, WAITING
from fletcher.errors import ConfigError, JournalFullError, StoreUnavailableError
from fletcher.util.durable import make_folder, sync_path
from fletcher.util.locks import FileLock

# Time after which clients of a full journal should try again.
FULL_RETRY_MS = 1000


class JournalSpace:
    """Size limit of all journals of a server together. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._changed = threading.Condition()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until the journals are smaller than the limit; False on a timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self.used_bytes < self.max_bytes, timeout_s)

    def full_error(self) -> JournalFullError:
        return JournalFullError(
            f"the journal holds {self.used_bytes} of at most {self.max_bytes} bytes, and the store "
            "takes no rows; try again later",
            retry_after_ms=FULL_RETRY_MS,
        )

    def add_bytes(self, num_bytes: int) -> None:
        """Count bytes that were written, or, if negative, deleted."""
        with self._changed:
            self.used_bytes += num_bytes
            self._changed.notify_all()


def folder_name(address: str) -> str:
    """Name of the folder with the journals of the store at an address.

    Journaled rows never go to another address.
    """
    scheme, _, rest = address.partition(":")
    if not rest.startswith("//"):  # a file path, perhaps relative to the working folder
        rest = str(Path(rest).absolute())
    return f"{scheme}-{hashlib.sha256(rest.encode()).hexdigest()[:12]}"


def journal_folders(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield each journal under `root`: its store's folder name, dataset and folder."""
    for store in filter(Path.is_dir, paths_in(root)):
        for folder in filter(Path.is_dir, paths_in(store)):
            yield store.name, folder.name, folder


def paths_in(folder: Path) -> list[Path]:
    """The sorted content of a folder; none if it is gone, as servers delete journals."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


@dataclass(frozen=True, slots=True)
class JournalContent:
    """Content of one journal's folder, by the names of its files.

    Attributes:
        store: Name of the store's folder, see `folder_name`.
        waits: Whether some segments have groups that may have to be sent.
        rejected_bytes: Size of the groups that the store refused for good.
    """

    store: str
    dataset: str
    folder: Path
    waits: bool
    rejected_bytes: int


def survey_journals(root: Path) -> list[JournalContent]:
    """The content of all journals under `root`, without those that are empty.

    Deletes empty folders, and opens no file. Called before the first sink is made.
    """
    found = []
    for store, dataset, folder in journal_folders(root):
        paths = paths_in(folder)
        if paths:
            waits = any(path.suffix == WAITING for path in paths)
            rejected = sum(path.stat().st_size for path in paths if path.suffix == REJECTED)
            found.append(JournalContent(store, dataset, folder, waits, rejected))
        else:
            folder.rmdir()
    return found


def revive_segments(folder: Path, again: list[Path] | None = None) -> int:
    """Queue segments again, after all others; return their number.

    `again`: these files of the folder. None: all sent and rejected ones.
    """
    used = [int(path.stem.partition("-")[0]) for path in folder.glob("0*")]
    number = max(used, default=-1) + 1
    if again is None:
        again = [path for path in folder.iterdir() if path.suffix in (SENT, REJECTED)]
    for path in sorted(again):
        path.rename(folder / f"{number:012d}{REVIVED}{WAITING}")
        number += 1
    sync_path(folder)
    return len(again)


def lock_journal(root: Path) -> ExitStack:
    """Lock the folder of all journals for this process, until the result is closed.

    One lock file is in the folder, a second one beside it. If the folder is deleted while a server
    uses it, the second lock still stops another server.

    Raises:
        ConfigError: The folder cannot be used, or another process has locked it.
    """
    remedy = "give another `home`, or `--max-journal 0` to go without a journal"
    places = [root / ".lock"]
    try:
        with ExitStack() as held:
            make_folder(root)
            if os.access(root.parent, os.W_OK):  # else nobody deletes the folder
                places.append(root.with_name(f".{root.name}.lock"))
            for place in places:
                held.enter_context(FileLock(place, mode=0o600))
            return held.pop_all()
    except BlockingIOError:
        raise ConfigError(
            f"another server uses the journal in {str(root)!r}; {remedy}", field="home"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the journal's folder {str(root)!r} cannot be written: {error.strerror}; {remedy}",
            field="home",
        ) from None


def disk_failure(error: OSError) -> StoreUnavailableError:
    """Error for a journal whose disk fails, which says nothing about the store."""
    return StoreUnavailableError(f"the journal's disk fails: {error.strerror}", field="journal")
