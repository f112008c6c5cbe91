"""Readers of Parquet and Arrow files that return one batch at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from fletcher.core.encodings import is_text
from fletcher.errors import ColumnTypeError, InvalidCommandError
from fletcher.readers.arrays import BATCH_BYTES, Batches, check_arrays, cut
from fletcher.readers.columns import Selection, arrow_paths, take_paths
from fletcher.readers.ipc_sizes import CheckedStream, check_file
from fletcher.readers.source_files import SourceFile

# A row group's encoded columns may stand for far more bytes. A batch of nested columns is made so
# small that its rows could each hold the largest value of the group.
_MAX_NESTED_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
BatchesWithShare = Iterator[tuple[pa.RecordBatch, float]]


def parquet_schema(table: SourceFile, name: str, selection: Selection) -> pa.Schema:
    """Types of the selected columns of a Parquet file; empty without rows."""
    with pq.ParquetFile(table.open_table()) as file:
        return selected_schema(file.schema_arrow, name, selection)


def arrow_schema(table: SourceFile, name: str, selection: Selection) -> pa.Schema:
    """Types of the selected columns of an Arrow IPC file."""
    with _open_native(table) as opened, pa.ipc.open_file(opened) as file:
        return selected_schema(file.schema, name, selection)


def _open_native(table: SourceFile) -> pa.NativeFile:
    """A file that Arrow can read any part of."""
    opened = table.open_table()
    return pa.OSFile(str(opened)) if isinstance(opened, Path) else opened


def stream_schema(stream: io.BufferedReader, name: str, selection: Selection) -> pa.Schema:
    """Types of the selected columns of an Arrow IPC stream."""
    with pa.ipc.open_stream(stream) as reader:
        return selected_schema(reader.schema, name, selection)


def selected_schema(schema: pa.Schema, name: str, selection: Selection) -> pa.Schema:
    """The types of the selected columns, by their names in the selection."""
    kinds = {}
    for wanted, (top, *fields) in arrow_paths(selection, schema, name).items():
        kind = schema.field(top).type
        for field in fields:
            kind = kind.field(field).type
        kinds[wanted] = kind
    return pa.schema(kinds)


def read_parquet(table: SourceFile, name: str, selection: Selection) -> BatchesWithShare:
    """Batches of a Parquet file, each with the share of the rows read so far, 0 to 1.

    Raises:
        InvalidCommandError: A column is encrypted.
        ColumnTypeError: A time of the type INT96 is beyond timestamp[ns].
    """
    with pq.ParquetFile(table.open_table()) as file:
        paths = arrow_paths(selection, file.schema_arrow, name)
        tops = list(dict.fromkeys(path[0] for path in paths.values()))
        _check_keys(file, name, tops)
        chunks = _chunks(file, tops)
        texts = _dictionary_columns(file.schema_arrow, chunks)
        rows = _rows_per_batch(file, chunks, texts, selection.batch_rows)
        total, done = max(1, file.metadata.num_rows), 0
    int96 = [top for top, ones in chunks.items() if any(c.physical_type == "INT96" for c in ones)]
    # Reads are buffered because pyarrow would otherwise load each column chunk completely.
    options = {"buffer_size": 1 << 20, "pre_buffer": False, "page_checksum_verification": True}
    with (
        pq.ParquetFile(table.open_table(), read_dictionary=texts, **options) as file,
        pq.ParquetFile(
            table.open_table(), coerce_int96_timestamp_unit="ms", **options
        ) as wide_file,
    ):
        batches = _batches(file, rows, tops)
        wide = _batches(wide_file, rows, int96, like=tops)
        for batch in batches:
            first, done = done, done + batch.num_rows
            if int96:
                _check_int96(batch, next(wide), name, first)
            part = take_paths(batch, paths)
            check_arrays(part, name, first)
            for one in cut(part, selection.batch_rows):
                yield one, done / total


def _batches(
    file: pq.ParquetFile, rows: int, columns: list[str], like: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches of some columns, cut at the same rows as batches of the columns `like`.

    Each row group has its own dictionaries. If a nested type has a dictionary inside, Arrow cannot
    read a batch from two row groups.
    """
    kinds = [file.schema_arrow.field(one).type for one in like or columns]
    numbers: list[list[int] | None] = [None]  # all at once
    if any(map(_holds_dictionary, kinds)):
        numbers = [[number] for number in range(file.metadata.num_row_groups)]
    for groups in numbers:
        yield from file.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False)


def _holds_dictionary(kind: pa.DataType) -> bool:
    """Whether a nested type has a dictionary inside."""
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    return any(types.is_dictionary(one) or _holds_dictionary(one) for one in inner)


