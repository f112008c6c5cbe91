"""Input files: find them, detect their format, open and decompress them."""

from __future__ import annotations

import csv
import io
import logging
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast, get_args

import pyarrow as pa

from fletcher.errors import InvalidCommandError

log = logging.getLogger(__name__)

Format = Literal["parquet", "csv", "tsv", "jsonl", "arrow", "text"]
FORMATS: tuple[str, ...] = get_args(Format)
STDIN = "-"
BUFFER_BYTES = 1 << 20
SNIFF_BYTES = 64
MAX_KINDS = 5  # maximum number of suffixes that a notice lists
# A first line longer than this is not treated as a header.
FIRST_LINE_BYTES = 64 << 10

_SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    ".csv": "csv",
    ".tsv": "tsv",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".arrow", ".arrows", ".feather", ".ipc"), "arrow"),
    **dict.fromkeys((".txt", ".text"), "text"),
}
_FORMAT_NAMES: dict[Format, str] = {
    "parquet": "a Parquet file",
    "csv": "CSV with a header",
    "tsv": "TSV with a header",
    "jsonl": "JSON lines",
    "arrow": "Arrow IPC",
    "text": "plain text, one text a line",
}
_COMPRESSED = (".gz", ".zst", ".zstd")
_COLUMN_NAME = re.compile(r"[^\W\d][\w .()/%-]{0,63}")
_MAGIC: tuple[tuple[bytes, str], ...] = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file, or standard input.

    Attributes:
        path: Path of the file; None for standard input.
        name: Name of the input in messages.
        size: Size on disk in bytes; None unless the input is a regular file.
        format: Format of the input; None: detected from its first bytes.
    """

    path: Path | None
    name: str
    size: int | None
    format: Format | None


def find_files(
    paths: Iterable[str | Path],
    format_name: str | None = None,
    notice: Callable[[str], None] = log.info,
) -> list[InputFile]:
    """List the input files at some paths.

    The files in a folder and its subfolders are sorted by path. Hidden files and the contents of
    hidden folders are left out.

    Args:
        paths: Files, folders, or `-` for standard input (at most once).
        format_name: One of FORMATS, for all files. None: the file name decides the format, or the
            first bytes if the name does not.
        notice: Called with a message about files of a folder that are skipped.

    Raises:
        InvalidCommandError: A path does not exist, a folder has no file to read, no path is given,
            `-` is given twice, or the format is unknown.
    """
    if format_name is not None and format_name not in FORMATS:
        raise InvalidCommandError(
            f"`format` is {format_name!r}, expected one of {', '.join(FORMATS)}",
            field="format",
            allowed=FORMATS,
        )
    chosen = cast("Format | None", format_name)
    files: list[InputFile] = []
    for path in paths:
        if str(path) == STDIN:
            files.append(InputFile(None, "standard input", None, chosen))
        else:
            files += _files_at(Path(path), chosen, notice)
    if not files:
        raise InvalidCommandError("no file to read was given; name a file, a folder or `-`")
    if sum(file.path is None for file in files) > 1:
        raise InvalidCommandError("standard input (`-`) was given twice; it can be read once")
    return files


def _files_at(path: Path, chosen: Format | None, notice: Callable[[str], None]) -> list[InputFile]:
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidCommandError(f"cannot read {path}: {error.strerror}") from None
    if not path.is_dir():
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        return [InputFile(path, str(path), size, chosen or format_of(path))]
    found = []
    unknown: Counter[str] = Counter()
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if hidden or not file.is_file():
            continue
        if known := format_of(file):
            found.append(InputFile(file, str(file), file.stat().st_size, chosen or known))
        else:
            unknown[file.suffix.lower()] += 1
    if not found:
        raise InvalidCommandError(
            f"the folder {path} holds no file to read; expected names that end in "
            f"{', '.join(_SUFFIXES)}, each also with .gz or .zst"
        )
    if unknown:
        notice(_skipped_files(path, unknown))
    return found


def _skipped_files(folder: Path, unknown: Counter[str]) -> str:
    number = unknown.total()
    kinds = [f"{count} {kind or 'without a suffix'}" for kind, count in unknown.most_common()]
    shown = kinds[:MAX_KINDS] + (["others"] if len(kinds) > MAX_KINDS else [])
    return (
        f"{number:,} {'file' if number == 1 else 'files'} of unknown kind in {folder} "
        f"{'is' if number == 1 else 'are'} skipped ({', '.join(shown)}); "
        "to read such a file, name it and give --format"
    )


def format_of(path: Path) -> Format | None:
    """Format for the suffix of a file's name; None if unknown.

    A suffix of a compression, such as `.gz` or `.zst`, is ignored.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open input.

    Attributes:
        stream: Stream of the decompressed bytes.
        compression: Compression of the input: `gzip`, `zstd` or None.
        position: Function that returns the number of bytes of the file on disk that were read so
            far; 0 for standard input and pipes.
    """

    stream: io.BufferedReader
    compression: str | None
    position: Callable[[], int]


@contextmanager
def open_file(file: InputFile, stdin: BinaryIO | None = None) -> Iterator[OpenFile]:
    """Open an input. gzip and zstd are detected by the first bytes and decompressed."""
    if file.path is None:
        yield _opened(_Pipe(stdin if stdin is not None else sys.stdin.buffer))
        return
    with file.path.open("rb", buffering=0) as raw:
        yield _opened(_Pipe(raw) if file.size is None else raw)


class _Pipe(io.RawIOBase):
    """Standard input or a named pipe.

    The first read waits for enough bytes to detect the format. That is SNIFF_BYTES with a line end
    among the bytes, or FIRST_LINE_BYTES without one.
    """

    def __init__(self, source: BinaryIO | io.FileIO) -> None:
        self.read_some = getattr(source, "read1", source.read)
        self.begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        filled, line_ended = 0, False
        while data := self.read_some(len(buffer) - filled):
            buffer[filled : filled + len(data)] = data
            filled += len(data)
            line_ended = line_ended or b"\n" in data
            enough = SNIFF_BYTES if line_ended else FIRST_LINE_BYTES
            if self.begun or filled >= min(enough, len(buffer)):
                break
        self.begun = True
        return filled


def _opened(raw: io.FileIO | _Pipe) -> OpenFile:
    position = raw.tell if isinstance(raw, io.FileIO) else lambda: 0
    stream = cast("io.BufferedReader", io.BufferedReader(raw, BUFFER_BYTES))
    start = stream.peek(4)
    for magic, compression in _MAGIC:
        if start.startswith(magic):
            inner = pa.CompressedInputStream(stream, compression)
            return OpenFile(io.BufferedReader(inner, BUFFER_BYTES), compression, position)
    return OpenFile(stream, None, position)


def sniff(file: InputFile, opened: OpenFile, text_column: str) -> Format:
    """Format of an input from which nothing was read yet.

    Parquet and Arrow are recognized by their first bytes. Otherwise the format is `file.format`. If
    that is None, the first line decides; for standard input, a line with the text column is a CSV
    or TSV header.

    Raises:
        InvalidCommandError: The format is unknown or ambiguous.
    """
    start = opened.stream.peek(FIRST_LINE_BYTES)[:FIRST_LINE_BYTES]
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if file.format is not None:
        return file.format
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    # The JSON lines reader refuses an array of objects with a helpful message.
    if text.startswith(b"{") or re.match(rb"\[\s*\{", text):
        return "jsonl"
    if file.path is None:
        return _by_header(text.partition(b"\n")[0], file.name, text_column)
    raise InvalidCommandError(
        f"{file.name}: neither its name nor its first bytes tell its `format`; name one",
        field="format",
        allowed=FORMATS,
    )


def guess_notice(file: InputFile, kind: Format) -> str:
    return f"{file.name} is read as {_FORMAT_NAMES[kind]}; to change that, give --format"


def _by_header(line: bytes, name: str, text_column: str) -> Format:
    """Format of standard input by its first line.

    CSV or TSV if the line is a header with the text column, plain text if it is no header. Raises
    InvalidCommandError if the line may be either.
    """
    first = line.decode(errors="replace").rstrip("\r")
    doubtful = first.strip().strip('"') == text_column
    for delimiter in "\t,;":
        try:
            fields = next(csv.reader([first], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        if len(fields) < 2:
            continue
        if text_column in fields and delimiter != ";" and len(set(fields)) == len(fields):
            return "tsv" if delimiter == "\t" else "csv"
        # In prose a space follows a comma, so that a field does not look like a column name.
        words = [field for field in fields if field]
        names = len(words) > 1 and all(_COLUMN_NAME.fullmatch(word) for word in words)
        doubtful |= names or text_column in [field.strip() for field in fields]
    if doubtful:
        raise InvalidCommandError(
            f"{name} begins with {first[:80]!r}, which may be a header or a text; give --format "
            "csv (or tsv) and the name of the text column, or --format text",
            field="format",
            allowed=FORMATS,
        )
    return "text"
