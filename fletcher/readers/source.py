"""One stream of batches from many files; all batches have the same schema."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from fletcher.errors import FletcherError, InvalidCommandError, InvalidUtf8Error
from fletcher.readers.arrays import BATCH_BYTES, Batches
from fletcher.readers.bad_rows import OnBadLine, fail_on_bad_line
from fletcher.readers.columns import Selection
from fletcher.readers.file_reader import FileReader, ReadOptions
from fletcher.readers.files import InputFile
from fletcher.readers.merging import merged_schema, widened
from fletcher.readers.source_files import Version
from fletcher.readers.sources import Notice, find_files

log = logging.getLogger(__name__)


def open_source(
    paths: str | Path | Iterable[str | Path],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    columns: Iterable[str] = (),
    format_name: str | None = None,
    batch_rows: int = 4096,
    limit: int | None = None,
    source: bool = False,
    whole_files: bool = False,
    delimiter: str | None = None,
    encoding: str | None = None,
    excluded: Iterable[Path] = (),
    stdin: BinaryIO | None = None,
    notice: Notice = log.info,
    on_bad_line: OnBadLine = fail_on_bad_line,
) -> TextSource:
    r"""Open files, folders or standard input (`-`) for reading as one stream.

    Formats: Parquet, ORC, CSV and TSV with a header, JSON lines, arrays of JSON objects, Arrow IPC
    (file and stream) and plain text (a text per line). All formats except Parquet, ORC and the
    Arrow IPC file may be compressed with gzip, zstd, bz2 or xz.

    If `format_name` is None, the format of standard input is detected. Parquet and Arrow are
    recognized by their first bytes, other formats by the first line: JSON, or a CSV or TSV header
    with the text column. Any other first line means plain text, but one that might be a header is
    refused.

    The types of columns are those of all values of all files. Files are therefore read twice if
    they are JSON, or CSV with further columns. The types of a pipe are those of its first rows, and
    a later value that does not fit is an error.

    Args:
        paths: Files or folders, or `-` for standard input.
        text_column: Column of the text, or a template such as `{title}\n{body}`. The only column of
            plain text gets this name. A name with dots leads into structs, such as `meta.text`.
        id_column: Column of the id; None: the column `id` if the input has it.
        columns: Further columns to read.
        format_name: One of `fletcher.readers.FORMATS`; None: detected from name and content.
        batch_rows: Maximum number of rows of a batch. Batches are also limited to about 4 MiB.
        limit: Maximum number of rows to read in all; None: no limit.
        source: Whether to add a column `source` with the path of each row's file.
        whole_files: Whether each file is one text, with its path as the id.
        delimiter: Delimiter of CSV and TSV; None: comma and tab.
        encoding: Encoding of text files; None: UTF-8.
        excluded: Folders inside `paths` to leave out, such as that of a store.
        stdin: Stream to read instead of standard input.
        notice: Called with a message about a detected format or what is left out.
        on_bad_line: Called with the file, number, bytes and error of each line of JSON lines or
            plain text that cannot be read. If it returns, the line is left out. By default it
            raises the error.

    Raises:
        InvalidCommandError: A path cannot be read, or a file does not match its format.
        UnknownColumnError, ColumnTypeError, InvalidUtf8Error: A file lacks a column, or holds
            values of a wrong type or invalid UTF-8.
    """
    if limit is not None and limit < 0:
        raise InvalidCommandError(f"`limit` is {limit}, expected 0 or more", field="limit")
    if batch_rows < 1:
        raise InvalidCommandError(f"`batch_rows` is {batch_rows}, expected at least 1")
    selection = Selection(
        text_column, id_column, tuple(columns), batch_rows, limit, source, whole_files
    )
    options = ReadOptions(delimiter, encoding, stdin, notice, on_bad_line)
    files = find_inputs(paths, selection, options, format_name, tuple(excluded))
    return TextSource(files, FileReader(selection, options))


def find_inputs(
    paths: str | Path | Iterable[str | Path],
    selection: Selection,
    options: ReadOptions,
    format_name: str | None = None,
    excluded: tuple[Path, ...] = (),
) -> list[InputFile]:
    """List the input files at some paths, see `open_source`. No file is opened.

    Raises:
        InvalidCommandError: A path cannot be read, or there is no file.
        InvalidUtf8Error: The rows would hold the name of a file that is not UTF-8.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    whole_files = selection.whole_files
    files = find_files(
        listed, format_name, options.notice, whole_files=whole_files, excluded=excluded
    )
    if selection.source or whole_files:
        _check_names(files)
    return files


