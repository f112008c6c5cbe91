"""Reading of a journal's segments at the start of a sink, and their clean-up."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from fletcher.delivery.journal.segment import (
    DAMAGED,
    SENT,
    SETTLED,
    TORN,
    WAITING,
    Damage,
    Segment,
    mend_notes,
    read_segments,
)
from fletcher.util.durable import sync_path

log = logging.getLogger(__name__)


def recover_segments(folder: Path) -> Iterator[Segment]:
    """Yield the segments with groups that an earlier process left, in order.

    Torn ends are cut off, and files without a readable group are set aside as damaged.

    Raises:
        OSError: A file cannot be read or synced. It stays as it is: the cause may pass.
    """
    found = sorted(read_segments(folder.glob(f"*{WAITING}")), key=lambda one: one[0])
    for path, segment in found:
        if isinstance(segment, Damage) and segment.error is not None:
            log.error("journal: %s cannot be read now: %s", path, segment.error)
            raise segment.error
    for path, segment in found:
        if isinstance(segment, Damage):
            path.rename(path.with_suffix(DAMAGED))
            log.error("journal: %s is set aside, it cannot be read: %s", path, segment)
            continue
        for one in segment.damage:
            log.error("journal: %s is damaged, and lost %s", path, one)
        if segment.torn is not None:
            try:
                _cut(segment, segment.torn)
            except OSError as error:  # such as a full disk; the half group may stay in the file
                log.warning("journal: %s ends in half a group: %s", path, error)
        if not segment.groups:
            dispose(segment, kept=False)
            continue
        sync_path(path)  # the earlier process may have died before it synced the file
        mend_notes(segment.notes)
        segment.unsettled = sum(not group.settled for group in segment.groups)
        if not segment.unsettled:
            segment.num_bytes = 0  # not counted, because the next sweep deletes it
        yield segment
    for notes in folder.glob(f"*{SETTLED}"):
        if not notes.with_suffix(WAITING).exists():
            notes.unlink()
    sync_path(folder)


def _cut(segment: Segment, torn: Damage) -> None:
    """Move an incomplete group from the end of a segment to a `.torn` file."""
    with segment.path.open("r+b") as file:
        file.seek(torn.offset)
        segment.path.with_suffix(TORN).write_bytes(file.read())
        file.truncate(segment.num_bytes)
        os.fsync(file.fileno())
    log.warning("journal: %s was cut off in the middle of a group: %s", segment.path, torn)


def dispose(segment: Segment, *, kept: bool) -> None:
    """Delete a segment, keep it as `.sent`, or set a damaged one aside.

    The segment has no waiting groups. `kept`: keep it after it was sent.
    """
    path = segment.path
    with contextlib.suppress(FileNotFoundError):  # an earlier attempt did this, then failed
        if segment.damage:
            path.rename(path.with_suffix(DAMAGED))
        elif kept and segment.groups:
            path.rename(path.with_suffix(SENT))
            os.utime(path.with_suffix(SENT))
        else:
            path.unlink()
