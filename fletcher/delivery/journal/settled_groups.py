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
from fletcher.delivery.journal.root import disk_failure
from fletcher.errors import StoreUnavailableError
from fletcher.util.durable import read_regular, sync_path, write_atomically

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20
_KEPT_UPLOADS = 1000


class SettledGroups:
    """One dataset's file of settled groups. Its content is not kept in memory.

    A group is settled in one incarnation of the dataset (see `fletcher.stores.staging`). A line
    `=INCARNATION` in the file names that of the keys below it. Keys above the first such line
    belong to a dataset without an incarnation.

    Only one thread at a time may add keys.

    Attributes:
        incarnation: The incarnation of keys that are added.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "groups.unsent"
        self.incarnation = ""

    def add_keys(self, keys: Iterable[str]) -> None:
        """Append batch keys and sync the file.

        Raises:
            OSError: The disk cannot store the keys.
        """
        if self.add_keys_of(self.incarnation, keys) > _MAX_BYTES:
            try:
                self._compact()
            except (OSError, StoreUnavailableError) as error:  # the file stays as it is
                log.warning("journal: %s cannot be shortened: %s", self._path, error)

    def add_keys_of(self, incarnation: str, keys: Iterable[str]) -> int:
        """Append batch keys of an incarnation, and sync the file; return its size.

        Raises:
            OSError: The disk cannot store the keys.
        """
        is_new = not self._path.exists()
        lines = [*([f"={incarnation}"] if incarnation or not is_new else []), *keys]
        with self._path.open("ab") as file:
            # A line break before each key as well, because a crash may have cut off the last line.
            file.write("".join(f"\n{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if is_new:
            sync_path(self._path.parent)
        return size

    def ranges_of(self, upload_id: str, incarnation: str | None = None) -> list[tuple[int, int]]:
        """An upload's settled rows: inclusive ranges (first, last), sorted and merged.

        `incarnation`: None means any.

        Raises:
            StoreUnavailableError: The file cannot be read now.
        """
        found = self._read(incarnation).get(upload_id)
        return [] if found is None else found.ranges()

    def all_keys(self) -> list[str]:
        """Batch keys of all settled groups, merged. Raises as `ranges_of`."""
        found = self._read(None).items()
        return [batch_key(upload_id, *one) for upload_id, some in found for one in some.ranges()]

    def forget_upload(self, upload_id: str) -> None:
        """Remove the keys of an upload, whose rows were deleted from the store.

        Raises:
            StoreUnavailableError, OSError: The disk fails.
        """
        if not self.ranges_of(upload_id):
            return
        lines = read_regular(self._path).decode("utf-8", "replace").splitlines()
        kept = [line for line in lines if (parse_batch_key(line) or ("",))[0] != upload_id]
        write_atomically(self._path, "".join(f"{line}\n" for line in kept))

    def clear(self) -> None:
        """Delete the file, because its dataset is gone.

        Raises:
            OSError: The file cannot be deleted.
        """
        if self._path.exists():
            self._path.unlink()
            sync_path(self._path.parent)

    def _read(self, incarnation: str | None) -> dict[str, RangeSet]:
        """Ranges by upload id. The upload that got a key most recently comes last."""
        found: dict[str, RangeSet] = {}
        try:
            lines = read_regular(self._path).decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return found
        except OSError as error:
            raise disk_failure(error) from error
        current = ""
        for line in lines:
            if line.startswith("="):
                current = line[1:]
            parsed = parse_batch_key(line)
            if parsed is not None and incarnation in (None, current):
                upload_id, first, last = parsed
                ranges = found.pop(upload_id, RangeSet())
                ranges.add_range(first, last)
                found[upload_id] = ranges
        return found

    def _compact(self) -> None:
        """Merge ranges, and keep only the uploads that got a key most recently."""
        kept = list(self._read(self.incarnation).items())[-_KEPT_UPLOADS:]
        lines = [f"={self.incarnation}\n"]
        lines += (
            f"{batch_key(upload_id, *one)}\n" for upload_id, found in kept for one in found.ranges()
        )
        write_atomically(self._path, "".join(lines))
