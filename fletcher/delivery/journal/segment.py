"""A segment: a journal file with an Arrow IPC stream of groups, and its notes.

A segment has one schema. Each of its record batches is a group of rows of one upload. The batch's
custom metadata holds the upload's id, the row offsets and a CRC-32 of metadata, schema and rows.
Reading continues after damaged bytes: each message begins with a marker at a multiple of eight
bytes, and the checksum proves that a group is intact. If the beginning of a segment is unreadable,
the segment is read with the schema of another segment of the same dataset.

The file `N.settled` beside the segment `N.arrow` lists the settled groups. It holds eight bytes for
each group: the offset of the group's end in the segment. The groups are in the order in which they
were settled.

No library is used: libraries for write-ahead logs do not write Arrow, and an Arrow stream reader
stops at the first damaged byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from fletcher.errors import InternalError
from fletcher.util.durable import read_regular

WAITING = ".arrow"
SENT = ".sent"
DAMAGED = ".damaged"
TORN = ".torn"
REJECTED = ".rejected"
SETTLED = ".settled"
# Text before the suffix in the name of a segment that a person had sent again.
REVIVED = "-again"
_KEY = b"fletcher.group"
_MARKER = b"\xff\xff\xff\xff"
_END = _MARKER + bytes(4)  # last bytes of an Arrow stream that was closed
_UNREADABLE = (pa.ArrowException, OSError, EOFError)
_NOTE = struct.Struct("<Q")
_ANY_MARKER = re.compile(b"(?=%b)" % _MARKER)
_CLAIM = re.compile(rb'\{"upload_id": "([\w.-]+)", "first": (\d+), "last": (\d+)')


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """Identity of a group: the rows `first` to `last` of an upload, both included.

    Attributes:
        failed: Positions in the group of rows with a null vector.
        upsert: The rows replace others by id.
        excluded: Positions in the group of rows that are not stored, such as duplicates.
    """

    upload_id: str
    first: int
    last: int
    failed: tuple[int, ...] = ()
    upsert: bool = False
    excluded: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.last - self.first + 1

    def to_json(self) -> dict[str, Any]:
        """Fields of the file format. Keep their order: the checksum depends on it."""
        fields = dataclasses.asdict(self)
        fields["unsent"] = fields.pop("excluded")
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GroupInfo:
        """Read the fields that `to_json` returned.

        Raises:
            TypeError: A field is missing or unknown.
        """
        # JSON turns tuples into lists.
        values: dict[str, Any] = {
            name: tuple(one) if isinstance(one, list) else one for name, one in fields.items()
        }
        excluded = values.pop("unsent", ())
        return cls(**values, excluded=excluded)

    def __str__(self) -> str:
        return f"{self.upload_id}:{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a segment that do not form a complete and correct group.

    Attributes:
        offset: Offset of the first of these bytes in the file.
        groups: Groups that are named in the bytes, without proof by a checksum. May be empty.
        error: The error that keeps the file from being read. It may pass, so nothing is proven.
    """

    offset: int
    num_bytes: int
    groups: tuple[GroupInfo, ...]
    error: OSError | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.num_bytes} bytes that cannot be read now: {self.error.strerror}"
        held = ", ".join(map(str, self.groups)) or "unknown rows"
        return f"{self.num_bytes} bytes from {self.offset} on ({held})"


@dataclass(slots=True, eq=False)
class JournaledGroup:
    """A group on disk.

    Attributes:
        revived: A person had groups of the upload sent again, see `revive_segments`. A client may
            have sent some of these rows in other groups meanwhile, so the store may have rows of
            this group under other group keys.
    """

    info: GroupInfo
    schema: pa.Schema
    segment: Segment
    offset: int
    num_bytes: int
    settled: bool = False
    revived: bool = False

    @property
    def end(self) -> int:
        """Offset of the group's end in the file. It identifies the group in the notes."""
        return self.offset + self.num_bytes

    def read_batch(self) -> pa.RecordBatch:
        """Read the group's rows.

        The file is not memory-mapped, so that a failing disk causes an error and not a signal.

        Raises:
            InternalError: The group can no longer be read from the file.
        """
        try:
            with pa.OSFile(str(self.segment.path)) as file:
                file.seek(self.offset)
                message = pa.ipc.read_message(file)
                if message.type == "schema":  # precedes the first group of a segment
                    message = pa.ipc.read_message(file)
                return pa.ipc.read_record_batch(message, self.schema)
        except _UNREADABLE as error:
            raise InternalError(f"a journaled group cannot be read: {error}") from error


