"""Cutting of files into fragments, and hashes of their bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from fletcher.errors import InvalidCommandError
from fletcher.readers.files import InputFile

# Fragments of files of lines have at least this size, except for a file's last one.
FRAGMENT_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_LINE_FORMATS = ("jsonl", "text")
# First bytes of files that are no plain lines in UTF-8: compressed, Parquet, Arrow, UTF-16.
_OTHER_STARTS = (
    *(b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PAR1", b"ARROW1"),
    *(b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"),
)
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after the first byte


@dataclass(frozen=True, slots=True)
class Piece:
    """Some lines of a file: bytes `start` to `stop`, and their SHA-256 in hex."""

    start: int
    stop: int
    first_line: int
    content: str


def hash_file(file: InputFile) -> str:
    """SHA-256 in hex of a file's bytes.

    Raises InvalidCommandError if it cannot be read.
    """
    with _opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def has_lines(file: InputFile) -> bool:
    """Whether a file can be cut at line ends: plain text or JSON lines in UTF-8."""
    if file.format not in _LINE_FORMATS:
        return False
    with _opened(file) as stream:
        start = stream.read(64)
    if start.startswith(_OTHER_STARTS) or start[1:4] == _ZSTD_SKIPPABLE:
        return False
    return file.format == "text" or start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"["


def cut_lines(
    file: InputFile, known: Iterable[Piece] = (), fragment_bytes: int = FRAGMENT_BYTES
) -> list[Piece]:
    """Cut a file of lines into pieces, and hash them.

    Args:
        file: The file.
        known: Pieces of the file as it was, in order. Those at its beginning that have not changed
            are kept, so that lines can be appended.
        fragment_bytes: Minimum size of a new piece, except for the last one.

    Raises:
        InvalidCommandError: The file cannot be read.
    """
    pieces: list[Piece] = []
    with _opened(file) as stream:
        lines = _LineCounter()
        for piece in known:
            before = lines.copy()
            digest, ended = hashlib.sha256(), True
            for chunk in _chunks(stream, piece.stop - piece.start):
                digest.update(chunk)
                lines.count(chunk)
                ended = chunk.endswith(b"\n")
            at_end = not stream.peek(1)
            same = digest.hexdigest() == piece.content and stream.tell() == piece.stop
            if not same or not (ended or at_end):
                stream.seek(piece.start)
                lines = before
                break
            pieces.append(piece)
        while stream.peek(1):
            start, first_line = stream.tell(), lines.number
            digest = hashlib.sha256()
            for chunk in _chunks(stream, fragment_bytes):
                digest.update(chunk)
                lines.count(chunk)
            while not lines.after_end and (line := stream.readline(_CHUNK_BYTES)):
                digest.update(line)
                lines.count(line)
            pieces.append(Piece(start, stream.tell(), first_line, digest.hexdigest()))
    return pieces


class _LineCounter:
    """Number of the line after the bytes counted so far.

    A line ends at CR, LF or CRLF.
    """

    def __init__(self, number: int = 1, *, after_cr: bool = False) -> None:
        self.number = number
        self.after_end = True  # the last byte ended a line by LF
        self._after_cr = after_cr

    def copy(self) -> _LineCounter:
        return _LineCounter(self.number, after_cr=self._after_cr)

    def count(self, data: bytes) -> None:
        if not data:
            return
        ends = data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
        if self._after_cr and data.startswith(b"\n"):
            ends -= 1
        self.number += ends
        self._after_cr = data.endswith(b"\r")
        self.after_end = data.endswith(b"\n")


def _chunks(stream: io.BufferedReader, num_bytes: int) -> Iterator[bytes]:
    while num_bytes and (chunk := stream.read(min(num_bytes, _CHUNK_BYTES))):
        num_bytes -= len(chunk)
        yield chunk


def _opened(file: InputFile) -> io.BufferedReader:
    assert file.file is not None
    try:
        raw = cast("io.RawIOBase", file.file.open())
        return cast("io.BufferedReader", io.BufferedReader(raw, _CHUNK_BYTES))
    except OSError as error:
        raise InvalidCommandError(f"cannot read {file.name}: {error.strerror or error}") from None
