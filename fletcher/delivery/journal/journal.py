"""Groups of rows on disk, from the moment they are acknowledged until they are stored.

A dataset's journal is a folder of segments, Arrow IPC stream files of one schema each. A record
batch in them is a group of rows of one upload, whose extent is frozen by being written here; its
custom metadata says which upload and rows, and a CRC-32 over it all. Groups are synced
before they are acknowledged, several at a time; a segment is deleted when all its groups are
stored. Until then notes beside it say which are: sent again, they would replace newer rows, or come
back into a dataset that was emptied since. The notes outlive a kill as they are. They are synced
before anything outlives a power loss that what they note, sent again, would undo: before a later
segment goes or has a note of its own of rows that replace others, before such rows go to the store
from memory, and before a dataset is emptied.

After a crash the last segment may end in half a group, which was never acknowledged: it is cut off,
and kept in case that it was not the crash.
Where a disk changed bytes, the groups around them still go to the store; what was lost is reported,
and the segment is kept for a person.

Names: `N.arrow` waits or is written, `N.sent` is kept for `retention_s` because its store
acknowledges before it is durable, `N.damaged` is for a person to look at, `N.torn` is half a group,
`N.rejected` holds groups that the store refused for good, `N.settled` is the notes of `N.arrow`;
beside them `groups.unsent` (see `SettledGroups`).
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

from fletcher.delivery.journal.segment import (
    DAMAGED,
    REJECTED,
    SENT,
    SETTLED,
    TORN,
    WAITING,
    Damage,
    GroupInfo,
    JournaledGroup,
    Segment,
    group_metadata,
    mend_notes,
    read_segments,
)
from fletcher.errors import (
    FletcherError,
    JournalFullError,
    StoreUnavailableError,
)
from fletcher.util.durable import make_folder, sync_path

log = logging.getLogger(__name__)

_FULL_RETRY_MS = 1000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JournalSpace:
    """Bytes that all journals of a server may take together.

    Args:
        max_bytes: The limit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._changed = threading.Condition()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Waits until the journals take less than they may; False where they still do not."""
        with self._changed:
            return self._changed.wait_for(lambda: self.used_bytes < self.max_bytes, timeout_s)

    def full(self) -> JournalFullError:
        """Why a group cannot be taken now."""
        return JournalFullError(
            f"the journal holds {self.used_bytes} of at most {self.max_bytes} bytes and the store "
            "takes none; try again later",
            retry_after_ms=_FULL_RETRY_MS,
        )

    def add(self, num_bytes: int) -> None:
        """Counts what is there already, or (negative) what has gone."""
        with self._changed:
            self.used_bytes += num_bytes
            self._changed.notify_all()


class Journal:
    """One dataset's segments. One thread appends; `settle` may be called from another.

    Args:
        folder: Where the segments are; made if need be.
        space: What it may take.
        segment_bytes: Size at which a new segment begins.
        retention_s: Tells how long segments are kept after they were sent; 0: not at all, for
            stores that are durable when they acknowledge.

    Raises:
        JournalFullError, StoreUnavailableError: The disk is full, or fails otherwise.
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
        self._space = space
        self._segment_bytes = segment_bytes
        self._retention_s = retention_s
        self._appending = threading.Lock()
        self._sweeping = threading.Lock()
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._file: BinaryIO | None = None  # of the last segment, while it is written
        self._writer: Any = None
        self._next_number = 0
        try:
            make_folder(folder)
        except OSError as error:
            raise _disk_error(error) from None

    def recover(self) -> list[JournaledGroup]:
        """Reads what an earlier process left; call it before the first `append`.

        Returns:
            Its groups, those too that are settled, in the order they were written.
        """
        groups: list[JournaledGroup] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(ValueError):
                self._next_number = max(self._next_number, int(path.stem) + 1)
        found = list(read_segments(self.folder.glob(f"*{WAITING}")))
        for path, segment in sorted(found, key=lambda one: one[0]):
            if isinstance(segment, Damage):
                path.rename(path.with_suffix(DAMAGED))
                log.error("journal: %s is set aside, it cannot be read: %s", path, segment)
                continue
            for one in segment.damage:
                log.error("journal: %s is damaged, and lost %s", path, one)
            if segment.torn is not None:
                try:
                    _cut(segment, segment.torn)
                except OSError as error:  # a full disk: it is not read, so it may stay
                    log.warning("journal: %s ends in half a group: %s", path, error)
            if not segment.groups:
                _dispose(segment, kept=False)
                continue
            sync_path(str(path))  # its writer may have died before that
            mend_notes(segment.notes)
            segment.unsettled = sum(not group.settled for group in segment.groups)
            if not segment.unsettled:
                segment.num_bytes = 0  # takes no room from others: it goes at the next sweep
            self._segments.append(segment)
            self._space.add(segment.num_bytes)
            groups += segment.groups
        for notes in self.folder.glob(f"*{SETTLED}"):
            if not notes.with_suffix(WAITING).exists():
                notes.unlink()
        sync_path(str(self.folder))
        return groups

    def append(
        self, groups: Sequence[tuple[GroupInfo, pa.RecordBatch]], schema: pa.Schema
    ) -> list[JournaledGroup]:
        """Writes groups of one schema and syncs them: afterwards they survive a power loss.

        Raises:
            JournalFullError: The disk is full; nothing of these groups is kept.
            OSError: The disk fails otherwise; the same.
        """
        with self._appending:
            try:
                return self._append(groups, schema)
            except Exception as error:
                self._undo()
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    raise _disk_error(error) from None
                raise

    def _append(
        self, groups: Sequence[tuple[GroupInfo, pa.RecordBatch]], schema: pa.Schema
    ) -> list[JournaledGroup]:
        segment, file = self._current(schema)
        written: list[JournaledGroup] = []
        for info, batch in groups:
            offset = file.tell()
            self._writer.write_batch(batch, custom_metadata=group_metadata(info, batch))
            written.append(JournaledGroup(info, schema, segment, offset, file.tell() - offset))
        file.flush()
        os.fsync(file.fileno())
        with self._lock:
            grown = file.tell() - segment.num_bytes
            segment.num_bytes += grown
            segment.groups += written
            segment.unsettled += len(written)
        self._space.add(grown)
        return written

    def settle(self, group: JournaledGroup) -> None:
        """The group is stored for good: its segment goes when all its groups have gone."""
        segment = group.segment
        failure: OSError | None = None
        if group.info.upsert:  # a disk may keep this note and not those that were written before
            try:
                self.sync_notes(before=segment)
            except OSError as error:
                failure = error
        with self._lock:
            segment.unsettled -= 1
            group.settled = True
            done = segment.unsettled == 0
            segment.note(group)
            try:
                if failure is not None:
                    raise failure  # it is written with the next
                segment.write_notes()
            except OSError as error:
                log.warning("journal: %s cannot be written: %s", segment.notes, error)
        if done:
            self.sweep()

    def sync_notes(self, before: Segment | None = None) -> None:
        """Afterwards nothing that is settled comes back, whatever dies.

        Args:
            before: Only what is in earlier segments.

        Raises:
            OSError: The disk does not take the notes.
        """
        with self._sweeping:
            with self._lock:
                place = None if before is None else self._segments.index(before)
                segments = self._segments[:place]
            self._sync_notes(segments)

    def sweep(self) -> None:
        """Deletes the segments of which nothing waits, but the open one; the oldest first."""
        with self._sweeping:
            with self._lock:
                last = self._segments[-1] if self._file is not None else None
                done = [one for one in self._segments if not one.unsettled and one is not last]
            if not done:
                return
            try:
                retention_s = self._retention_s()
            except FletcherError:
                return  # left by an earlier process, and the store is not there to be asked
            for segment in done:
                try:
                    self._dispose(segment, retention_s)
                except OSError:
                    log.exception("journal: %s cannot be deleted", segment.path)
                    return

    def waiting(self) -> list[JournaledGroup]:
        """Groups that are not settled, in the order they were written."""
        with self._lock:
            return [one for seg in self._segments for one in seg.groups if not one.settled]

    def reject(self, group: JournaledGroup, reason: str) -> None:
        """Keeps a group that the store refused for good for a person to find; settle it after."""
        info = group.info
        name = f"{group.segment.path.stem}-{info.upload_id}-{info.first}-{info.last}{REJECTED}"
        batch = group.load()
        with (self.folder / name).open("wb") as file:
            with pa.ipc.new_stream(file, group.schema) as writer:
                writer.write_batch(batch, custom_metadata=group_metadata(info, batch))
            file.flush()
            os.fsync(file.fileno())
        sync_path(str(self.folder))
        log.error("journal: %s: rows were refused by the store: %s", self.folder / name, reason)

    def close(self) -> None:
        """Closes the open segment, and deletes it where nothing in it is needed any more."""
        with self._appending:
            self._roll()

    def leave(self) -> None:
        """The journal is closed and used no more: who opens it again counts what is left."""
        self._space.add(-self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        with self._lock:
            return sum(segment.num_bytes for segment in self._segments)

    def _current(self, schema: pa.Schema) -> tuple[Segment, BinaryIO]:
        if self._file is not None:
            segment = self._segments[-1]
            if segment.num_bytes < self._segment_bytes and segment.schema.equals(
                schema, check_metadata=True
            ):
                return segment, self._file
            self._roll()
        path = self.folder / f"{self._next_number:012d}{WAITING}"
        self._next_number += 1
        segment = Segment(path, schema)
        file = path.open("xb")
        with self._lock:
            self._file = file
            self._segments.append(segment)
        self._writer = pa.ipc.new_stream(file, schema)
        sync_path(str(self.folder))
        return segment, file

    def _roll(self) -> None:
        """Ends the open segment."""
        with self._lock:
            file, self._file = self._file, None
            if file is None:
                return
        with contextlib.suppress(OSError):
            file.close()
        self.sweep()

    def _dispose(self, segment: Segment, retention_s: float) -> None:
        with self._lock:
            earlier = self._segments[: self._segments.index(segment)]
        now = time.time()
        # What it replaced may be in earlier ones: they must not be sent again without it.
        self._sync_notes(earlier)
        _dispose(segment, kept=retention_s > 0)
        sync_path(str(self.folder))
        with self._lock:  # only now: what failed is tried again
            self._segments.remove(segment)
        self._space.add(-segment.num_bytes)
        segment.notes.unlink(missing_ok=True)
        for path in self.folder.glob(f"*{SENT}"):
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime > retention_s:
                    path.unlink()

    def _sync_notes(self, segments: Sequence[Segment]) -> None:
        synced: list[tuple[Segment, int]] = []
        for segment in segments:
            with self._lock:
                segment.write_notes()
                num_notes = segment.num_notes
            if segment.num_synced < num_notes:
                sync_path(str(segment.notes))
                synced.append((segment, num_notes))
        if synced:
            sync_path(str(self.folder))  # the names, too
        for segment, num_notes in synced:
            segment.num_synced = num_notes

    def _undo(self) -> None:
        """Cuts off what was written of groups that will not be acknowledged."""
        if self._file is None:
            return  # not even a new segment could be made
        segment = self._segments[-1]
        self._roll()  # which may write what is buffered still
        with contextlib.suppress(OSError):
            os.truncate(segment.path, segment.num_bytes)
            sync_path(str(segment.path))


def _disk_error(error: OSError) -> FletcherError:
    if error.errno in _NO_ROOM:
        return JournalFullError(
            "the journal's disk is full; try again later", retry_after_ms=_FULL_RETRY_MS
        )
    return StoreUnavailableError(f"the journal's disk fails: {error.strerror}")


def _cut(segment: Segment, torn: Damage) -> None:
    """Cuts off a group that was not written to its end, and keeps what there is of it."""
    with segment.path.open("r+b") as file:
        file.seek(torn.offset)
        segment.path.with_suffix(TORN).write_bytes(file.read())
        file.truncate(segment.num_bytes)
        os.fsync(file.fileno())
    log.warning("journal: %s was cut off in the middle of a group: %s", segment.path, torn)


def _dispose(segment: Segment, *, kept: bool) -> None:
    """What becomes of a segment of which nothing waits any more."""
    path = segment.path
    with contextlib.suppress(FileNotFoundError):  # it was done before, and something else failed
        if segment.damage:
            path.rename(path.with_suffix(DAMAGED))
        elif kept and segment.groups:
            path.rename(path.with_suffix(SENT))
            os.utime(path.with_suffix(SENT))
        else:
            path.unlink()
