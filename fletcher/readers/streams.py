"""Input files as streams of bytes: opened, decompressed and converted to UTF-8."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from fletcher.errors import InvalidCommandError, InvalidUtf8Error
from fletcher.readers.pieces import PieceStream
from fletcher.readers.source_files import SourceFile

BUFFER_BYTES = 1 << 20
# A read of an object store is a request.
_REMOTE_BUFFER_BYTES = 4 << 20
SNIFF_BYTES = 64
# A first line longer than this is not treated as a header.
FIRST_LINE_BYTES = 64 << 10
# Memory of an xz decoder. `xz -9` needs 65 MiB, and a damaged header may ask for gigabytes.
_XZ_MEMORY = 256 << 20

# zstd files may begin with a skippable frame, as pzstd writes them.
_MAGIC: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\x1f\x8b"), "gzip"),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL), "zstd"),
    (re.compile(rb"BZh[1-9]\x31\x41\x59|BZh[1-9]\x17\x72\x45", re.DOTALL), "bz2"),
    (re.compile(rb"\xfd7zXZ\x00"), "xz"),
)
# Byte-order marks. The longer ones come first: UTF-32's mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open input.

    Attributes:
        stream: Stream of the decompressed bytes.
        compression: Compression of the input: `gzip`, `zstd`, `bz2`, `xz` or None.
        position: Function that returns the number of bytes of the file that were read so far; 0 for
            standard input and pipes.
    """

    stream: io.BufferedReader
    compression: str | None
    position: Callable[[], int]


@contextmanager
def open_stream(
    file: SourceFile | None, *, stdin: BinaryIO | None, part: tuple[int, int] | None = None
) -> Iterator[OpenFile]:
    """Open an input and detect its compression by the first bytes.

    `file` is None for standard input. `part` has the first byte to read of a file without
    compression, and the byte after the last one.
    """
    if file is not None and part is not None:
        with file.open(part[0], part[1] - part[0]) as raw:
            stream = io.BufferedReader(cast("io.RawIOBase", raw), BUFFER_BYTES)
            yield OpenFile(cast("io.BufferedReader", stream), None, stream.tell)
        return
    if file is None:
        yield _opened(_Pipe(stdin if stdin is not None else sys.stdin.buffer))
        return
    with file.open() as raw:
        size = BUFFER_BYTES if file.path is not None else _REMOTE_BUFFER_BYTES
        yield _opened(_Pipe(raw) if file.size is None else raw, size)


def _opened(raw: BinaryIO | _Pipe, size: int = BUFFER_BYTES) -> OpenFile:
    position = (lambda: 0) if isinstance(raw, _Pipe) else raw.tell
    stream = cast("io.BufferedReader", io.BufferedReader(cast("io.RawIOBase", raw), size))
    start = stream.peek(7)
    for magic, compression in _MAGIC:
        if magic.match(start):
            inner = io.BufferedReader(_decompressed(stream, compression), BUFFER_BYTES)
            return OpenFile(inner, compression, position)
    return OpenFile(stream, None, position)


def _decompressed(stream: io.BufferedReader, compression: str) -> Any:
    if compression == "gzip":  # accepts zeros after a member, as tapes have them
        return gzip.GzipFile(fileobj=stream, mode="rb")
    if compression == "zstd":
        return pa.CompressedInputStream(stream, compression)
    if compression == "bz2":
        return _Members(stream, bz2.BZ2Decompressor)
    return _Members(stream, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY))


class _Pipe(io.RawIOBase):
    """Standard input or a named pipe.

    The first read waits for enough bytes to detect the format. That is SNIFF_BYTES with a line end
    among the bytes, or FIRST_LINE_BYTES without one.
    """

    def __init__(self, source: BinaryIO) -> None:
        self.read_some = getattr(source, "read1", source.read)
        self.begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        filled, line_ended = 0, False
        while data := self.read_some(len(buffer) - filled):
            buffer[filled : filled + len(data)] = data
            filled += len(data)
            line_ended = line_ended or b"\n" in data or b"\r" in data
            enough = SNIFF_BYTES if line_ended else FIRST_LINE_BYTES
            if self.begun or filled >= min(enough, len(buffer)):
                break
        self.begun = True
        return filled


class _Members(PieceStream):
    """The members of a bz2 or xz file, decompressed; zeros after a member are padding.

    Python's `bz2` and `lzma` files ignore anything else after the last member.
    """

    def __init__(self, source: io.BufferedReader, decompressor: Callable[[], Any]) -> None:
        self._source = source
        self._new = decompressor
        self._member = decompressor()

    def _next_piece(self, size: int) -> bytes | None:
        if self._member.eof:
            data = self._member.unused_data.lstrip(b"\0")
            while not data and (more := self._source.read1(BUFFER_BYTES)):
                data = more.lstrip(b"\0")
            if not data:
                return None
            self._member = self._new()
        elif self._member.needs_input:
            data = self._source.read1(BUFFER_BYTES)
            if not data:
                raise EOFError("the compressed data ends early")
        else:
            data = b""
        try:
            return bytes(self._member.decompress(data, size))
        except lzma.LZMAError as error:
            raise OSError(str(error)) from None


def check_encoding(encoding: str) -> None:
    """Raise InvalidCommandError unless `encoding` names a text encoding of Python."""
    try:
        "".encode(encoding)
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError):  # a UnicodeError is a ValueError
        raise InvalidCommandError(
            f"`encoding` is {encoding!r}, expected the name of a text encoding such as utf-8, "
            "latin-1, cp1252 or utf-16",
            field="encoding",
        ) from None


def utf8_stream(stream: io.BufferedReader, encoding: str | None, name: str) -> io.BufferedReader:
    """The stream's text as UTF-8. Without `encoding` it is UTF-8 already.

    Raises:
        InvalidUtf8Error: The stream begins like UTF-16 or UTF-32, and no encoding was given.
    """
    if encoding is not None:
        return cast(
            "io.BufferedReader", io.BufferedReader(_Recoded(stream, encoding, name), BUFFER_BYTES)
        )
    if found := wide_encoding(stream):
        raise InvalidUtf8Error(
            f"{name} is {found.upper()}; give --encoding {found}", field="encoding"
        )
    return stream


def wide_encoding(stream: io.BufferedReader) -> str | None:
    """UTF-16 or UTF-32, if a stream begins with its byte-order mark."""
    start = stream.peek(4)
    return next((kind for mark, kind in _MARKS.items() if start.startswith(mark)), None)


class _Recoded(PieceStream):
    """Text in any encoding, read as UTF-8."""

    def __init__(self, source: io.BufferedReader, encoding: str, name: str) -> None:
        self._source = source
        self._encoding = encoding
        self._name = name
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._num_read = 0
        self._ended = False

    def _next_piece(self, size: int) -> bytes | None:
        if self._ended:
            return None
        data = self._source.read1(size)
        self._ended = not data
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeError as error:
            place = self._num_read + getattr(error, "start", 0)
            raise InvalidUtf8Error(
                f"{self._name} is not {self._encoding}: near byte {place + 1}", field="encoding"
            ) from None
        self._num_read += len(data)
        return text.encode()