@dataclass(slots=True, eq=False)
class Segment:
    """A journal file and its groups.

    Attributes:
        num_bytes: Length of the file without the bytes in `torn`.
        unsettled: Number of groups that are not settled yet.
        damage: Bytes that do not form a complete and correct group.
        torn: Incomplete group at the end of the file. It was never acknowledged.
        num_notes: Number of notes, written or not.
        num_synced: Number of notes that survive a power loss.
    """

    path: Path
    schema: pa.Schema
    num_bytes: int = 0
    unsettled: int = 0
    groups: list[JournaledGroup] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    torn: Damage | None = None
    unwritten_notes: bytes = b""
    num_notes: int = 0
    num_synced: int = 0

    @property
    def notes(self) -> Path:
        return self.path.with_suffix(SETTLED)

    def note_settled(self, group: JournaledGroup) -> None:
        self.unwritten_notes += _NOTE.pack(group.end)
        self.num_notes += 1

    def write_notes(self) -> None:
        """Write the notes that are not written yet, without a sync.

        Raises:
            OSError: Some notes cannot be written. The next call tries them again.
        """
        if self.unwritten_notes:
            with self.notes.open("ab", buffering=0) as file:
                self.unwritten_notes = self.unwritten_notes[file.write(self.unwritten_notes) :]


