"""Readers of Parquet and Arrow files that return one batch at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from fletcher.core.encodings import is_text
from fletcher.readers.arrays import BATCH_BYTES, Batches, check_arrays, cut
from fletcher.readers.columns import Selection, arrow_paths, take_paths
from fletcher.readers.ipc_sizes import CheckedStream, check_file

# A row group's encoded columns may stand for far more bytes. A batch of nested columns is made so
# small that its rows could each hold the largest value of the group.
_MAX_NESTED_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
BatchesWithShare = Iterator[tuple[pa.RecordBatch, float]]


def parquet_schema(path: Path, name: str, selection: Selection) -> pa.Schema:
    """Types of the selected columns of a Parquet file; empty without rows."""
    with pq.ParquetFile(path) as file:
        return _selected(file.schema_arrow, name, selection)


def arrow_schema(path: Path, name: str, selection: Selection) -> pa.Schema:
    """Types of the selected columns of an Arrow IPC file."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
        return _selected(file.schema, name, selection)


def stream_schema(stream: io.BufferedReader, name: str, selection: Selection) -> pa.Schema:
    """Types of the selected columns of an Arrow IPC stream."""
    with pa.ipc.open_stream(stream) as reader:
        return _selected(reader.schema, name, selection)


def _selected(schema: pa.Schema, name: str, selection: Selection) -> pa.Schema:
    kinds = {}
    for wanted, (top, *fields) in arrow_paths(selection, schema, name).items():
        kind = schema.field(top).type
        for field in fields:
            kind = kind.field(field).type
        kinds[wanted] = kind
    return pa.schema(kinds)


def read_parquet(path: Path, name: str, selection: Selection) -> BatchesWithShare:
    """Batches of a Parquet file, each with the share of the rows read so far, 0 to 1."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        paths = arrow_paths(selection, schema, name)
    tops = list(dict.fromkeys(path[0] for path in paths.values()))
    # One long text may stand in a dictionary for millions of rows, so the size of the rows is
    # looked at before the dictionary is decoded.
    texts = [one for one in tops if is_text(schema.field(one).type)]
    texts += [one for one in tops if types.is_binary(schema.field(one).type)]
    # Reads are buffered because pyarrow would otherwise load each column chunk completely.
    options = {"buffer_size": 1 << 20, "pre_buffer": False, "read_dictionary": texts}
    with pq.ParquetFile(path, **options) as file:
        rows = _rows_per_batch(file, tops, texts, selection.batch_rows)
        total, done = max(1, file.metadata.num_rows), 0
        groups = [list(range(file.metadata.num_row_groups))]
        if any(_holds_dictionary(schema.field(one).type) for one in tops):
            groups = [[one] for one in groups[0]]
        reads = (
            file.iter_batches(rows, row_groups=group, columns=tops, use_threads=False)
            for group in groups
        )
        for batch in chain.from_iterable(reads):
            first, done = done, done + batch.num_rows
            part = take_paths(batch, paths)
            check_arrays(part, name, first)
            for one in cut(part, selection.batch_rows):
                yield one, done / total


def _holds_dictionary(kind: pa.DataType) -> bool:
    """Whether a nested type has a dictionary inside.

    Each row group has a dictionary, and Arrow reads no batch of such values from two row groups.
    """
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    return any(types.is_dictionary(one) or _holds_dictionary(one) for one in inner)


def _rows_per_batch(
    file: pq.ParquetFile, tops: list[str], texts: list[str], batch_rows: int
) -> int:
    """Rows per batch of about BATCH_BYTES, by the row group with the largest rows."""
    rows = float(batch_rows)
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        columns = [group.column(number) for number in range(group.num_columns)]
        names = [column.path_in_schema.partition(".")[0] for column in columns]
        size = sum(
            column.total_uncompressed_size
            for column, name in zip(columns, names, strict=True)
            if name in tops
        )
        rows = min(rows, BATCH_BYTES / max(1.0, size / max(1, group.num_rows)))
        nested = [
            column.total_uncompressed_size
            for column, name in zip(columns, names, strict=True)
            if name in tops and name not in texts and column.physical_type.endswith("BYTE_ARRAY")
        ]
        rows = min(rows, _MAX_NESTED_BYTES / max(1, sum(nested)))
    return int(max(1, rows))


def read_arrow_file(path: Path, name: str, selection: Selection) -> BatchesWithShare:
    """Batches of a memory-mapped Arrow IPC file, with the share read so far, 0 to 1."""
    done = 0
    with pa.memory_map(str(path)) as mapped:
        check_file(mapped, name)
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
        paths = arrow_paths(selection, file.schema, name)
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
