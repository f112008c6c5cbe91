"""Finished groups that the store cannot report, and that must not be sent again.

There are three cases:

- The store got none of the group's rows, because all were duplicates or failed.
- The store got only some of the rows, and recognizes a group by its number of rows.
- The rows replace others by id, and may have been replaced since. If such a group were sent again,
  it would replace newer rows.

A file in the dataset's journal folder lists the batch keys of these groups, one a line. Thanks to
the file, the rows still count as acknowledged after a restart.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from fletcher.core.ranges import RangeSet
from fletcher.core.schema import batch_key, parse_batch_key
from fletcher.util.durable import sync_path, write_atomically

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20
_KEPT_UPLOADS = 1000


class SettledGroups:
    """One dataset's file of settled groups. Its content is not kept in memory.

    Only one thread at a time may add keys.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "groups.unsent"

    def add_keys(self, keys: Iterable[str]) -> None:
        """Append batch keys and sync the file.

        Raises:
            OSError: The disk cannot store the keys.
        """
        is_new = not self._path.exists()
        with self._path.open("ab") as file:
            # A line break before each key as well, because a crash may have cut off the last line.
            file.write("".join(f"\n{key}\n" for key in keys).encode())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if is_new:
            sync_path(self._path.parent)
        if size > _MAX_BYTES:
            try:
                self._compact()
            except OSError as error:  # such as a full disk; the file stays as it is
                log.warning("journal: %s cannot be shortened: %s", self._path, error)

    def ranges_of(self, upload_id: str) -> list[tuple[int, int]]:
        """An upload's settled rows: inclusive ranges (first, last), sorted and merged."""
        found = self._read().get(upload_id)
        return [] if found is None else found.ranges()

    def clear(self) -> None:
        """Delete the file, because the dataset is about to be emptied.

        Raises:
            OSError: The file cannot be deleted.
        """
        if self._path.exists():
            self._path.unlink()
            sync_path(self._path.parent)

    def _read(self) -> dict[str, RangeSet]:
        """Ranges by upload id. The upload that got a key most recently comes last."""
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

    def _compact(self) -> None:
        """Merge ranges, and keep only the uploads that got a key most recently."""
        kept = list(self._read().items())[-_KEPT_UPLOADS:]
        lines = (
            f"{batch_key(upload_id, *one)}\n" for upload_id, found in kept for one in found.ranges()
        )
        write_atomically(self._path, "".join(lines))
