"""One dataset's journal: groups on disk that are acknowledged and not yet stored.

A journal is a folder of segments. Each segment is an Arrow IPC stream file with one schema. Once a
group is in the journal, its first and last row do not change. Several groups are synced to disk
together, and are acknowledged after that. A segment is deleted when all its groups are settled.

Until then, notes in a file beside the segment say which of its groups are settled. If a settled
group were sent again, it would replace newer rows, or reappear in a dataset that was replaced.
Notes are written without a sync, so they survive a killed process but not a power loss. They are
synced before each change that a settled group would undo if it were sent again:

- before a later segment is deleted,
- before a later segment gets a note about rows that replace others,
- before rows that replace others are sent from memory, and
- before a dataset is replaced.

After a crash the last segment may end in half a group, which was never acknowledged. The half group
is cut off, and kept in a file in case a crash was not the cause. If the disk changed some bytes,
the intact groups before and after them still go to the store. The log names the lost groups, and
the segment is kept so that a person can examine it.

| file | content |
|---|---|
| `N.arrow` | a segment with groups to send, or one that is being written |
| `N-again.arrow` | a segment that a person had sent again, see `revive_segments` |
| `N.settled` | notes of settled groups of `N.arrow` |
| `N.sent` | a sent segment whose rows may not be durable in the store yet; kept for `retention_s` |
| `N-UPLOAD-FIRST-LAST.rejected` | a group that the store refused for good |
| `N.damaged` | a segment with changed bytes |
| `N.torn` | half a group, cut off from the end of a segment |
| `groups.unsent` | see `SettledGroups` |
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from fletcher.delivery.journal.recovery import dispose, recover_segments
from fletcher.delivery.journal.rejected import RejectedGroups
from fletcher.delivery.journal.root import FULL_RETRY_MS, JournalSpace, disk_failure
from fletcher.delivery.journal.segment import (
    REVIVED,
    SENT,
    WAITING,
    GroupInfo,
    JournaledGroup,
    Segment,
    group_metadata,
)
from fletcher.delivery.journal.settled_groups import SettledGroups
from fletcher.errors import FletcherError, JournalFullError
from fletcher.util.durable import make_folder, sync_path

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Journal:
    """One dataset's segments. Thread-safe.

    Args:
        folder: Folder of the dataset's segments; created if missing.
        segment_bytes: Size of a segment at which a new one begins.
        retention_s: Callback that returns for how many seconds segments are kept after they were
            sent. It returns 0 for a store whose rows are durable when it acknowledges them:
            segments are then deleted.

    Attributes:
        settled_groups: Settled groups that the store cannot report as such.
        rejected: Groups that the store refused for good.

    Raises:
        JournalFullError: The disk is full.
        StoreUnavailableError: The disk fails for another reason.
    """

    def __init__(
        self,
        folder: Path,
        space: JournalSpace,
        *,
        segment_bytes: int,
        retention_s: Callable[[], float],
    ) -> None:
        self.folder = folder
        self.space = space
        self.settled_groups = SettledGroups(folder)
        self.rejected = RejectedGroups(folder, space)
        self._segment_bytes = segment_bytes
        self._retention_s = retention_s
        self._appending = threading.Lock()
        self._sweeping = threading.Lock()
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._file: BinaryIO | None = None  # the last segment's file, while it is open
        self._writer: Any = None
        self._uncut: Segment | None = None  # holds groups of an append that failed
        self._next_number = 0
        try:
            make_folder(folder)
        except OSError as error:
            raise _disk_error(error) from None

    def recover(self) -> list[JournaledGroup]:
        """Read all groups of segments that an earlier process left, in order.

        Settled groups are included. Call `recover` before the first `append_groups`.

        Raises:
            JournalFullError, StoreUnavailableError: A file cannot be read or synced now. No file
                was set aside for that.
        """
        try:
            for path in self.folder.iterdir():
                with contextlib.suppress(ValueError):
                    self._next_number = max(self._next_number, int(path.stem.split("-")[0]) + 1)
            for segment in recover_segments(self.folder):
                self._segments.append(segment)
                self.space.add_bytes(segment.num_bytes)
        except BaseException as error:
            self.release_space()
            if isinstance(error, OSError):
                raise _disk_error(error) from error
            raise
        groups = [group for segment in self._segments for group in segment.groups]
        again = {one.info.upload_id for one in groups if one.segment.path.stem.endswith(REVIVED)}
        for group in groups:
            group.revived = group.info.upload_id in again
        return groups

    def append_groups(
        self, groups: Sequence[tuple[GroupInfo, pa.RecordBatch]], schema: pa.Schema
    ) -> list[JournaledGroup]:
        """Write groups of one schema and sync them, so that they survive a power loss.

        If an error is raised, none of these groups is kept. Until they are truncated from the file,
        each append fails. Otherwise a sender could send the rows again in other groups, and they
        would be stored twice.

        Raises:
            JournalFullError: The disk is full.
            OSError: The disk fails for another reason.
        """
        with self._appending:
            try:
                self._cut_off()
                return self._append(groups, schema)
            except Exception as error:
                self._undo()
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    raise _disk_error(error) from None
                raise

    def _append(
        self, groups: Sequence[tuple[GroupInfo, pa.RecordBatch]], schema: pa.Schema
    ) -> list[JournaledGroup]:
        segment, file = self._open_segment(schema)
        written: list[JournaledGroup] = []
        for info, batch in groups:
            offset = file.tell()
            self._writer.write_batch(batch, custom_metadata=group_metadata(info, batch))
            written.append(JournaledGroup(info, schema, segment, offset, file.tell() - offset))
        file.flush()
        os.fsync(file.fileno())
        segment.path.stat()  # raises if the file was deleted: its rows would be lost
        with self._lock:
            size, kept = file.tell(), segment.groups + written
            grown = size - segment.num_bytes
            # From here on nothing fails, so that `_undo` never cuts off groups that are kept.
            segment.groups = kept
            segment.unsettled += len(written)
            segment.num_bytes = size
        self.space.add_bytes(grown)
        return written

    def settle_group(self, group: JournaledGroup) -> None:
        """Note that a group is settled; delete segments without waiting groups.

        Idempotent.
        """
        segment = group.segment
        if group.settled:
            return
        failure: OSError | None = None
        if group.info.upsert:  # else a power loss might keep this note and lose earlier ones
            try:
                self.sync_notes(before=segment)
            except OSError as error:
                failure = error
        with self._lock:
            segment.unsettled -= 1
            group.settled = True
            done = segment.unsettled == 0
            segment.note_settled(group)
            try:
                if failure is not None:
                    raise failure  # the note is kept, and written together with the next one
                segment.write_notes()
            except OSError as error:
                log.warning("journal: %s cannot be written: %s", segment.notes, error)
        if done:
            self.sweep()

    def sync_notes(self, before: Segment | None = None) -> None:
        """Sync the notes of all segments, or only of those older than `before`.

        Synced notes survive a power loss.

        Raises:
            OSError: The notes cannot be written or synced.
        """
        with self._sweeping:
            with self._lock:
                place = None if before is None else self._segments.index(before)
                segments = self._segments[:place]
            self._sync_notes(segments)

    def sweep(self) -> None:
        """Delete segments whose groups are all settled, oldest first.

        The open segment is not deleted.
        """
        with self._sweeping:
            with self._lock:
                last = self._segments[-1] if self._file is not None else None
                done = [one for one in self._segments if not one.unsettled and one is not last]
            if not done:
                return
            try:
                retention_s = self._retention_s()
            except FletcherError:
                return  # the store does not answer yet, so its retention time is unknown
            for segment in done:
                try:
                    self._delete(segment, retention_s)
                except OSError:
                    log.exception("journal: %s cannot be deleted", segment.path)
                    return

    def prepare_replacement(self) -> None:
        """Prepare the journal before its dataset is replaced.

        Raises:
            OSError: The notes cannot be synced, or groups that failed cannot be cut off.
        """
        self.close()
        with self._appending:
            self._cut_off()
        self.sweep()
        self.sync_notes()

    def waiting_groups(self) -> list[JournaledGroup]:
        """Groups that are not settled, in the order in which they were written."""
        with self._lock:
            return [one for seg in self._segments for one in seg.groups if not one.settled]

    def close(self) -> None:
        """Close the open segment, and delete it if all its groups are settled."""
        with self._appending:
            self._end_segment()

    def release_space(self) -> None:
        """Stop counting the bytes of a closed journal.

        The next `Journal` of the same folder counts them again.
        """
        self.space.add_bytes(-self.num_bytes)

    def remove_empty_folder(self) -> None:
        """Delete the folder of a closed journal if it is empty, for short starts."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(segment.num_bytes for segment in self._segments)

    def _open_segment(self, schema: pa.Schema) -> tuple[Segment, BinaryIO]:
        if self._file is not None:
            segment = self._segments[-1]
            if segment.num_bytes < self._segment_bytes and segment.schema.equals(
                schema, check_metadata=True
            ):
                return segment, self._file
            self._end_segment()
        path = self.folder / f"{self._next_number:012d}{WAITING}"
        self._next_number += 1
        segment = Segment(path, schema)
        try:
            file = path.open("xb")
        except FileNotFoundError:  # somebody deleted the folder
            make_folder(self.folder)
            file = path.open("xb")
        with self._lock:
            self._file = file
            self._segments.append(segment)
        self._writer = pa.ipc.new_stream(file, schema)
        sync_path(self.folder)
        return segment, file

    def _end_segment(self) -> None:
        with self._lock:
            file, self._file = self._file, None
            if file is None:
                return
        with contextlib.suppress(OSError):
            file.close()
        self.sweep()

    def _delete(self, segment: Segment, retention_s: float) -> None:
        with self._lock:
            earlier = self._segments[: self._segments.index(segment)]
        now = time.time()
        # Earlier segments may hold rows that this segment's rows replaced. Once this segment is
        # deleted, those older rows must not be sent again.
        self._sync_notes(earlier)
        dispose(segment, kept=retention_s > 0)
        sync_path(self.folder)
        with self._lock:  # after the deletion, so that a failed one is tried again
            self._segments.remove(segment)
        self.space.add_bytes(-segment.num_bytes)
        segment.notes.unlink(missing_ok=True)
        for path in self.folder.glob(f"*{SENT}"):
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime > retention_s:
                    path.unlink()

    def _sync_notes(self, segments: Sequence[Segment]) -> None:
        synced: list[tuple[Segment, int]] = []
        for segment in segments:
            if not segment.path.exists():  # somebody deleted it, so its groups cannot come back
                continue
            with self._lock:
                segment.write_notes()
                num_notes = segment.num_notes
            if segment.num_synced < num_notes:
                sync_path(segment.notes)
                synced.append((segment, num_notes))
        if synced:
            sync_path(self.folder)  # so that the names of the files survive, too
        for segment, num_notes in synced:
            segment.num_synced = num_notes

    def _undo(self) -> None:
        """Cut off groups that were written, at least in part, by a failed append."""
        if self._file is not None:  # else no segment could be created
            self._uncut = self._segments[-1]
            self._end_segment()  # may write bytes that are still buffered; they are cut off below
        try:
            self._cut_off()
        except OSError as error:
            log.warning("journal: %s holds groups that failed: %s", self.folder, error)

    def _cut_off(self) -> None:
        if self._uncut is not None:
            with contextlib.suppress(FileNotFoundError):  # deleted, as all its groups were settled
                os.truncate(self._uncut.path, self._uncut.num_bytes)
                sync_path(self._uncut.path)
            self._uncut = None


def _disk_error(error: OSError) -> FletcherError:
    if error.errno in _NO_ROOM:
        return JournalFullError(
            "the journal's disk is full; try again later",
            field="journal",
            retry_after_ms=FULL_RETRY_MS,
        )
    return disk_failure(error)
