"""Cutting of files into fragments, and hashes of their bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from fletcher.core.line_range import LineRange
from fletcher.errors import InvalidCommandError
from fletcher.readers.file_reader import named_errors
from fletcher.readers.files import InputFile, sniff
from fletcher.readers.json_rows import is_array
from fletcher.readers.streams import open_stream, wide_encoding

# Fragments of files of lines have at least this size, except for a file's last one.
FRAGMENT_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_LINE_FORMATS = ("jsonl", "text")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some lines of a file, and the SHA-256 in hex of their bytes."""

    lines: LineRange
    content: str


def has_lines(file: InputFile) -> bool:
    """Whether a file can be cut at line ends: plain text or JSON lines in UTF-8.

    Raises InvalidCommandError if it cannot be read.
    """
    if file.format not in _LINE_FORMATS:
        return False
    with named_errors(file.name), open_stream(file.file, stdin=None) as opened:
        if opened.compression or sniff(file, opened, ()) not in _LINE_FORMATS:
            return False
        if wide_encoding(opened.stream) is not None:
            return False
        return file.format == "text" or not is_array(opened.stream)


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
            for chunk in _chunks(stream, piece.lines.stop - piece.lines.start):
                digest.update(chunk)
                lines.count(chunk)
                ended = chunk.endswith(b"\n")
            at_end = not stream.peek(1)
            same = digest.hexdigest() == piece.content and stream.tell() == piece.lines.stop
            if not same or not (ended or at_end):
                stream.seek(piece.lines.start)
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
            found = LineRange(start, stream.tell(), first_line)
            pieces.append(Piece(found, digest.hexdigest()))
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
