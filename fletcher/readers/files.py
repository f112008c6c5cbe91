"""Formats of input files, by their names and their first bytes."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, cast, get_args

from fletcher.core.line_range import LineRange
from fletcher.errors import InvalidCommandError
from fletcher.readers.source_files import SourceFile, Version
from fletcher.readers.streams import FIRST_LINE_BYTES, OpenFile

Format = Literal["parquet", "csv", "tsv", "jsonl", "arrow", "orc", "text"]
FORMATS: tuple[str, ...] = get_args(Format)
TABLES: tuple[Format, ...] = ("parquet", "arrow", "orc")

SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    ".csv": "csv",
    ".tsv": "tsv",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".arrow", ".arrows", ".feather", ".ipc"), "arrow"),
    ".orc": "orc",
    **dict.fromkeys((".txt", ".text"), "text"),
}
_FORMAT_NAMES: dict[Format, str] = {
    "parquet": "a Parquet file",
    "csv": "CSV with a header",
    "tsv": "TSV with a header",
    "jsonl": "JSON lines",
    "arrow": "Arrow IPC",
    "orc": "an ORC file",
    "text": "plain text, one text a line",
}
COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
_COLUMN_NAME = re.compile(r"[^\W\d][\w .()/%-]{0,63}")


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file, or standard input.

    Attributes:
        file: The file; None for standard input.
        format: Format of the input; None: detected from its first bytes.
        lines: The only lines to read; None: all.
    """

    file: SourceFile | None
    format: Format | None
    lines: LineRange | None = None

    @property
    def name(self) -> str:
        """Name of the input in messages."""
        return "standard input" if self.file is None else self.file.name

    @property
    def size(self) -> int | None:
        """Size in bytes; None for standard input, pipes and files of unknown size."""
        return None if self.file is None else self.file.size

    @property
    def key(self) -> str:
        """Name of the input, and of its lines if only some are read."""
        return self.name if self.lines is None else self.lines.name_in(self.name)

    @property
    def num_bytes(self) -> int | None:
        """Size of what is read; None as for `size`."""
        return self.size if self.lines is None else self.lines.stop - self.lines.start

    def part(self, lines: LineRange) -> InputFile:
        """Some lines of this file."""
        return replace(self, lines=lines)

    @property
    def path(self) -> Path | None:
        """Path of a file on this machine; None for other inputs."""
        return None if self.file is None else self.file.path

    def content_hash(self) -> str:
        """SHA-256 in hex of the bytes of a file. Raises InvalidCommandError if unreadable."""
        assert self.file is not None
        try:
            with self.file.open() as stream:
                return hashlib.file_digest(cast("io.RawIOBase", stream), "sha256").hexdigest()
        except OSError as error:
            reason = error.strerror or error
            raise InvalidCommandError(f"cannot read {self.name}: {reason}") from None

    def stamp(self) -> tuple[int | None, Version] | None:
        """Size and version of the file at this moment; None if it can be read only once.

        Raises InvalidCommandError if the file is gone.
        """
        return None if self.file is None or self.size is None else self.file.stamp()


def format_of(name: str) -> Format | None:
    """Format for the suffix of a file's name; None if unknown.

    A suffix of a compression, such as `.gz` or `.zst`, is ignored.
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def sniff(file: InputFile, opened: OpenFile, text_columns: tuple[str, ...]) -> Format:
    """Format of an input from which nothing was read yet.

    Parquet, ORC and Arrow are recognized by their first bytes. Otherwise the format is
    `file.format`. If that is None, the first line decides; for standard input, a line with all of
    `text_columns` is a CSV or TSV header.

    Raises:
        InvalidCommandError: The format is unknown or ambiguous.
    """
    start = opened.stream.peek(FIRST_LINE_BYTES)[:FIRST_LINE_BYTES]
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"ORC"):
        return "orc"
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if start.startswith(b"FEA1"):
        raise InvalidCommandError(
            f"{file.name} is of Feather's version 1, expected version 2, which is Arrow IPC; write "
            "the file again in version 2"
        )
    if file.format is not None:
        return file.format
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{") or re.match(rb"\[\s*\{", text):
        return "jsonl"
    if file.file is None:
        return _by_header(re.split(rb"[\r\n]", text, maxsplit=1)[0], file.name, text_columns)
    raise InvalidCommandError(
        f"{file.name}: neither its name nor its first bytes tell its `format`; name one",
        field="format",
        allowed=FORMATS,
    )


def guess_notice(file: InputFile, kind: Format) -> str:
    return f"{file.name} is read as {_FORMAT_NAMES[kind]}; to change that, give --format"


def _by_header(line: bytes, name: str, text_columns: tuple[str, ...]) -> Format:
    """Format of standard input by its first line.

    CSV or TSV if the line is a header with the text columns, plain text if it is no header. Raises
    InvalidCommandError if the line may be either.
    """
    first = line.decode(errors="replace").rstrip("\r")
    doubtful = first.strip().strip('"') in text_columns
    for delimiter in "\t,;":
        try:
            fields = next(csv.reader([first], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        if len(fields) < 2:
            continue
        if delimiter != ";" and all(fields.count(one) == 1 for one in text_columns):
            return "tsv" if delimiter == "\t" else "csv"
        # In prose a space follows a comma, so that a field does not look like a column name.
        words = [field for field in fields if field]
        names = len(words) > 1 and all(_COLUMN_NAME.fullmatch(word) for word in words)
        doubtful |= names or any(field.strip() in text_columns for field in fields)
    if doubtful:
        raise InvalidCommandError(
            f"{name} begins with {first[:80]!r}, which may be a header or a text; give --format "
            "csv (or tsv) and the name of the text column, or --format text",
            field="format",
            allowed=FORMATS,
        )
    return "text"
