"""Columns of received rows in the types that a dataset stores.

The same texts have several types in Arrow. pandas 3 sends large_utf8, older versions send utf8,
Polars may send utf8_view, and categories are dictionaries. Longbow's client ignores refusals, so
none of these types may be refused.
"""

from __future__ import annotations

import pyarrow as pa
from pyarrow import types

from fletcher.core.encodings import (
    decoded_bytes,
    is_text,
    runs_as_dictionary,
    value_type,
    viewed_bytes,
    without_views,
)
from fletcher.errors import BatchTooLargeError, ColumnTypeError

_UNVIEWED = {pa.string_view(): pa.utf8(), pa.binary_view(): pa.binary()}


def decode_columns(batch: pa.RecordBatch, max_bytes: int) -> pa.RecordBatch:
    """The batch with texts and bytes in place of views, dictionaries and runs.

    `batch_key` becomes utf8, as Fletcher's stores have it.

    Raises:
        BatchTooLargeError: A decoded column would be larger than `max_bytes`.
        ColumnTypeError: `batch_key` holds no texts.
    """
    kinds = [_decoded_type(field) for field in batch.schema]
    if kinds == batch.schema.types:
        return batch
    columns = [
        _decoded(column, field.name, kind, max_bytes)
        for column, field, kind in zip(batch.columns, batch.schema, kinds, strict=True)
    ]
    return _with_types(batch, columns, kinds)


def as_stored(batch: pa.RecordBatch, stored: pa.Schema) -> pa.RecordBatch:
    """The batch with texts and bytes in the types of the dataset's columns."""
    kinds = [
        stored.field(field.name).type
        if field.name in stored.names and _same_values(field.type, stored.field(field.name).type)
        else field.type
        for field in batch.schema
    ]
    if kinds == batch.schema.types:
        return batch
    columns = [column.cast(kind) for column, kind in zip(batch.columns, kinds, strict=True)]
    return _with_types(batch, columns, kinds)


def _decoded_type(field: pa.Field) -> pa.DataType:
    kind = value_type(field.type)
    kind = _UNVIEWED.get(kind, kind)
    if field.name != "batch_key":
        return kind
    if not is_text(kind):
        raise ColumnTypeError(
            f"`batch_key` is {field.type}, expected utf8", field="batch_key", allowed=["utf8"]
        )
    return pa.utf8()


def _decoded(column: pa.Array, name: str, kind: pa.DataType, max_bytes: int) -> pa.Array:
    if column.type == kind:
        return column
    if types.is_run_end_encoded(column.type):
        column = runs_as_dictionary(column)
    # A few bytes of views, or codes of a dictionary, may stand for many bytes.
    _check_size(name, viewed_bytes(column), max_bytes)
    column = without_views(column)
    if types.is_dictionary(column.type):
        _check_size(name, decoded_bytes(column), max_bytes)
        column = column.dictionary_decode()
    return column.cast(kind)


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BatchTooLargeError(
            f"`{name[:200]}` stands for {size >> 20} MiB of values in one message, more than "
            f"{max_bytes >> 20} MiB; send smaller messages",
            field=name[:200],
        )


def _same_values(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether two types differ only in the size of their offsets."""
    is_bytes = (types.is_binary, types.is_large_binary)
    return (is_text(one) and is_text(other)) or all(
        any(is_one(kind) for is_one in is_bytes) for kind in (one, other)
    )


def _with_types(
    batch: pa.RecordBatch, columns: list[pa.Array], kinds: list[pa.DataType]
) -> pa.RecordBatch:
    fields = [field.with_type(kind) for field, kind in zip(batch.schema, kinds, strict=True)]
    schema = pa.schema(fields, metadata=batch.schema.metadata)
    return pa.RecordBatch.from_arrays(columns, schema=schema)