def read_notes(path: Path) -> list[int]:
    """End offsets of settled groups, from the complete notes in a file."""
    try:
        data = read_regular(path)
    except FileNotFoundError:
        return []
    whole = data[: len(data) // _NOTE.size * _NOTE.size]
    # After a power loss a file may have its full length but zeros at the end. No group ends at 0,
    # so the first zero ends the list.
    return list(itertools.takewhile(bool, (end for (end,) in _NOTE.iter_unpack(whole))))


def mend_notes(path: Path) -> None:
    """Cut off incomplete notes at the end of a file, before notes are appended to it."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, _NOTE.size * len(read_notes(path)))


def read_segments(paths: Iterable[Path]) -> Iterator[tuple[Path, Segment | Damage]]:
    """Read the segments of one dataset.

    Segments with an unreadable beginning come last. Files that are deleted meanwhile are left out.
    For a file without a readable group, the second value is a Damage.
    """
    schemas: list[pa.Schema] = []
    unread: list[Path] = []
    for path in sorted(paths):
        with contextlib.suppress(FileNotFoundError):
            segment = _read(path, [None])
            if isinstance(segment, Damage) or (segment.damage and not segment.groups):
                unread.append(path)
                continue
            if not any(segment.schema.equals(one, check_metadata=True) for one in schemas):
                schemas.append(segment.schema)
            yield path, segment
    for path in unread:
        with contextlib.suppress(FileNotFoundError):
            yield path, _read(path, [*schemas, None])


def read_segment(path: Path) -> Segment | Damage:
    """Read one segment; returns a Damage if the file has no readable group."""
    ((_, segment),) = read_segments([path])
    return segment


def group_metadata(info: GroupInfo, batch: pa.RecordBatch) -> dict[bytes, bytes]:
    fields = {**info.to_json(), "crc32": _checksum(info, batch)}
    return {_KEY: json.dumps(fields).encode()}


def _read(path: Path, schemas: Iterable[pa.Schema | None]) -> Segment | Damage:
    """Read with the first schema in `schemas` that finds a group, else with the last.

    None in `schemas` means the file's own schema. The notes are read before the groups, because
    a server may delete both files meanwhile; without its notes, a segment would look unsettled.
    """
    ends = set(read_notes(path.with_suffix(SETTLED)))
    try:
        data = pa.py_buffer(read_regular(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        return Damage(0, path.stat().st_size, (), error)
    found: Segment | Damage = _damage(data, 0, len(data))
    for given in schemas:
        schema, start = given, 0
        if schema is None:
            try:
                with pa.BufferReader(data) as file:
                    schema, start = pa.ipc.read_schema(file), file.tell()
            except MemoryError:  # pyarrow's is also an ArrowException
                raise
            except _UNREADABLE:
                continue
        found = Segment(path, schema)
        _scan(found, data, start)
        if found.groups:
            found.num_notes = len(ends)  # these notes may not be synced
            for group in found.groups:
                group.settled = group.end in ends
            break
    return found


def _scan(segment: Segment, data: pa.Buffer, start: int) -> None:
    """Find the groups from offset `start` on, and the damaged bytes between them."""
    view, schema = memoryview(data), segment.schema.serialize()
    size = len(view)
    position = good = start  # `good`: the end of the last group
    while position < size and bytes(view[position : position + 9]) != _END:
        end = _message_end(view, position)
        info = _group(schema, data, position, end) if end is not None and end <= size else None
        if end is None or info is None:
            position = _next_message(view, position + 1)
            continue
        if good < position:
            segment.damage.append(_damage(data, good, position))
        group = JournaledGroup(info, segment.schema, segment, position, end - position)
        segment.groups.append(group)
        position = good = end
    segment.num_bytes = size
    if good < position:
        rest = _damage(data, good, size)
        if _is_torn(view, good):
            segment.torn, segment.num_bytes = rest, good
        else:
            segment.damage.append(rest)


def _message_end(view: memoryview, offset: int) -> int | None:
    """End of the message at `offset`, by its header; None if no message begins there.

    https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format
    """
    try:
        marker, length = struct.unpack_from("<4si", view, offset)
        body: int = offset + 8 + length
        if marker != _MARKER or length <= 0 or length % 8:
            return None
        if body > len(view):
            return body
        # `bodyLength` is the fourth field of the flatbuffer `Message`.
        table = offset + 8 + struct.unpack_from("<I", view, offset + 8)[0]
        fields = table - struct.unpack_from("<i", view, table)[0]
        place = struct.unpack_from("<H", view, fields + 4 + 2 * 3)[0]
        num_bytes: int = struct.unpack_from("<q", view, table + place)[0] if place else 0
    except struct.error:
        return None
    return body + num_bytes if num_bytes >= 0 else None


def _next_message(view: memoryview, offset: int) -> int:
    """Offset of the next possible message; the file's length if there is none."""
    places = (match.start() for match in _ANY_MARKER.finditer(view, offset))
    return next((place for place in places if place % 8 == 0), len(view))


def _group(schema: pa.Buffer, data: pa.Buffer, offset: int, end: int) -> GroupInfo | None:
    """The group in these bytes; None if they hold no complete and correct group."""
    try:
        with pa.ipc.open_stream(schema.to_pybytes() + data[offset:end].to_pybytes()) as reader:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
        fields = json.loads(metadata[_KEY])
        crc = fields.pop("crc32")
        batch.validate(full=True)
        info = GroupInfo.from_json(fields)
        # The batch may have more rows than the upload, because a chunked row takes several.
        right = _checksum(info, batch) == crc and info.num_rows <= batch.num_rows
    except MemoryError:  # says nothing about the bytes
        raise
    except (*_UNREADABLE, StopIteration, ValueError, KeyError, TypeError):
        return None
    return info if right else None


def _checksum(info: GroupInfo, batch: pa.RecordBatch) -> int:
    head = json.dumps(info.to_json()).encode() + batch.schema.serialize().to_pybytes()
    return zlib.crc32(batch.serialize(), zlib.crc32(head))


def _damage(data: pa.Buffer, start: int, end: int) -> Damage:
    claims = _CLAIM.finditer(memoryview(data), start, end)
    groups = [GroupInfo(one[1].decode(), int(one[2]), int(one[3])) for one in claims]
    return Damage(start, end - start, tuple(groups))


def _is_torn(view: memoryview, offset: int) -> bool:
    """Whether only half a message or zeros follow, as after a crash of the writer."""
    rest = bytes(view[offset:])
    if len(rest) < 8:
        return _MARKER.startswith(rest[:4]) or not rest.strip(b"\0")
    end = _message_end(view, offset)
    return (end is not None and end > len(view)) or not rest.strip(b"\0")
