"""Detection of an input's format; an ambiguous input is refused."""

from __future__ import annotations

import csv
import re

from fletcher.errors import InvalidCommandError
from fletcher.readers.files import FIRST_LINE_BYTES, FORMATS, Format, InputFile, OpenFile

_FORMAT_NAMES: dict[Format, str] = {
    "parquet": "a Parquet file",
    "csv": "CSV with a header",
    "tsv": "TSV with a header",
    "jsonl": "JSON lines",
    "arrow": "Arrow IPC",
    "text": "plain text, one text a line",
}
_COLUMN_NAME = re.compile(r"[^\W\d][\w .()/%-]{0,63}")


def sniff(file: InputFile, opened: OpenFile, text_column: str) -> Format:
    """The format of an input: the given one, else by its first line.

    Args:
        file: The input.
        opened: The same, open and not yet read.
        text_column: Column of the text, which identifies the header of a CSV file.

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
    # The JSON lines reader refuses an array of objects, with a reason.
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
    """Notice about a detected format."""
    return f"{file.name} is read as {_FORMAT_NAMES[kind]}; to change that, give --format"


def _by_header(line: bytes, name: str, text_column: str) -> Format:
    """CSV or TSV for a header with the text column, plain text for no header."""
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
        # Prose has a space after a comma; column names are words.
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
