"""Arrow arrays of input files: validated, cut by decoded size, and decoded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fletcher.core.encodings import (
    extension_texts,
    is_extension,
    is_text,
    is_text_extension,
    runs_as_dictionary,
)
from fletcher.core.time_zones import check_zones
from fletcher.errors import ColumnTypeError, InvalidUtf8Error

BATCH_BYTES = 4 << 20  # approximate maximum size of a batch
Batches = Iterator[pa.RecordBatch]
_OFFSETS = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
_VIEWS = (types.is_string_view, types.is_binary_view)


def plain_type(kind: pa.DataType, name: str, where: str) -> pa.DataType:
    """The type with which a column is sent.

    It has no dictionaries, runs, views and extensions.

    docs/python.md lists the stand-ins.

    Raises:
        ColumnTypeError: The type is an extension without a stand-in, or has an unknown time zone.
    """
    check_zones(kind, f"{where}: column `{name}`", name)
    if is_extension(kind):
        if is_text_extension(kind):
            return pa.utf8()
        raise ColumnTypeError(
            f"{where}: column `{name}` is {kind}, an extension type; cast it to "
            f"{kind.storage_type}",
            field=name,
        )
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_type(kind.value_type, name, where)
    if types.is_null(kind) or is_text(kind):
        return pa.utf8()
    if types.is_binary_view(kind):
        return pa.binary()
    return _plain_nested(kind, name, where)


def _plain_nested(kind: pa.DataType, name: str, where: str) -> pa.DataType:
    def plain(field: pa.Field) -> pa.Field:
        if types.is_null(field.type):
            return field
        return field.with_type(plain_type(field.type, name, where))

    if types.is_struct(kind):
        return pa.struct([plain(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(plain(kind.key_field), plain(kind.item_field), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_field), kind.list_size)
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(plain(kind.value_field))
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(plain(kind.value_field))
    return kind


def decode(array: pa.Array, target: pa.DataType) -> pa.Array:
    """The array as its plain type `target`, with the same values.

    Raises:
        pa.ArrowException: Arrow cannot convert the values without loss.
    """
    if is_text_extension(array.type):
        array = extension_texts(array)
    if types.is_run_end_encoded(array.type):
        array = runs_as_dictionary(array)
    if types.is_dictionary(array.type):
        values = decode(array.dictionary, target)
        return values.take(array.indices)
    if array.type == target:
        return array
    if types.is_null(array.type):
        return pa.nulls(len(array), target)
    if types.is_nested(target):
        return _decode_nested(array, target)
    return pc.cast(array, target)


def _decode_nested(array: pa.Array, target: pa.DataType) -> pa.Array:
    """The array as a nested type. The casts of pyarrow 26 make invalid list views."""
    nulls = array.is_null()
    if types.is_struct(target) and types.is_struct(array.type):
        fields = [array.field(number) for number in range(target.num_fields)]
        values = [decode(one, field.type) for one, field in zip(fields, target, strict=True)]
        return pa.StructArray.from_arrays(values, fields=list(target), mask=nulls)
    if types.is_map(target) and types.is_map(array.type):
        offsets = pa.array(array.offsets.to_numpy().copy())
        keys, items = decode(array.keys, target.key_type), decode(array.items, target.item_type)
        return pa.MapArray.from_arrays(offsets, keys, items, type=target, mask=nulls)
    if types.is_fixed_size_list(target) and types.is_fixed_size_list(array.type):
        size = target.list_size
        values = array.values.slice(array.offset * size, len(array) * size)
        return pa.FixedSizeListArray.from_arrays(
            decode(values, target.value_type), type=target, mask=nulls
        )
    if types.is_list(target) or types.is_large_list(target):
        lengths = pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)
        ends = pa.array(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
        is_small = types.is_list(target)
        make, kind = (pa.ListArray, pa.int32()) if is_small else (pa.LargeListArray, pa.int64())
        values = decode(array.flatten(), target.value_type)
        return make.from_arrays(ends.cast(kind), values, type=target, mask=nulls)
    return pc.cast(array, target)


def check_arrays(batch: pa.RecordBatch, where: str, row_first: int) -> None:
    """Validate a batch in full; an invalid array may crash the process that reads it.

    Raises:
        InvalidUtf8Error: A text is not UTF-8; the message names the row, counted from 1.
        ColumnTypeError: Another array is invalid.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
            if types.is_dictionary(column.type):
                column.dictionary.validate(full=True)
        except pa.ArrowException as error:
            text = str(error)
            if "UTF8" not in text and "UTF-8" not in text:
                raise ColumnTypeError(
                    f"{where}: column `{name}` is not a valid Arrow array: {text[:300]}",
                    field=name,
                ) from None
            row = _first_bad_row(column)
            place = "" if row is None else f" in row {row_first + row + 1}"
            raise InvalidUtf8Error(
                f"{where}: column `{name}` is not UTF-8{place}", field=name
            ) from None


def _first_bad_row(column: pa.Array) -> int | None:
    if types.is_dictionary(column.type):
        value = _first_bad_row(column.dictionary)
        rows = [] if value is None else pc.equal(column.indices, value).to_pylist()
        return rows.index(True) if True in rows else None
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        return None
    raw = column.view(pa.binary() if types.is_string(column.type) else pa.large_binary())
    for row, value in enumerate(raw.to_pylist()):
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return row
    return None


def cut(batch: pa.RecordBatch, batch_rows: int) -> Batches:
    """Cut a batch into slices of at most `batch_rows` rows and about BATCH_BYTES.

    The size is that of the decoded values. A larger row becomes one slice.
    """
    for start in range(0, batch.num_rows, batch_rows):
        part = batch.slice(start, batch_rows)
        sizes = sum(_row_sizes(column) for column in part.columns)
        ends = np.cumsum(sizes) if part.num_columns else np.zeros(part.num_rows, np.int64)
        first = before = 0
        while first < part.num_rows:
            last = int(np.searchsorted(ends, before + BATCH_BYTES, side="right"))
            last = min(max(last, first + 1), part.num_rows)
            yield part.slice(first, last - first)
            first, before = last, int(ends[last - 1])


def _row_sizes(column: pa.Array) -> npt.NDArray[np.int64]:
    """int64 [num_rows], the decoded size of each row; an average for nested values."""
    if is_extension(column.type):
        column = column.storage
    if types.is_run_end_encoded(column.type):
        column = runs_as_dictionary(column)
    if types.is_dictionary(column.type):
        values = _row_sizes(column.dictionary)
        if len(values) == 0:
            return np.zeros(len(column), np.int64)
        codes: npt.NDArray[np.int64] = column.indices.fill_null(0).to_numpy().astype(np.int64)
        return values[codes]
    kind = column.type
    if any(one(kind) for one in _VIEWS):
        buffer = column.buffers()[1]
        if buffer is None:
            return np.zeros(len(column), np.int64)
        # A view is 16 bytes, of which the first 4 are the length.
        lengths = np.frombuffer(buffer, np.int32)[::4]
        return lengths[column.offset : column.offset + len(column)].astype(np.int64) + 16
    if any(one(kind) for one in _OFFSETS):
        lengths = pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        sizes: npt.NDArray[np.int64] = lengths.astype(np.int64) + 8
        return sizes
    return np.full(len(column), column.nbytes // max(1, len(column)) + 1, np.int64)
