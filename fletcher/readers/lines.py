"""Lines of text files, and the reader of plain text."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa

from fletcher.errors import InvalidCommandError, InvalidUtf8Error
from fletcher.readers.arrays import BATCH_BYTES, Batches
from fletcher.readers.bad_rows import OnBadLine
from fletcher.readers.columns import Selection

MAX_LINE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20


def numbered_lines(
    stream: io.BufferedReader, name: str, on_bad_line: OnBadLine, first_line: int = 1
) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, as (line number, text without line end).

    A line ends at CR, LF or CRLF.

    Lines that are not UTF-8 go to `on_bad_line`.

    Raises:
        InvalidCommandError: A line is longer than MAX_LINE_BYTES.
    """
    for number, line in enumerate(raw_lines(stream, name, first_line), first_line):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            bad = InvalidUtf8Error(
                f"{name}: line {number} is not UTF-8: byte {error.start + 1} of it is "
                f"0x{line[error.start]:02x}; if the file has another encoding, give --encoding"
            )
            on_bad_line(name, number, line, bad)
            continue
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text and not text.isspace():
            yield number, text


def raw_lines(stream: io.BufferedReader, name: str, first_line: int = 1) -> Iterator[bytes]:
    """Lines without their ends, which are CR, LF or CRLF.

    Raises InvalidCommandError for a line longer than MAX_LINE_BYTES.
    """
    pending: list[bytes] = []  # pieces of a line that has not ended yet
    size, number, after_cr = 0, first_line - 1, False
    while chunk := stream.read1(_CHUNK_BYTES):
        if after_cr and chunk.startswith(b"\n"):  # a CRLF across two chunks
            chunk = chunk[1:]
        after_cr = chunk.endswith(b"\r") if chunk else False
        lines = chunk.splitlines()
        open_end = lines.pop() if chunk and not chunk.endswith((b"\n", b"\r")) else b""
        for line in lines:
            number += 1
            if pending:
                pending.append(line)
                line, pending, size = b"".join(pending), [], 0  # noqa: PLW2901
            yield line
        if open_end:
            pending.append(open_end)
            size += len(open_end)
            if size > MAX_LINE_BYTES:
                raise InvalidCommandError(
                    f"{name}: line {number + 1} has more than {MAX_LINE_BYTES >> 20} MiB; "
                    "expected one row per line"
                )
    if pending:
        yield b"".join(pending)


def read_text(
    stream: io.BufferedReader,
    name: str,
    selection: Selection,
    on_bad_line: OnBadLine,
    first_line: int = 1,
) -> Batches:
    """Batches of plain text: one column with a row for each line that is not blank."""
    names = _only_text(name, selection)
    texts: list[str] = []
    size = 0
    for _, text in numbered_lines(stream, name, on_bad_line, first_line):
        texts.append(text)
        size += len(text)
        if len(texts) >= selection.batch_rows or size >= BATCH_BYTES:
            yield pa.RecordBatch.from_arrays([pa.array(texts, pa.utf8())], names=names)
            texts, size = [], 0
    if texts:
        yield pa.RecordBatch.from_arrays([pa.array(texts, pa.utf8())], names=names)


def read_whole_file(stream: io.BufferedReader, name: str, selection: Selection) -> Batches:
    """One row: the file's text, with the file's path as the id.

    Raises:
        InvalidUtf8Error: The file is not UTF-8.
        InvalidCommandError: The file is larger than MAX_LINE_BYTES.
    """
    data = stream.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        raise InvalidCommandError(
            f"{name} has more than {MAX_LINE_BYTES >> 20} MiB, too much for one text"
        )
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InvalidUtf8Error(
            f"{name} is not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}; if it has "
            "another encoding, give --encoding"
        ) from None
    columns = {selection.text_column: pa.array([text], pa.utf8())}
    yield pa.RecordBatch.from_pydict({"id": pa.array([name], pa.utf8()), **columns})


def _only_text(name: str, selection: Selection) -> list[str]:
    names = [selection.text]
    selection.pick_names(names, f"{name} (plain text)", names.count)
    return names
