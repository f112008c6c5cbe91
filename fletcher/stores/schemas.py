"""Checks of rows against a dataset's schema, and batches converted to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from fletcher.core.quantization import QUANTIZATION
from fletcher.core.schema import CHUNK_FIELDS
from fletcher.errors import (
    ColumnTypeError,
    DimensionMismatchError,
    InvalidCommandError,
    ModelMismatchError,
    UnknownColumnError,
)

# Schema metadata that must be equal for two vectors to be comparable.
_MODEL_KEYS = (
    "fletcher.model",
    "fletcher.layers",
    "fletcher.pooling",
    "fletcher.normalized",
    QUANTIZATION,
)

# Types that stores accept whatever their parameters.
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_temporal)
_OTHERS = (
    pa.types.is_null,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_decimal128,
    pa.types.is_decimal256,
)


def check_compatible(dataset: str, stored: pa.Schema, offered: pa.Schema) -> None:
    """Refuse rows that do not fit a dataset. Columns may be added or left out.

    Args:
        dataset: Its name, for the message.
        stored: Schema of the dataset.
        offered: Schema of the rows to add.

    Raises:
        DimensionMismatchError: `vector` has another width.
        ModelMismatchError: Another model, exit layer, pooling or normalisation.
        ColumnTypeError: A column has another type.
    """
    _check_width(dataset, stored, offered)
    _check_model(dataset, stored, offered)
    for field in offered:
        if field.name not in stored.names:
            continue
        have = stored.field(field.name).type
        if not _same_type(have, field.type):
            raise ColumnTypeError(
                f"schema mismatch: `{field.name}` is {field.type}, dataset `{dataset}` has {have}; "
                "send that type or write to another dataset",
                field=field.name,
                allowed=[str(have)],
            )


def check_storable(schema: pa.Schema) -> None:
    """Refuse columns of types that a store cannot write.

    A store fails on them only when rows arrive, and then retries would delay all its datasets. All
    accepted types were written, replaced and read with LanceDB 0.40.

    Raises:
        ColumnTypeError: A column does not hold numbers, texts, bytes, times, or lists, structs and
            maps of these.
    """
    for field in schema:
        if not _is_storable(field.type):
            raise ColumnTypeError(
                f"`{field.name}` is {str(field.type)[:200]}, which stores do not take; send "
                "numbers, texts, bytes, times, or lists, structs and maps of these, with nothing "
                "dictionary-encoded inside",
                field=field.name,
            )


def check_one_row_each(dataset: str, stored: pa.Schema) -> None:
    """Refuse to replace rows by id in a dataset of chunks.

    Args:
        dataset: Its name, for the message.
        stored: Schema of the dataset.

    Raises:
        InvalidCommandError: The rows of the dataset are chunks.
    """
    if {field.name for field in CHUNK_FIELDS} <= set(stored.names):
        raise InvalidCommandError(
            f"`mode` replaces rows by id, and dataset `{dataset}` has several rows per id, one per "
            "chunk; append to it, overwrite it, or write to another dataset",
            field="mode",
            allowed=["append", "overwrite"],
        )


def _check_width(dataset: str, stored: pa.Schema, offered: pa.Schema) -> None:
    if "vector" not in stored.names or "vector" not in offered.names:
        return
    have, new = stored.field("vector").type, offered.field("vector").type
    if not (pa.types.is_fixed_size_list(have) and pa.types.is_fixed_size_list(new)):
        return
    if have.value_type != new.value_type:
        return  # reported as another type: the width of packed bits is no number of dimensions
    if have.list_size != new.list_size:
        raise DimensionMismatchError(
            f"schema mismatch: `vector` has {new.list_size} dimensions, dataset `{dataset}` has "
            f"{have.list_size}; use the model that wrote it or write to another dataset",
            field="vector",
            allowed=[str(have.list_size)],
        )


def _check_model(dataset: str, stored: pa.Schema, offered: pa.Schema) -> None:
    for key in _MODEL_KEYS:
        have = (stored.metadata or {}).get(key.encode())
        new = (offered.metadata or {}).get(key.encode())
        # A plain client names no model: only the width and type of its rows are checked.
        if have is not None and new is not None and have != new:
            raise ModelMismatchError(
                f"`{key}` is {new.decode(errors='replace')}, dataset `{dataset}` was written with "
                f"{have.decode(errors='replace')}; use that or write to another dataset",
                field=key.removeprefix("fletcher."),
                allowed=[have.decode(errors="replace")],
            )


def _same_type(one: pa.DataType, other: pa.DataType) -> bool:
    # The name and nullability of the items' field differ by writer.
    if pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other):
        return one.list_size == other.list_size and _same_type(one.value_type, other.value_type)
    if pa.types.is_list(one) and pa.types.is_list(other):
        return _same_type(one.value_type, other.value_type)
    return bool(one == other)


def _is_storable(kind: pa.DataType) -> bool:
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        # Lance returns JSON in a binary encoding.
        return kind.extension_name != "arrow.json" and _is_storable(kind.storage_type)
    if types.is_fixed_size_list(kind):
        inner = kind.value_type
        nested = types.is_fixed_size_list(inner) and _is_storable(inner)
        return kind.list_size > 0 and (nested or _is_number(inner))
    if types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        names = {one.name for one in fields}
        plain = len(names) == len(fields) > 0 and not any("\0" in name for name in names)
        return plain and all(
            _is_storable(one.type) and not types.is_null(one.type) for one in fields
        )
    if types.is_map(kind):
        return not kind.keys_sorted and _is_storable(kind.key_type) and _is_storable(kind.item_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_storable(kind.value_type)
    return _is_number(kind) or any(is_one(kind) for is_one in _OTHERS)


def _is_number(kind: pa.DataType) -> bool:
    """Whether the type is a number, a boolean or a time other than an interval."""
    return not pa.types.is_interval(kind) and any(is_one(kind) for is_one in _NUMBERS)


def new_fields(stored: pa.Schema, offered: pa.Schema) -> list[pa.Field]:
    """The fields of `offered` that `stored` lacks, nullable."""
    return [field.with_nullable(True) for field in offered if field.name not in stored.names]


def conform_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns of `schema`, in its order; missing ones are null."""
    if batch.schema.equals(schema):
        return batch
    columns = []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = batch.column(index)
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def align_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, copied if a buffer is misaligned or a struct column is a slice.

    Buffers received by Flight point into a gRPC message. Lance (Rust) panics on misaligned buffers,
    and on slices of structs within structs.
    """
    odd = any(
        buffer is not None and buffer.address % 16
        for column in batch.columns
        for buffer in column.buffers()
    )
    kinds = [getattr(one.type, "storage_type", one.type) for one in batch.columns]
    sliced = any(
        pa.types.is_struct(kind) and one.offset
        for kind, one in zip(kinds, batch.columns, strict=True)
    )
    if not (odd or sliced):
        return batch
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    options = pa.ipc.IpcReadOptions(ensure_alignment=pa.ipc.Alignment.At64Byte)
    with pa.ipc.open_stream(sink.getvalue(), options=options) as reader:
        return reader.read_next_batch()


def check_columns(dataset: str, schema: pa.Schema, columns: list[str]) -> None:
    """Refuse names that are not columns of the dataset.

    Raises:
        UnknownColumnError: One of `columns` is not in `schema`.
    """
    for name in columns:
        if name not in schema.names:
            raise UnknownColumnError(
                f"dataset `{dataset}` has no column `{name[:200]}`; it has "
                f"{', '.join(schema.names)}",
                field=name[:200],
                allowed=schema.names,
            )


def last_of_each_id(table: pa.Table) -> pa.Table:
    """The table with only the last row of each `id`; order is kept."""
    numbered = pa.table({"id": table.column("id"), "row": np.arange(table.num_rows)})
    last = numbered.group_by("id").aggregate([("row", "max")]).column("row_max")
    if len(last) == table.num_rows:
        return table
    return table.take(np.sort(last.to_numpy()))


def limit_rows(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, limit: int | None
) -> Iterator[pa.RecordBatch]:
    """The first `limit` rows (None: all) with the columns of `schema`."""
    if limit == 0:
        return
    for batch in batches:
        part = batch if limit is None else batch.slice(0, limit)
        yield pa.RecordBatch.from_arrays(
            [part.column(name) for name in schema.names], schema=schema
        )
        if limit is not None:
            limit -= part.num_rows
            if limit == 0:
                return


def count_batch_keys(batch: pa.RecordBatch) -> dict[str, int]:
    """Number of rows by `batch_key`; empty for a batch without that column."""
    if "batch_key" not in batch.schema.names:
        return {}
    counts = batch.column("batch_key").drop_null().value_counts()
    keys, numbers = counts.field("values"), counts.field("counts")
    return dict(zip(keys.to_pylist(), numbers.to_pylist(), strict=True))
