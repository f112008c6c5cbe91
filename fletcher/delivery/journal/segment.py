"""A file of journaled groups, as it is on disk: written, read and checked.

A segment is an Arrow IPC stream of one schema. A record batch in it is a group of rows of one
upload; its custom metadata says which upload and rows, and a CRC-32 over it all. Reading goes on
behind what is damaged: messages begin at multiples of eight with a marker, and the checksum tells
a group from what only looks like one. A segment whose beginning is unreadable is read by the schema
of another one of its dataset.

Which of its groups are stored already is noted beside it, in `N.settled`: where each ends, as eight
bytes, in the order in which they were settled.
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

WAITING = ".arrow"
SENT = ".sent"
DAMAGED = ".damaged"
TORN = ".torn"
REJECTED = ".rejected"
SETTLED = ".settled"
_KEY = b"fletcher.group"
_MARKER = b"\xff\xff\xff\xff"
_END = _MARKER + bytes(4)  # of an Arrow stream that was closed
_UNREADABLE = (pa.ArrowException, OSError, EOFError)
_NOTE = struct.Struct("<Q")
_ANY_MARKER = re.compile(b"(?=%b)" % _MARKER)
_CLAIM = re.compile(rb'\{"upload_id": "([\w-]+)", "first": (\d+), "last": (\d+)')


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """What a group is, as its custom metadata says.

    Attributes:
        upload_id: Its upload.
        first: Offset of its first row in the upload.
        last: Offset of its last row.
        failed: Rows with a null vector, by their place in the group.
        upsert: It replaces rows by id.
        unsent: Rows that the store does not get, by their place: duplicates of others.
    """

    upload_id: str
    first: int
    last: int
    failed: tuple[int, ...] = ()
    upsert: bool = False
    unsent: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.upload_id}:{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are no whole and right group.

    Attributes:
        offset: Where they begin.
        num_bytes: How many there are.
        groups: What they held by their own account, which nothing proves; empty: they do not say.
    """

    offset: int
    num_bytes: int
    groups: tuple[GroupInfo, ...]

    def __str__(self) -> str:
        held = ", ".join(map(str, self.groups)) or "unknown rows"
        return f"{self.num_bytes} bytes from {self.offset} on ({held})"


@dataclass(slots=True, eq=False)
class JournaledGroup:
    """A group on disk."""

    info: GroupInfo
    schema: pa.Schema
    segment: Segment
    offset: int
    num_bytes: int
    settled: bool = False

    @property
    def end(self) -> int:
        """Where it ends in its file: by that it is known in the notes beside it."""
        return self.offset + self.num_bytes

    def load(self) -> pa.RecordBatch:
        """Its rows, read and not mapped: a disk that fails is an error then, and no signal.

        Raises:
            InternalError: The file does not hold what was written.
        """
        try:
            with pa.OSFile(str(self.segment.path)) as file:
                file.seek(self.offset)
                message = pa.ipc.read_message(file)
                if message.type == "schema":  # written along with a segment's first group
                    message = pa.ipc.read_message(file)
                return pa.ipc.read_record_batch(message, self.schema)
        except _UNREADABLE as error:
            raise InternalError(f"a journaled group cannot be read: {error}") from error


@dataclass(slots=True, eq=False)
class Segment:
    """A file of groups.

    Attributes:
        num_bytes: Its length, without a torn end.
        unsettled: Groups that are not stored yet.
        groups: Whole and right ones.
        damage: What else is in it.
        torn: Its end, where that is a group that was not written to its end: never acknowledged.
        unnoted: What is still to be written to the notes of what is settled.
        num_notes: How many there are, written or not.
        num_synced: How many of them survive a power loss.
    """

    path: Path
    schema: pa.Schema
    num_bytes: int = 0
    unsettled: int = 0
    groups: list[JournaledGroup] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    torn: Damage | None = None
    unnoted: bytes = b""
    num_notes: int = 0
    num_synced: int = 0

    @property
    def notes(self) -> Path:
        """The file that says which groups are settled."""
        return self.path.with_suffix(SETTLED)

    def note(self, group: JournaledGroup) -> None:
        """Notes that a group is settled, for `write_notes`."""
        self.unnoted += _NOTE.pack(group.end)
        self.num_notes += 1

    def write_notes(self) -> None:
        """Writes what of the notes is not written, and does not sync it.

        Raises:
            OSError: It could not be written, and will be the next time.
        """
        if self.unnoted:
            with self.notes.open("ab", buffering=0) as file:
                self.unnoted = self.unnoted[file.write(self.unnoted) :]


def read_notes(path: Path) -> list[int]:
    """Where the groups end that a segment's notes call settled, as far as they are whole."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: len(data) // _NOTE.size * _NOTE.size]
    # After a power loss a file may have its length and not its bytes: none ends at 0.
    return list(itertools.takewhile(bool, (end for (end,) in _NOTE.iter_unpack(whole))))


def mend_notes(path: Path) -> None:
    """Cuts off what is not whole, before more is written behind it."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, _NOTE.size * len(read_notes(path)))


