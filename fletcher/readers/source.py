"""One stream of batches from many files; all batches have the same schema."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from fletcher.errors import FletcherError, InvalidCommandError
from fletcher.readers.columns import Batches, Selection
from fletcher.readers.files import Format, InputFile, find_files, guess_notice, open_file, sniff
from fletcher.readers.lines import read_jsonl, read_text
from fletcher.readers.tables import read_arrow_file, read_arrow_stream, read_csv, read_parquet

log = logging.getLogger(__name__)

# Functions that read batches from a stream: (stream, name for messages, selection) -> batches.
_STREAM_READERS: dict[Format, Callable[..., Batches]] = {
    "arrow": read_arrow_stream,
    "jsonl": read_jsonl,
    "text": read_text,
    "csv": partial(read_csv, delimiter=","),
    "tsv": partial(read_csv, delimiter="\t"),
}


def open_source(
    paths: str | Path | Iterable[str | Path],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    columns: Iterable[str] = (),
    format_name: str | None = None,
    batch_rows: int = 4096,
    limit: int | None = None,
    stdin: BinaryIO | None = None,
    notice: Callable[[str], None] = log.info,
) -> TextSource:
    """Open files, folders or standard input (`-`) for reading as one stream.

    Formats: Parquet, CSV and TSV with a header, JSON lines, Arrow IPC (file and stream) and plain
    text (a text per line). All formats except Parquet and the Arrow IPC file may be compressed with
    gzip or zstd.

    If `format_name` is None, the format of standard input is detected. Parquet and Arrow are
    recognized by their first bytes, other formats by the first line: JSON, or a CSV or TSV header
    with the text column. Any other first line means plain text, but one that might be a header is
    refused.

    Args:
        paths: Files or folders, or `-` for standard input.
        text_column: Column of the text. The only column of plain text gets this name.
        id_column: Column of the id; None: the column `id` if the input has it.
        columns: Further columns to read.
        format_name: One of `fletcher.readers.FORMATS`; None: detected from name and content.
        batch_rows: Maximum number of rows of a batch. Batches are also limited to about 4 MiB.
        limit: Maximum number of rows to read in all; None: no limit.
        stdin: Stream to read instead of standard input.
        notice: Called with a message about a detected format or skipped files.

    Raises:
        InvalidCommandError: A path cannot be read, or a file does not match its format.
        UnknownColumnError, ColumnTypeError, InvalidUtf8Error: The first rows lack a column, or hold
            values of a wrong type or invalid UTF-8.
    """
    if limit is not None and limit < 0:
        raise InvalidCommandError(f"`limit` is {limit}, expected 0 or more", field="limit")
    if batch_rows < 1:
        raise InvalidCommandError(f"`batch_rows` is {batch_rows}, expected at least 1")
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    selection = Selection(text_column, id_column, tuple(columns), batch_rows, limit)
    return TextSource(find_files(listed, format_name, notice), selection, stdin, notice)


class TextSource:
    """Text from files: batches of id, text and carried columns, with one schema.

    Attributes:
        files: The inputs, in the order of reading.
        selection: Columns and rows to read from the files.
        schema: Schema of every batch. The text is utf8, the id utf8 or an integer type.
        total_bytes: Size of all files; None unless all are regular files.
        bytes_read: Bytes of the files that the latest iteration of `batches()` has read so far.
    """

    def __init__(
        self,
        files: list[InputFile],
        selection: Selection,
        stdin: BinaryIO | None,
        notice: Callable[[str], None],
    ) -> None:
        self.files = files
        self.selection = selection
        self.bytes_read = 0
        self._stdin = stdin
        self._notice = notice
        sizes = [file.size for file in files if file.size is not None]
        self.total_bytes: int | None = sum(sizes) if len(sizes) == len(files) else None
        # The first batch is read here because it decides the schema. The first call of `batches`
        # returns that batch, and continues after it.
        found = self._read_files()
        empty = pa.RecordBatch.from_pydict({selection.text: pa.array([], pa.utf8())})
        batch, where = first = next(found, (empty, "no input"))
        self.schema = selection.sent_schema(batch.schema, where)
        self._first_pass: Iterable[tuple[pa.RecordBatch, str]] | None = chain([first], found)

    @property
    def reiterable(self) -> bool:
        """Whether `batches` can be called repeatedly, as all inputs are regular files."""
        return self.total_bytes is not None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Batches of at most `batch_rows` rows. Every call starts at the first row.

        Raises:
            InvalidCommandError: A file is damaged, or an input cannot be read twice.
            UnknownColumnError, ColumnTypeError, InvalidUtf8Error: A later row or file lacks a
            column, or holds values of a wrong type or invalid UTF-8.
        """
        first_pass, self._first_pass = self._first_pass, None
        if first_pass is not None:
            return self._conformed(first_pass)
        if not self.reiterable:
            raise InvalidCommandError("standard input and pipes can be read only once")
        return self._conformed(self._read_files())

    def content_hash(self) -> str:
        """SHA-256 in hex of the files' contents, their formats and the selection.

        Raises:
            InvalidCommandError: An input is not a regular file, or a file cannot be read.
        """
        if not self.reiterable:
            raise InvalidCommandError("standard input has no hash before it is read; give a file")
        digest = hashlib.sha256()
        chosen, formats = self.selection, [file.format for file in self.files]
        read = [chosen.text, chosen.id, chosen.carried, chosen.limit, formats]
        digest.update(json.dumps(read).encode())
        for file in self.files:
            assert file.path is not None
            try:
                with file.path.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise InvalidCommandError(f"cannot read {file.name}: {error.strerror}") from None
        return digest.hexdigest()

    def _conformed(self, found: Iterable[tuple[pa.RecordBatch, str]]) -> Batches:
        left = self.selection.limit
        for batch, where in found:
            part = batch.slice(0, left)
            if part.num_rows:
                yield self.selection.conform(part, self.schema, where)
            if left is not None:
                left -= part.num_rows
                if left == 0:
                    return

    def _read_files(self) -> Iterator[tuple[pa.RecordBatch, str]]:
        """Unconverted batches, each with its file's name; updates `bytes_read`."""
        before = 0
        for file in self.files:
            try:
                for batch, position in self._read_file(file):
                    self.bytes_read = before + position
                    yield batch, file.name
            except FletcherError:
                raise
            except (pa.ArrowException, OSError, EOFError, ValueError) as error:
                reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["?"])[0]
                raise InvalidCommandError(f"{file.name} cannot be read: {reason[:300]}") from None
            before += file.size or 0
            self.bytes_read = before

    def _read_file(self, file: InputFile) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Unconverted batches of a file, each with the bytes of the file read so far."""
        with open_file(file, self._stdin) as opened:
            kind = sniff(file, opened, self.selection.text)
            if file.path is None and file.format is None:
                self._notice(guess_notice(file, kind))
            is_arrow_file = kind == "arrow" and opened.stream.peek(6).startswith(b"ARROW1")
            if kind == "parquet" or is_arrow_file:
                yield from self._read_seekable(file, kind, opened.compression)
                return
            for batch in _STREAM_READERS[kind](opened.stream, file.name, self.selection):
                yield batch, opened.position()

    def _read_seekable(
        self, file: InputFile, kind: Format, compression: str | None
    ) -> Iterator[tuple[pa.RecordBatch, int]]:
        if file.path is None or file.size is None or compression is not None:
            form = "a Parquet file" if kind == "parquet" else "an Arrow file"
            remedy = "give it as a file, not through a pipe"
            raise InvalidCommandError(
                f"{file.name} is {form}, whose index is at its end: "
                f"{'decompress it first' if compression else remedy}"
            )
        read = read_parquet if kind == "parquet" else read_arrow_file
        for batch, share in read(file.path, file.name, self.selection):
            yield batch, int(share * file.size)
