"""Files of a journal's groups that the store refused for good."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from fletcher.delivery.journal.root import JournalSpace
from fletcher.delivery.journal.segment import (
    REJECTED,
    REVIVED,
    GroupInfo,
    JournaledGroup,
    group_metadata,
)
from fletcher.util.durable import sync_path

log = logging.getLogger(__name__)

_ROWS = re.compile(r"-(\d+)-(\d+)\Z")


class RejectedGroups:
    """One dataset's files `N-UPLOAD-FIRST-LAST.rejected`. Thread-safe.

    The files count in the journal's space from their writing to their deletion, whether the
    dataset has a sink or not.
    """

    def __init__(self, folder: Path, space: JournalSpace) -> None:
        self._folder = folder
        self._space = space
        self._any = True  # whether there may be files

    def add_group(self, group: JournaledGroup, reason: str) -> None:
        """Write a group to a separate file, and sync the file."""
        batch, path = group.read_batch(), self._path(group.segment.path, group.info)
        before = path.stat().st_size if path.exists() else 0  # an earlier attempt failed
        self._any = True
        with path.open("wb") as file:
            with pa.ipc.new_stream(file, group.schema) as writer:
                writer.write_batch(batch, custom_metadata=group_metadata(group.info, batch))
            file.flush()
            os.fsync(file.fileno())
        sync_path(self._folder)
        self._space.add_bytes(path.stat().st_size - before)
        log.error("journal: %s: rows were refused by the store: %s", path, reason)

    def has_group(self, group: JournaledGroup) -> bool:
        return self._path(group.segment.path, group.info).exists()

    def drop_group(self, group: JournaledGroup) -> None:
        """Delete the file of a group that is still in the journal.

        Both exist if the process was killed while it set the group aside.
        """
        path = self._path(group.segment.path, group.info)
        if path.exists():
            self._delete(path)

    def drop_replaced(self, upload_id: str, covers: Callable[[int, int], bool]) -> None:
        """Delete the files of an upload whose rows were sent again, and are journaled.

        `covers`: returns whether rows, given by first and last offset, are durable. Never raises
        an OSError; a file that cannot be deleted stays for a person.
        """
        if not self._any:
            return
        try:
            self._any = any(self._folder.glob(f"*{REJECTED}"))
            for path in self._folder.glob(f"*-{glob.escape(upload_id)}-*{REJECTED}"):
                rows = _ROWS.search(path.stem)
                prefix = path.stem[: rows.start()] if rows else ""
                if rows is None or prefix.partition("-")[2] != upload_id:
                    continue
                if covers(int(rows[1]), int(rows[2])):
                    self._delete(path)
                    log.info("journal: %s is deleted: its rows were sent again", path)
        except OSError:
            log.exception("journal: refused rows in %s cannot be deleted", self._folder)

    def _delete(self, path: Path) -> None:
        size = path.stat().st_size
        path.unlink()
        self._space.add_bytes(-size)

    def _path(self, segment: Path, info: GroupInfo) -> Path:
        number = segment.stem.removesuffix(REVIVED)
        return self._folder / f"{number}-{info.upload_id}-{info.first}-{info.last}{REJECTED}"