def read_segments(paths: Iterable[Path]) -> Iterator[tuple[Path, Segment | Damage]]:
    """Segments of one dataset as they are on disk, those that are hard to read last.

    Files that go away meanwhile are left out. Damage: nothing in the file is readable.
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
    """A segment as it is on disk; Damage: nothing is readable."""
    ((_, segment),) = read_segments([path])
    return segment


def group_metadata(info: GroupInfo, batch: pa.RecordBatch) -> dict[bytes, bytes]:
    """What is written with a group."""
    fields = {**dataclasses.asdict(info), "crc32": _checksum(info, batch)}
    return {_KEY: json.dumps(fields).encode()}


def _read(path: Path, schemas: Iterable[pa.Schema | None]) -> Segment | Damage:
    """Reads by the first schema that finds a group, or by the last; None: by the file's own."""
    try:
        data = pa.py_buffer(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError:
        return Damage(0, path.stat().st_size, ())
    found: Segment | Damage = _damage(data, 0, len(data))
    for given in schemas:
        schema, start = given, 0
        if schema is None:
            try:
                with pa.BufferReader(data) as file:
                    schema, start = pa.ipc.read_schema(file), file.tell()
            except _UNREADABLE:
                continue
        found = Segment(path, schema)
        _scan(found, data, start)
        if found.groups:
            ends = set(read_notes(found.notes))
            found.num_notes = len(ends)  # not known to be synced
            for group in found.groups:
                group.settled = group.end in ends
            break
    return found


def _scan(segment: Segment, data: pa.Buffer, start: int) -> None:
    """Finds the groups from `start` on, and what lies between them."""
    view, schema = memoryview(data), segment.schema.serialize()
    size = len(view)
    position = good = start  # behind the last group
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
    """Where the message at `offset` ends by its own account; None: none begins there.

    https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format
    """
    try:
        marker, length = struct.unpack_from("<4si", view, offset)
        body: int = offset + 8 + length
        if marker != _MARKER or length <= 0 or length % 8:
            return None
        if body > len(view):
            return body
        # The flatbuffer `Message`: `bodyLength` is its fourth field.
        table = offset + 8 + struct.unpack_from("<I", view, offset + 8)[0]
        fields = table - struct.unpack_from("<i", view, table)[0]
        place = struct.unpack_from("<H", view, fields + 4 + 2 * 3)[0]
        num_bytes: int = struct.unpack_from("<q", view, table + place)[0] if place else 0
    except struct.error:
        return None
    return body + num_bytes if num_bytes >= 0 else None


def _next_message(view: memoryview, offset: int) -> int:
    """Where the next message may begin; the end where none does."""
    places = (match.start() for match in _ANY_MARKER.finditer(view, offset))
    return next((place for place in places if place % 8 == 0), len(view))


def _group(schema: pa.Buffer, data: pa.Buffer, offset: int, end: int) -> GroupInfo | None:
    """The group in these bytes; None where they are none, or not as they were written."""
    try:
        with pa.ipc.open_stream(schema.to_pybytes() + data[offset:end].to_pybytes()) as reader:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
        fields = json.loads(metadata[_KEY])
        crc = fields.pop("crc32")
        batch.validate(full=True)
        info = GroupInfo(**{name: _untupled(value) for name, value in fields.items()})
        # A row may be several, its chunks.
        right = _checksum(info, batch) == crc and info.num_rows <= batch.num_rows
    except (*_UNREADABLE, StopIteration, ValueError, KeyError, TypeError):
        return None
    return info if right else None


def _untupled(value: Any) -> Any:
    """What JSON made of a tuple, as a tuple again."""
    return tuple(value) if isinstance(value, list) else value


def _checksum(info: GroupInfo, batch: pa.RecordBatch) -> int:
    """CRC-32 over all that a group is: its place in the upload, its columns, its rows."""
    head = json.dumps(dataclasses.asdict(info)).encode() + batch.schema.serialize().to_pybytes()
    return zlib.crc32(batch.serialize(), zlib.crc32(head))


def _damage(data: pa.Buffer, start: int, end: int) -> Damage:
    claims = _CLAIM.finditer(memoryview(data), start, end)
    groups = [GroupInfo(one[1].decode(), int(one[2]), int(one[3])) for one in claims]
    return Damage(start, end - start, tuple(groups))


def _is_torn(view: memoryview, offset: int) -> bool:
    """Whether a file ends as one does whose writer died: in half a message, or in zeros."""
    rest = bytes(view[offset:])
    if len(rest) < 8:
        return _MARKER.startswith(rest[:4]) or not rest.strip(b"\0")
    end = _message_end(view, offset)
    return (end is not None and end > len(view)) or not rest.strip(b"\0")
