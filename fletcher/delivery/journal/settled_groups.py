"""Groups that are settled and of which the store cannot tell later.

It got none of their rows: all were duplicates, or all failed. Or not all, and it counts them. Or
they replace others by id, and may be replaced: a group that went so, sent again, would replace what
replaced it. So a file beside the dataset's journal tells of them, and a client whose rows were
acknowledged finds them so after a restart. Batch keys, a line each.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from fletcher.core.ranges import RangeSet
from fletcher.core.schema import batch_key, parse_batch_key
from fletcher.util.durable import sync_path

log = logging.getLogger(__name__)

UNSENT = ".unsent"
_MAX_BYTES = 1 << 20
_KEPT_UPLOADS = 1000


class SettledGroups:
    """One dataset's file; nothing of it is kept in memory. One thread adds.

    Args:
        folder: The dataset's journal.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"groups{UNSENT}"

    def add(self, keys: Iterable[str]) -> None:
        """Notes groups and syncs that. Raises OSError."""
        is_new = not self._path.exists()
        with self._path.open("ab") as file:
            # A line of its own, whatever a crash left of the one before.
            file.write("".join(f"\n{key}\n" for key in keys).encode())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if is_new:
            sync_path(str(self._path.parent))
        if size > _MAX_BYTES:
            try:
                self._shorten()
            except OSError as error:  # a full disk: it stays long
                log.warning("journal: %s cannot be shortened: %s", self._path, error)

    def ranges(self, upload_id: str) -> list[tuple[int, int]]:
        """Row offsets of an upload that were noted: inclusive (first, last), sorted, merged."""
        found = self._read().get(upload_id)
        return [] if found is None else found.ranges()

    def clear(self) -> None:
        """The dataset is emptied, and duplicates are none any more. Raises OSError."""
        if self._path.exists():
            self._path.unlink()
            sync_path(str(self._path.parent))

    def _read(self) -> dict[str, RangeSet]:
        """By upload, that noted last at the end."""
        found: dict[str, RangeSet] = {}
        try:
            lines = self._path.read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return found
        for parsed in map(parse_batch_key, lines):
            if parsed is not None:
                upload_id, first, last = parsed
                ranges = found.pop(upload_id, RangeSet())
                ranges.add_range(first, last)
                found[upload_id] = ranges
        return found

    def _shorten(self) -> None:
        """Joins ranges, and forgets uploads that others came after."""
        kept = list(self._read().items())[-_KEPT_UPLOADS:]
        short = self._path.with_suffix(".tmp")
        with short.open("wb") as file:
            for upload_id, ranges in kept:
                lines = (f"{batch_key(upload_id, *one)}\n" for one in ranges.ranges())
                file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
        short.replace(self._path)
        sync_path(str(self._path.parent))
