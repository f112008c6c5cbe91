"""Decoded sizes of Arrow IPC messages, told before they are decompressed.

pyarrow decompresses a whole message before any of it can be looked at, and a few kilobytes may
stand for gigabytes. No library reads the sizes alone, so this module reads the few fields of
`Message.fbs`, `RecordBatch.fbs` and `File.fbs` that hold them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import cast

import pyarrow as pa

from fletcher.errors import BatchTooLargeError, InvalidCommandError
from fletcher.readers.pieces import PieceStream
from fletcher.readers.source_files import SourceFile

# Most bytes of a compressed record batch after decompression.
MAX_DECODED_BYTES = 1 << 30
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
# A file ends with its index (`File.fbs`), the index's length and a magic number. Two fields of the
# index list messages.
_TAIL = struct.Struct("<i6s")
_INDEXED = (2, 3)
# An entry of the index: offset, length of the message's header and padding, length of its body.
_BLOCK = struct.Struct("<qiiq")
# Bytes in front of a header: a marker and the header's length. Old writers have no marker.
_MARKER = b"\xff\xff\xff\xff"

# Returns some bytes of a message's body, by offset and length.
_ReadBody = Callable[[int, int], bytes]


def check_message(header: bytes, read_body: _ReadBody, place: str) -> None:
    """Refuse a compressed message that stands for too many bytes.

    `read_body` returns some bytes of the message's body, by offset and length.

    Raises:
        BatchTooLargeError: The buffers are larger than MAX_DECODED_BYTES when decompressed.
        pa.ArrowInvalid: The message's header is damaged.
    """
    try:
        size = _decoded_bytes(header, read_body)
    except (struct.error, IndexError):
        raise pa.ArrowInvalid("the header of a message is damaged") from None
    if size > MAX_DECODED_BYTES:
        raise BatchTooLargeError(
            f"{place} stands for {size:,} bytes, expected at most {MAX_DECODED_BYTES:,}; write "
            "smaller record batches"
        )


def _decoded_bytes(header: bytes, read_body: _ReadBody) -> int:
    """Bytes of a message's buffers after decompression; 0 for a plain one."""
    root = _u32(header, 0)
    kind_at = _field(header, root, 1)
    kind = header[kind_at] if kind_at else 0
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return 0
    table = _table(header, root, 2)
    if kind == _DICTIONARY_BATCH:
        table = _table(header, table, 1)
    if not _field(header, table, 3):
        return 0
    buffers = _table(header, table, 2)
    total = 0
    for number in range(_u32(header, buffers)):
        offset, length = struct.unpack_from("<qq", header, buffers + 4 + 16 * number)
        if length >= 8:
            # -1 marks a buffer that is stored as it is.
            (size,) = struct.unpack("<q", read_body(offset, 8))
            total += size if size >= 0 else length
    return total


def _field(data: bytes, table: int, number: int) -> int:
    """Position of a field of a FlatBuffers table; 0 if it is absent."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    (size,) = struct.unpack_from("<H", data, vtable)
    place = 4 + 2 * number
    if place >= size:
        return 0
    offset = int(struct.unpack_from("<H", data, vtable + place)[0])
    return table + offset if offset else 0


def _table(data: bytes, table: int, number: int) -> int:
    """Position of the table or vector that a field refers to."""
    at = _field(data, table, number)
    return at + _u32(data, at)


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


class CheckedStream(PieceStream):
    """An Arrow IPC stream whose messages are checked before they are decoded.

    Reading raises the errors of `check_message`, and InvalidCommandError if anything comes after
    the stream's end.
    """

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self._messages = pa.ipc.MessageReader.open_stream(stream)
        self._source = stream
        self._name = name
        self._number = 0

    def _next_piece(self, size: int) -> pa.Buffer | None:  # noqa: ARG002 - a message is a piece
        try:
            message = self._messages.read_next_message()
        except StopIteration:
            if self._source.read1(1):
                raise InvalidCommandError(
                    f"{self._name} goes on after the end of its Arrow stream; give each stream in "
                    "a separate file"
                ) from None
            return None
        place = f"{self._name}: message {self._number}"
        check_message(
            message.metadata.to_pybytes(),
            lambda offset, length: message.body.slice(offset, length).to_pybytes(),
            place,
        )
        self._number += 1
        return message.serialize()


def check_file(table: SourceFile, name: str) -> None:
    """Check the messages of an Arrow IPC file, without their bodies.

    Raises the errors of `check_message`, and OSError if the file cannot be read.
    """
    with io.BufferedReader(cast("io.RawIOBase", table.open())) as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        # Only the index tells where messages begin: Polars leaves other bytes between them.
        for number, (offset, length, _, _) in enumerate(_index(read, table.size or 0), 1):
            header = read(offset, length)
            check_message(
                header[8 if header.startswith(_MARKER) else 4 :],
                lambda place, size, body=offset + length: read(body + place, size),  # type: ignore[misc]
                f"{name}: message {number}",
            )


def _index(read: _ReadBody, size: int) -> list[tuple[int, ...]]:
    """Entries for the dictionaries and record batches in the index at a file's end.

    Raises pa.ArrowInvalid if the index is damaged.
    """
    try:
        length, magic = _TAIL.unpack(read(size - _TAIL.size, _TAIL.size))
        index = read(size - _TAIL.size - length, length)
        root = _u32(index, 0)
        entries: list[tuple[int, ...]] = []
        for kind in _INDEXED:
            if _field(index, root, kind):
                blocks = _table(index, root, kind)
                start, num_bytes = blocks + 4, _BLOCK.size * _u32(index, blocks)
                entries += _BLOCK.iter_unpack(index[start : start + num_bytes])
    except (struct.error, IndexError, OSError, ValueError):
        magic = b""
    if magic != b"ARROW1":
        raise pa.ArrowInvalid("its end is damaged")
    return entries
