"""Reading of one input file, with the types of all files."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import BinaryIO

import pyarrow as pa

from fletcher.errors import FletcherError, InvalidCommandError
from fletcher.readers.bad_rows import OnBadLine, fail_on_bad_line, ignore_bad_line
from fletcher.readers.columns import Selection
from fletcher.readers.csv_rows import CsvFile, Dialect, check_delimiter
from fletcher.readers.csv_types import CsvTypes
from fletcher.readers.files import TABLES, Format, InputFile, guess_notice, sniff
from fletcher.readers.json_rows import JsonGroup, read_groups
from fletcher.readers.json_types import JsonTypes
from fletcher.readers.lines import read_text, read_whole_file
from fletcher.readers.orc_files import orc_schema, read_orc
from fletcher.readers.partitions import PartitionTypes, partition_values
from fletcher.readers.source_files import SourceFile
from fletcher.readers.streams import OpenFile, check_encoding, open_stream, utf8_stream
from fletcher.readers.tables import (
    BatchesWithShare,
    arrow_schema,
    parquet_schema,
    read_arrow_file,
    read_arrow_stream,
    read_parquet,
    stream_schema,
)

log = logging.getLogger(__name__)

BatchesWithPosition = Iterator[tuple[pa.RecordBatch, int]]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Options for reading files.

    Attributes:
        delimiter: Delimiter of CSV and TSV; None: comma and tab.
        encoding: Encoding of text files; None: UTF-8.
        stdin: Stream to read instead of standard input.
        notice: Called with a message about a detected format.
        on_bad_line: Called with each line of JSON lines or plain text that cannot be read. If it
            returns, the line is left out.
    """

    delimiter: str | None = None
    encoding: str | None = None
    stdin: BinaryIO | None = None
    notice: Callable[[str], None] = log.info
    on_bad_line: OnBadLine = fail_on_bad_line

    def __post_init__(self) -> None:
        """Raise InvalidCommandError for an unknown encoding or a wrong delimiter."""
        object.__setattr__(self, "delimiter", check_delimiter(self.delimiter))
        if self.encoding is not None:
            check_encoding(self.encoding)


@dataclass(frozen=True, slots=True)
class _TableReader:
    """Functions for files whose index is at their end."""

    form: str
    schema: Callable[[SourceFile, str, Selection], pa.Schema]
    read: Callable[[SourceFile, str, Selection], BatchesWithShare]


_TABLE_READERS: dict[str, _TableReader] = {
    "parquet": _TableReader("a Parquet file", parquet_schema, read_parquet),
    "arrow": _TableReader("an Arrow file", arrow_schema, read_arrow_file),
    "orc": _TableReader("an ORC file", orc_schema, read_orc),
}