def _check_keys(file: pq.ParquetFile, name: str, tops: list[str]) -> None:
    """Refuse encrypted columns.

    pyarrow ends the process when it is asked for their metadata.
    """
    if file.metadata.num_row_groups == 0:
        return
    rows = file.iter_batches(batch_size=1, row_groups=[0], columns=tops, use_threads=False)
    try:
        next(rows, None)
    except OSError as error:
        if "decrypt" not in str(error).lower():
            raise
        raise InvalidCommandError(
            f"{name}: one of the columns {', '.join(f'`{top}`' for top in tops)} is encrypted; "
            "write the file without encryption"
        ) from None


def _chunks(file: pq.ParquetFile, tops: list[str]) -> dict[str, list[pq.ColumnChunkMetaData]]:
    """Column chunks in all row groups, by the name of the top-level column."""
    leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    return {
        top: [
            group.column(number)
            for group in groups
            for number, leaf in enumerate(leaves)
            if leaf == top or leaf.startswith(f"{top}.")
        ]
        for top in tops
    }


def _dictionary_columns(
    schema: pa.Schema, chunks: dict[str, list[pq.ColumnChunkMetaData]]
) -> list[str]:
    """The columns to read as dictionaries.

    One long text in a dictionary may be the value of millions of rows, so the size of the rows is
    checked before the dictionary is decoded. pyarrow cannot read delta encodings as dictionaries.
    """
    return [
        top
        for top, ones in chunks.items()
        if (is_text(schema.field(top).type) or types.is_binary(schema.field(top).type))
        and not any("DELTA" in encoding for one in ones for encoding in one.encodings)
    ]


def _rows_per_batch(
    file: pq.ParquetFile,
    chunks: dict[str, list[pq.ColumnChunkMetaData]],
    texts: list[str],
    batch_rows: int,
) -> int:
    """Rows per batch of about BATCH_BYTES, by the row group with the largest rows."""
    rows = float(batch_rows)
    num_groups = file.metadata.num_row_groups
    for index in range(num_groups):
        size = nested = 0
        for top, ones in chunks.items():
            leaves = len(ones) // num_groups
            for chunk in ones[index * leaves : (index + 1) * leaves]:
                size += chunk.total_uncompressed_size
                if top not in texts and chunk.physical_type.endswith("BYTE_ARRAY"):
                    nested += chunk.total_uncompressed_size
        num_rows = file.metadata.row_group(index).num_rows
        rows = min(rows, BATCH_BYTES / max(1.0, size / max(1, num_rows)))
        rows = min(rows, _MAX_NESTED_BYTES / max(1, nested))
    return int(max(1, rows))


def _check_int96(batch: pa.RecordBatch, wide: pa.RecordBatch, name: str, row_first: int) -> None:
    """Refuse times that do not fit into timestamp[ns].

    pyarrow turns them into wrong times. `wide` has the same rows with the times in milliseconds.
    """
    for top in wide.schema.names:
        column, kind = wide.column(top), batch.schema.field(top).type
        if _is_castable(column, kind):
            continue
        row = next(n for n in range(len(column)) if not _is_castable(column.take([n]), kind))
        raise ColumnTypeError(
            f"{name}: row {row_first + row + 1}: `{top}` is an INT96 time before 1677 or after "
            "2262, which timestamp[ns] cannot hold; write such times as timestamps in microseconds",
            field=top,
        )


def _is_castable(column: pa.Array, kind: pa.DataType) -> bool:
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def read_arrow_file(table: SourceFile, name: str, selection: Selection) -> BatchesWithShare:
    """Batches of an Arrow IPC file, with the share read so far, 0 to 1.

    The file is not memory-mapped: if somebody cuts it meanwhile, a signal would end the process.
    Only the selected columns are read.
    """
    check_file(table, name)
    with _open_native(table) as opened:
        schema = pa.ipc.open_file(opened).schema
        paths = arrow_paths(selection, schema, name)
        tops = sorted({schema.get_field_index(top) for top, *_ in paths.values()})
        file = pa.ipc.open_file(opened, options=pa.ipc.IpcReadOptions(included_fields=tops))
        done = 0
        for index in range(file.num_record_batches):
            batch = take_paths(file.get_batch(index), paths)
            check_arrays(batch, name, done)
            done += batch.num_rows
            for part in cut(batch, selection.batch_rows):
                yield part, (index + 1) / file.num_record_batches


def read_arrow_stream(stream: io.BufferedReader, name: str, selection: Selection) -> Batches:
    """Batches of an Arrow IPC stream."""
    done = 0
    checked = io.BufferedReader(CheckedStream(stream, name), _BUFFER_BYTES)
    with pa.ipc.open_stream(checked) as reader:
        paths = arrow_paths(selection, reader.schema, name)
        for whole in reader:
            batch = take_paths(whole, paths)
            check_arrays(batch, name, done)
            done += batch.num_rows
            yield from cut(batch, selection.batch_rows)