class TextSource:
    """Text from files: batches of id, text and carried columns, with one schema.

    Attributes:
        files: The inputs, in the order of reading.
        selection: Columns and rows to read from the files.
        schema: Schema of every batch. The text is utf8, the id utf8 or an integer type.
        total_bytes: Size of all files; None unless all are regular files.
        limit: Maximum number of rows of the next iteration; None: no limit.
        rows_read: Rows of the latest iteration so far.
        failure: The error that ended the latest iteration.
        first_rows: Number of the first row of each file in the latest iteration.
    """

    def __init__(
        self,
        files: list[InputFile],
        reader: FileReader,
        plain_schema: pa.Schema | None = None,
        *,
        earlier: pa.Schema | None = None,
    ) -> None:
        """Open the files.

        `plain_schema` is the schema before composition, if it is known. `earlier` is that of files
        that were read before. Columns have a type that holds the values of both, if there is one.
        """
        self.files = files
        self.selection = reader.selection
        self._reader = reader
        self.limit = reader.selection.limit
        self.rows_read = 0
        self.first_rows: dict[str, int] = {}
        self._earlier = earlier
        self._bytes_read = 0
        self._parts: list[TextSource] | None = None
        self.failure: FletcherError | None = None
        # Stamps of files when they were hashed or first read.
        self._stamps: dict[str, tuple[int | None, Version] | None] = {}
        sizes = [file.num_bytes for file in files if file.num_bytes is not None]
        self.total_bytes: int | None = sum(sizes) if len(sizes) == len(files) else None
        self._first_pass: Iterable[tuple[pa.RecordBatch, str]] | None = None
        if plain_schema is None and self.reiterable:
            plain_schema = self._survey()
        elif plain_schema is None:
            # The first batch decides the schema. The first call of `batches` returns that batch,
            # and continues after it.
            found = self._read_files()
            first = next(found, None)
            batch, where = first or (reader.no_rows(), "no input")
            plain_schema = self.selection.plain_schema(batch.schema, where)
            self._first_pass = chain([first] if first else [], found)
        self.plain_schema = plain_schema
        self.schema = self.selection.sent_schema(plain_schema)

    @property
    def options(self) -> ReadOptions:
        """Options for reading the files."""
        return self._reader.options

    @property
    def schemas(self) -> list[tuple[pa.Schema, str]]:
        """Schema and name of each file that has rows, if all are regular files."""
        return self._reader.schemas()

    @property
    def reiterable(self) -> bool:
        """Whether `batches` can be called repeatedly, as all inputs are regular files."""
        return self.total_bytes is not None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files that the latest iteration of `batches()` has read so far."""
        if self._parts is None:
            return self._bytes_read
        return sum(part.bytes_read for part in self._parts)

    def by_file(self) -> list[TextSource]:
        """A source for each file with the schema of this one. They replace this source."""
        return self.split([[one] for one in self.files])

    def split(self, groups: Iterable[list[InputFile]]) -> list[TextSource]:
        """A source for each group of files with the schema of this one.

        The groups have all files of this source, which they replace.
        """
        if self._parts is None:
            self._parts = [TextSource(one, self._reader, self.plain_schema) for one in groups]
        return self._parts

    def batches(self) -> Batches:
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
        """SHA-256 in hex of the files' contents and of the options that decide rows.

        Neither the limit nor the carried columns count: rows of the same files are the same rows.

        Raises:
            InvalidCommandError: An input is not a regular file, or a file cannot be read.
        """
        if not self.reiterable:
            raise InvalidCommandError("standard input has no hash before it is read; give a file")
        contents = []
        for file in self.files:
            self._stamps[file.key] = file.stamp()
            contents.append(file.content_hash())
        return rows_hash(self.files, contents, self.selection, self.options)

    def _survey(self) -> pa.Schema:
        """The schema of all files, by all values where a file does not tell its types.

        Raises:
            FletcherError: A file cannot be read, or see `merged_schema`.
        """
        for file in self.files:
            self._reader.survey(file)
            if self._reader.is_satisfied:
                break
        schemas = self._reader.schemas()
        if not schemas:
            return self._reader.no_rows().schema
        return widened(merged_schema(schemas, self.selection), self._earlier)

    def _conformed(self, found: Iterable[tuple[pa.RecordBatch, str]]) -> Batches:
        batches = self._conformed_batches(found)
        try:
            # A pipe's rows may come slowly, so they do not wait for others.
            yield from self._joined(batches) if self.reiterable else batches
        except FletcherError as error:
            self.failure = error
            raise

    def _joined(self, batches: Batches) -> Batches:
        """Batches of small files joined to batches of about `batch_rows` rows."""
        waiting: list[pa.RecordBatch] = []
        num_rows = num_bytes = 0
        try:
            for batch in batches:
                size = batch.nbytes
                full = num_rows + batch.num_rows > self.selection.batch_rows
                if waiting and (full or num_bytes + size > BATCH_BYTES):
                    yield _concatenated(waiting)
                    waiting, num_rows, num_bytes = [], 0, 0
                waiting.append(batch)
                num_rows, num_bytes = num_rows + batch.num_rows, num_bytes + size
        except FletcherError:
            if waiting:  # the rows before the error are read all the same
                yield _concatenated(waiting)
            raise
        if waiting:
            yield _concatenated(waiting)

    def _conformed_batches(self, found: Iterable[tuple[pa.RecordBatch, str]]) -> Batches:
        left = self.limit
        self.rows_read = 0
        self.first_rows, self.failure = {}, None
        rows, last = 0, ""
        for batch, where in found:
            rows, last = (rows if where == last else 0), where
            part = batch.slice(0, left)
            if part.num_rows:
                self.first_rows.setdefault(where, self.rows_read)
                yield self.selection.conform(part, self.plain_schema, where, rows)
                rows += part.num_rows
                self.rows_read += part.num_rows
            if left is not None:
                left -= part.num_rows
                if left == 0:
                    return

    def _read_files(self) -> Iterator[tuple[pa.RecordBatch, str]]:
        """Unconverted batches, each with its file's name; updates `bytes_read`.

        Raises InvalidCommandError if a file changed after it was hashed, or while it was read. Its
        rows would belong to another upload.
        """
        before = 0
        for file in self.files:
            stamp = self._stamps.setdefault(file.key, _listed_stamp(file))
            _check_unchanged(file, stamp)
            for batch, position in self._reader.read(file):
                self._bytes_read = before + position
                yield batch, file.name if self.selection.source else file.key
            _check_unchanged(file, stamp)
            before += file.num_bytes or 0
            self._bytes_read = before


def _concatenated(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """One batch of all rows; a single one is not copied."""
    return pa.concat_batches(batches) if batches[1:] else batches[0]


def rows_hash(
    files: Sequence[InputFile],
    contents: Sequence[str],
    selection: Selection,
    options: ReadOptions,
) -> str:
    """SHA-256 in hex of the hashes of files, and of the options that decide rows."""
    formats = [file.format for file in files]
    read: list[Any] = [
        *(selection.text, selection.id, formats, options.delimiter, options.encoding)
    ]
    if selection.whole_files or selection.source:  # the rows hold the path
        read.append([file.name for file in files])
    return hashlib.sha256(json.dumps(read).encode() + bytes.fromhex("".join(contents))).hexdigest()


def _listed_stamp(file: InputFile) -> tuple[int | None, Version] | None:
    """The stamp of a file when it was listed, before it was hashed."""
    listed = file.file
    return None if listed is None or listed.size is None else (listed.size, listed.version)


def _check_unchanged(file: InputFile, stamp: tuple[int | None, Version] | None) -> None:
    if file.stamp() != stamp:
        raise InvalidCommandError(
            f"{file.name} changed while it was read; give a copy that does not change"
        )


def _check_names(files: list[InputFile]) -> None:
    """Raise InvalidUtf8Error unless all names can be stored as text."""
    for file in files:
        try:
            file.name.encode()
        except UnicodeEncodeError:
            raise InvalidUtf8Error(
                f"the name of {file.name!r} is not UTF-8, but `source` and `whole_files` store "
                "names in rows; rename the file"
            ) from None