class FileReader:
    """Reader of files of every format.

    `survey` looks at files before they are read, so that the types of columns are those of all
    values. The types of a file that was not surveyed are those of its first batch.
    """

    def __init__(self, selection: Selection, options: ReadOptions) -> None:
        self.selection = selection
        self.options = options
        self._json = JsonTypes(selection)
        self._csv = CsvTypes(selection)
        self._surveyed: set[str] = set()
        # By file, a function that returns the file's schema once all files are surveyed.
        self._schemas: list[tuple[Callable[[], pa.Schema], str]] = []
        self._num_rows = 0
        self._partitions = PartitionTypes()
        # By the columns that come from folders, the reader of the others.
        self._inner: dict[tuple[str, ...], FileReader] = {}

    def no_rows(self) -> pa.RecordBatch:
        """The batch of an input without rows."""
        texts = {name: pa.array([], pa.utf8()) for name in self.selection.text_columns}
        others = {name: pa.nulls(0) for name in self.selection.carried if name not in texts}
        return pa.RecordBatch.from_pydict(texts | others)

    @property
    def is_satisfied(self) -> bool:
        """Whether the surveyed files have as many rows as may be read."""
        return self.selection.limit is not None and self._num_rows >= self.selection.limit

    def schemas(self) -> list[tuple[pa.Schema, str]]:
        """The schemas of the surveyed files that have rows, and the names of the files."""
        return [(schema(), where) for schema, where in self._schemas]

    def survey(self, file: InputFile) -> None:
        """Look at a regular file: at all of it if its columns have no declared types.

        Raises:
            FletcherError: The file is damaged, lacks a column, or has values of a wrong type.
        """
        if values := self._folder_values(file):
            self._partitions.observe_values(values)
            inner = self._reader_without(values)
            inner.survey(file)
            for schema, where in inner._take_schemas():
                self._schemas.append(
                    (lambda schema=schema: self._with_folders(schema(), values), where)  # type: ignore[misc]
                )
            self._num_rows = inner._num_rows
            return
        self._surveyed.add(file.key)
        # Lines are reported when they are read, not twice.
        fails = self.options.on_bad_line is fail_on_bad_line
        on_bad_line = fail_on_bad_line if fails else ignore_bad_line
        with named_errors(file.name), self._open(file) as (opened, kind):
            if kind in TABLES:
                self._survey_table(file, opened, kind)
                return
            stream = self._text_stream(file, opened)
            if self.selection.whole_files:
                fixed = pa.schema({"id": pa.utf8(), self.selection.text_column: pa.utf8()})
                self._schemas.append((lambda: fixed, file.name))
            elif kind == "text":
                for batch in read_text(
                    stream, file.name, self.selection, on_bad_line, _first_line(file)
                ):
                    self._schemas.append((lambda: batch.schema, file.name))  # noqa: B023
                    break
            elif kind == "jsonl":
                rows = self.selection.batch_rows
                first_line = _first_line(file)
                groups = self._counted(
                    read_groups(stream, file.name, rows, on_bad_line, first_line)
                )
                names = self._json.observe_file(groups, file.name)
                if names is not None:
                    self._schemas.append((lambda: self._json.schema(names), file.name))
            else:
                self._survey_csv(CsvFile(stream, file.name, self.selection, self._dialect(kind)))

    def _folder_values(self, file: InputFile) -> dict[str, str | None]:
        return partition_values(file.name, self.selection.carried)

    def _reader_without(self, values: Iterable[str]) -> FileReader:
        """The reader of the columns that are not in `values`."""
        names = tuple(sorted(values))
        if names not in self._inner:
            carried = tuple(one for one in self.selection.carried if one not in names)
            self._inner[names] = FileReader(replace(self.selection, carried=carried), self.options)
        return self._inner[names]

    def _with_folders(self, schema: pa.Schema, values: dict[str, str | None]) -> pa.Schema:
        fields = {field.name: field.type for field in schema}
        return pa.schema(
            fields | {one.name: one.type for one in self._partitions.folder_schema(values)}
        )

    def _take_schemas(self) -> list[tuple[Callable[[], pa.Schema], str]]:
        schemas, self._schemas = self._schemas, []
        return schemas

    def _survey_table(self, file: InputFile, opened: OpenFile, kind: Format) -> None:
        if not _is_seekable(opened, kind):
            schema = stream_schema(opened.stream, file.name, self.selection)
        else:
            table = _table_file(file, opened, kind)
            schema = _TABLE_READERS[kind].schema(table, file.name, self.selection)
        self._schemas.append((lambda: schema, file.name))

    def _survey_csv(self, csv: CsvFile) -> None:
        if not csv.chosen:
            return
        if self._csv.needed:
            for batch in csv.read_batches():
                self._csv.observe_texts(batch)
                self._num_rows += batch.num_rows
                if self.is_satisfied:
                    break
        self._schemas.append((lambda: self._csv.schema(csv.chosen), csv.name))

    def _counted(self, groups: Iterator[JsonGroup]) -> Iterator[JsonGroup]:
        for group in groups:
            yield group
            self._num_rows += group.num_rows
            if self.is_satisfied:
                return

    def read(self, file: InputFile) -> BatchesWithPosition:
        """Batches of a file, each with the bytes of the file read so far.

        Raises:
            FletcherError: The file is damaged, lacks a column, or has values of a wrong type.
        """
        if values := self._folder_values(file):
            self._partitions.observe_values(values)  # of a file that was not surveyed
            for batch, position in self._reader_without(values).read(file):
                yield self._partitions.add_columns(batch, values), position
            return
        with named_errors(file.name), self._open(file) as (opened, kind):
            if file.file is None and file.format is None:
                self.options.notice(guess_notice(file, kind))
            if kind in TABLES:
                if _is_seekable(opened, kind):
                    yield from self._read_seekable(file, opened, kind)
                    return
                batches = read_arrow_stream(opened.stream, file.name, self.selection)
            else:
                batches = self._read_text(file, self._text_stream(file, opened), kind)
            for batch in batches:
                yield batch, opened.position()

    def _read_text(
        self, file: InputFile, stream: io.BufferedReader, kind: Format
    ) -> Iterator[pa.RecordBatch]:
        name, on_bad_line = file.name, self.options.on_bad_line
        if self.selection.whole_files:
            return read_whole_file(stream, name, self.selection)
        if kind == "text":
            return read_text(stream, name, self.selection, on_bad_line, _first_line(file))
        if kind == "jsonl":
            rows = self.selection.batch_rows
            groups = read_groups(stream, name, rows, on_bad_line, _first_line(file))
            return self._read_json(groups, file)
        return self._read_csv(CsvFile(stream, name, self.selection, self._dialect(kind)))

    def _read_json(self, groups: Iterator[JsonGroup], file: InputFile) -> Iterator[pa.RecordBatch]:
        if file.key not in self._surveyed and (first := next(groups, None)) is not None:
            self._json.observe_file(iter([first]), file.name)
            groups = chain([first], groups)
        for group in groups:
            yield self._json.convert(group, file.name)

    def _read_csv(self, csv: CsvFile) -> Iterator[pa.RecordBatch]:
        observed = csv.name in self._surveyed
        rows = 0
        for batch in csv.read_batches():
            if not observed:
                self._csv.observe_texts(batch)
                observed = True
            for start in range(0, batch.num_rows, self.selection.batch_rows):
                part = batch.slice(start, self.selection.batch_rows)
                yield self._csv.convert(part, csv.name, rows)
                rows += part.num_rows

    def _read_seekable(
        self, file: InputFile, opened: OpenFile, kind: Format
    ) -> BatchesWithPosition:
        table = _table_file(file, opened, kind)
        for batch, share in _TABLE_READERS[kind].read(table, file.name, self.selection):
            yield batch, int(share * (file.size or 0))

    @contextmanager
    def _open(self, file: InputFile) -> Iterator[tuple[OpenFile, Format]]:
        part = None if file.lines is None else (file.lines.start, file.lines.stop)
        with open_stream(file.file, stdin=self.options.stdin, part=part) as opened:
            if self.options.encoding is not None and file.format not in TABLES:
                stream = utf8_stream(opened.stream, self.options.encoding, file.name)
                opened = OpenFile(stream, opened.compression, opened.position)  # noqa: PLW2901
            # The first bytes of later lines tell nothing about the file's format.
            kind = None if file.lines is None else file.format
            yield opened, kind or sniff(file, opened, self.selection.text_columns)

    def _text_stream(self, file: InputFile, opened: OpenFile) -> io.BufferedReader:
        if self.options.encoding is not None:  # converted when it was opened
            return opened.stream
        return utf8_stream(opened.stream, None, file.name)

    def _dialect(self, kind: Format) -> Dialect:
        return Dialect.of(self.options.delimiter, is_tsv=kind == "tsv")


def _first_line(file: InputFile) -> int:
    return 1 if file.lines is None else file.lines.first_line


def _is_seekable(opened: OpenFile, kind: Format) -> bool:
    """Whether a file's index is at its end."""
    return kind in ("parquet", "orc") or opened.stream.peek(6).startswith(b"ARROW1")


def _table_file(file: InputFile, opened: OpenFile, kind: Format) -> SourceFile:
    """A file with an index. Raises InvalidCommandError for a stream."""
    if file.file is None or file.size is None or opened.compression is not None:
        form = _TABLE_READERS[kind].form
        remedy = "give it as a file, not through a pipe"
        raise InvalidCommandError(
            f"{file.name} is {form}, whose index is at its end: "
            f"{'decompress it first' if opened.compression else remedy}"
        )
    return file.file


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Convert errors of libraries to InvalidCommandError with the file's name."""
    try:
        yield
    except FletcherError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["?"])[0]
        raise InvalidCommandError(f"{name} cannot be read: {reason[:300]}") from None
