"""Readers of Parquet, Arrow and CSV files that return one batch at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from fletcher.errors import InvalidCommandError, InvalidUtf8Error
from fletcher.readers.columns import BATCH_BYTES, Batches, Selection

# A CSV row must fit into one block. The server accepts rows of up to 16 MiB by default.
CSV_BLOCK_BYTES = 32 << 20
CSV_HEADER_BYTES = 1 << 20
MAX_HEADER_LINES = 100
BatchesWithShare = Iterator[tuple[pa.RecordBatch, float]]
# Text of the row that `_WithLastRow` appends.
_END = "(end of file)"


def read_parquet(path: Path, name: str, selection: Selection) -> BatchesWithShare:
    """Batches of a Parquet file, each with the share of the rows read so far, 0 to 1."""
    # Reads are buffered because pyarrow would otherwise load each column chunk completely.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        chosen = selection.pick_names(file.schema_arrow.names, name)
        rows = _rows_per_batch(file.metadata, chosen, selection.batch_rows)
        total, done = max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=rows, columns=chosen, use_threads=False):
            done += batch.num_rows
            yield batch.select(chosen), done / total


def _rows_per_batch(metadata: pq.FileMetaData, chosen: list[str], batch_rows: int) -> int:
    """Rows per batch of about BATCH_BYTES.

    Computed from the row group whose rows are the largest on average.
    """
    widest = 1.0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        wanted = (one for one in columns if one.path_in_schema.partition(".")[0] in chosen)
        size = sum(column.total_uncompressed_size for column in wanted)
        widest = max(widest, size / max(1, group.num_rows))
    return int(max(1, min(batch_rows, BATCH_BYTES // widest)))


def read_arrow_file(path: Path, name: str, selection: Selection) -> BatchesWithShare:
    """Batches of a memory-mapped Arrow IPC file, with the share read so far, 0 to 1."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
        chosen = selection.pick_names(file.schema.names, name)
        for index in range(file.num_record_batches):
            batch = file.get_batch(index).select(chosen)
            for part in _slices(batch, selection.batch_rows):
                yield part, (index + 1) / file.num_record_batches


def read_arrow_stream(stream: io.BufferedReader, name: str, selection: Selection) -> Batches:
    """Batches of an Arrow IPC stream."""
    with pa.ipc.open_stream(stream) as reader:
        chosen = selection.pick_names(reader.schema.names, name)
        for batch in reader:
            yield from _slices(batch.select(chosen), selection.batch_rows)


def read_csv(stream: io.BufferedReader, name: str, selection: Selection, delimiter: str) -> Batches:
    """Batches of a CSV file with a header.

    Text and id are always read as strings, so that an id `007` keeps its zeros. The first block
    decides the types of carried columns. Quoted values may contain line ends.

    Raises:
        InvalidCommandError: A quote is never closed, so that the rest of the file would be one
            value.
        InvalidUtf8Error: A value or the header is not UTF-8.
    """
    header = _header(stream, name, delimiter)
    if not header:
        return
    chosen = selection.pick_names(header, name)
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
            yield from _without_last_row(reader, name, selection)
    except pa.ArrowInvalid as error:
        if "invalid UTF8" not in str(error):
            raise
        raise InvalidUtf8Error(
            f"{name}: a value is not UTF-8; convert the file, such as with `iconv -t UTF-8`"
        ) from None


class _WithLastRow:
    """A stream with one row appended, to find out whether the last quote was closed.

    pyarrow accepts the end of a file in place of a closing quote. If a quote is open, the appended
    row becomes part of the quoted value and does not appear as a row.
    """

    closed = False

    def __init__(self, stream: io.BufferedReader, row: bytes) -> None:
        self._stream = stream
        self._row = row

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not data:
            data, self._row = self._row[:size], self._row[size:]
        return data


def _without_last_row(
    batches: Iterable[pa.RecordBatch], name: str, selection: Selection
) -> Batches:
    held: pa.RecordBatch | None = None
    rows = 0
    for batch in batches:
        if held is not None:
            yield from _slices(held, selection.batch_rows)
        if batch.num_rows:
            held = batch
            rows += batch.num_rows
    if held is None or held.column(selection.text)[-1].as_py() != _END:
        raise InvalidCommandError(f"{name}: row {rows} opens a quote that is never closed")
    yield from _slices(held.slice(0, held.num_rows - 1), selection.batch_rows)


def _header(stream: io.BufferedReader, name: str, delimiter: str) -> list[str]:
    """Read the header from the stream: the column names; empty for an empty file."""
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


def _slices(batch: pa.RecordBatch, batch_rows: int) -> Batches:
    for start in range(0, batch.num_rows, batch_rows):
        yield batch.slice(start, batch_rows)
