"""Parquet, Arrow and CSV, read a piece at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from fletcher.errors import InvalidCommandError, InvalidUtf8Error
from fletcher.readers.columns import Selection

# A row of CSV must fit into one block, and the server takes rows of 16 MiB by default.
CSV_BLOCK_BYTES = 32 << 20
CSV_HEADER_BYTES = 1 << 20
MAX_HEADER_LINES = 100
# The text of the row that `_WithLastRow` adds.
_END = "(end of file)"


def read_parquet(
    path: Path, name: str, selection: Selection, batch_rows: int, batch_bytes: int
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """(batch, share of the file read so far)."""
    # Buffered reads: without them every column chunk is read as a whole.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        chosen = selection.of(file.schema_arrow.names, name)
        rows = _rows_per_batch(file.metadata, chosen, batch_rows, batch_bytes)
        total, done = max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=rows, columns=chosen, use_threads=False):
            done += batch.num_rows
            yield batch.select(chosen), done / total


def _rows_per_batch(
    metadata: pq.FileMetaData, chosen: list[str], batch_rows: int, batch_bytes: int
) -> int:
    """Rows that keep a batch near `batch_bytes`, judged by the largest row group's average."""
    widest = 1.0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        size = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.partition(".")[0] in chosen
        )
        widest = max(widest, size / max(1, group.num_rows))
    return int(max(1, min(batch_rows, batch_bytes // widest)))


def read_arrow_file(
    path: Path, name: str, selection: Selection, batch_rows: int
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """(batch, share of the file read so far) of the IPC file format, mapped into memory."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
        chosen = selection.of(file.schema.names, name)
        for index in range(file.num_record_batches):
            batch = file.get_batch(index).select(chosen)
            for piece in _pieces(batch, batch_rows):
                yield piece, (index + 1) / file.num_record_batches


def read_arrow_stream(
    stream: io.BufferedReader, name: str, selection: Selection, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Batches of the IPC stream format."""
    with pa.ipc.open_stream(stream) as reader:
        chosen = selection.of(reader.schema.names, name)
        for batch in reader:
            yield from _pieces(batch.select(chosen), batch_rows)


def read_csv(
    stream: io.BufferedReader, name: str, selection: Selection, batch_rows: int, delimiter: str
) -> Iterator[pa.RecordBatch]:
    """Batches of a CSV file with a header.

    Text and id are strings, whatever they look like (an id `007` keeps its zeros); the types of
    carried columns are settled by the first block. Values may hold line ends inside quotes.

    Raises:
        InvalidCommandError: A quote that is never closed: all that follows would be one value.
        InvalidUtf8Error: A value, or the header, is not UTF-8.
    """
    header = _header(stream, name, delimiter)
    if not header:
        return
    chosen = selection.of(header, name)
    strings = {one: pa.utf8() for one in chosen if one == selection.text or selection.is_id(one)}
    if not stream.peek(1):
        return
    last = delimiter.join(_END if one == selection.text else "" for one in header)
    try:
        reader = pa_csv.open_csv(
            _WithLastRow(stream, f"\n{last}\n".encode()),
            read_options=pa_csv.ReadOptions(block_size=CSV_BLOCK_BYTES, column_names=header),
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=strings, include_columns=chosen),
        )
        with reader:
            yield from _pieces_but_last_row(reader, name, selection.text, batch_rows)
    except pa.ArrowInvalid as error:
        if "invalid UTF8" not in str(error):
            raise
        raise InvalidUtf8Error(
            f"{name}: a value is not UTF-8; convert the file, such as with `iconv -t UTF-8`"
        ) from None


class _WithLastRow:
    """A stream, and after it a row of ours: pyarrow takes the file's end for a closing quote."""

    closed = False

    def __init__(self, stream: io.BufferedReader, row: bytes) -> None:
        self._stream = stream
        self._row = row

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not data:
            data, self._row = self._row[:size], self._row[size:]
        return data


def _pieces_but_last_row(
    batches: Iterable[pa.RecordBatch], name: str, text_column: str, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    held: pa.RecordBatch | None = None
    rows = 0
    for batch in batches:
        if held is not None:
            yield from _pieces(held, batch_rows)
        if batch.num_rows:
            held = batch
            rows += batch.num_rows
    if held is None or held.column(text_column)[-1].as_py() != _END:
        raise InvalidCommandError(f"{name}: row {rows} opens a quote that is never closed")
    yield from _pieces(held.slice(0, held.num_rows - 1), batch_rows)


def _header(stream: io.BufferedReader, name: str, delimiter: str) -> list[str]:
    """The names in the first record, which is taken off the stream; none of an empty file."""
    text = ""
    for _ in range(MAX_HEADER_LINES):
        line = stream.readline(CSV_HEADER_BYTES)
        try:
            text += line.decode()
        except UnicodeDecodeError:
            raise InvalidUtf8Error(f"{name}: its header is not UTF-8") from None
        if not line or (text.strip("\ufeff\r\n") and text.count('"') % 2 == 0):
            break
    lines = io.StringIO(text.removeprefix("\ufeff").lstrip("\r\n"), newline="")
    try:
        header = next(csv.reader(lines, delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise InvalidCommandError(f"{name}: its header is not CSV: {error}") from None
    twice = sorted({one for one in header if header.count(one) > 1})
    if twice:
        raise InvalidCommandError(f"{name}: its header names column `{twice[0]}` twice")
    return header


def _pieces(batch: pa.RecordBatch, batch_rows: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, batch_rows):
        yield batch.slice(start, batch_rows)
