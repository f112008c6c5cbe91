"""Checks of rows against a dataset's schema, and conversion of batches to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.quantization import QUANTIZATION
from fletcher.core.ranges import RangeSet
from fletcher.core.schema import CHUNK_FIELDS, TIMESTAMP, parse_batch_key
from fletcher.core.similarity import SIMILARITY
from fletcher.core.time_zones import check_zones
from fletcher.errors import (
    ColumnTypeError,
    DimensionMismatchError,
    InvalidCommandError,
    ModelMismatchError,
    UnknownColumnError,
)
from fletcher.stores.base import Names

# Schema metadata that must be equal for two vectors to be comparable.
_MODEL_KEYS = (
    "fletcher.model",
    "fletcher.layers",
    "fletcher.pooling",
    "fletcher.normalized",
    "fletcher.prompt",
    "fletcher.chunking",
    SIMILARITY,
    QUANTIZATION,
)

# Types of Fletcher's own column `timestamp`; earlier releases wrote nanoseconds.
_RECEIPT_TIMES = (TIMESTAMP, pa.timestamp("ns", tz="UTC"))

_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_MAX_NANOSECONDS = 2**63 - 1

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
    """Refuse a schema that does not fit the schema of a dataset.

    Columns may be added or missing. `timestamp` may be in microseconds or, as in data of earlier
    releases, in nanoseconds; `conform_batch` converts it.

    Raises:
        DimensionMismatchError: `vector` has another width.
        ModelMismatchError: The vectors have another model, exit layer, pooling, normalisation,
            prompt, chunking, similarity or quantization.
        ColumnTypeError: A column has another type.
    """
    _check_width(dataset, stored, offered)
    _check_model(dataset, stored, offered)
    for field in offered:
        if field.name not in stored.names:
            continue
        have = stored.field(field.name).type
        if not (_same_type(have, field.type) or _are_receipt_times(field, have)):
            raise ColumnTypeError(
                f"schema mismatch: `{field.name}` is {field.type}, dataset `{dataset}` has {have}; "
                "send that type or write to another dataset",
                field=field.name,
                allowed=[str(have)],
            )


def check_storable(schema: pa.Schema) -> None:
    """Refuse columns of types that a store cannot write.

    A store would fail on such columns only when rows arrive, and its retries would delay all its
    datasets. All accepted types were written, replaced and read with LanceDB 0.40.

    Raises:
        ColumnTypeError: A column does not hold numbers, texts, bytes, times, or lists, structs and
            maps of these, or has an unknown time zone.
    """
    for field in schema:
        if not _is_storable(field.type):
            raise ColumnTypeError(
                f"`{field.name}` is {str(field.type)[:200]}, which stores do not take; send "
                "numbers, texts, bytes, times, or lists, structs and maps of these, with nothing "
                "dictionary-encoded inside",
                field=field.name,
            )
        check_zones(field.type, f"`{field.name}`", field.name)


def has_chunks(schema: pa.Schema) -> bool:
    """Whether the rows are chunks, several of which may have the same id."""
    return {field.name for field in CHUNK_FIELDS} <= set(schema.names)


def check_one_row_each(dataset: str, stored: pa.Schema, offered: pa.Schema) -> None:
    """Refuse to replace chunks by rows that are no chunks.

    Raises:
        InvalidCommandError: The rows of the dataset are chunks, and the offered ones are not.
    """
    if has_chunks(stored) and not has_chunks(offered):
        raise InvalidCommandError(
            f"`mode` replaces rows by id, and dataset `{dataset}` has several rows per id, one per "
            "chunk; send chunks, append to it, overwrite it, or write to another dataset",
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
        return  # reported as another type: packed bits have fewer bytes than dimensions
    if have.list_size != new.list_size:
        raise DimensionMismatchError(
            f"schema mismatch: `vector` has {new.list_size} dimensions, dataset `{dataset}` has "
            f"{have.list_size}; use the model that wrote it or write to another dataset",
            field="vector",
            allowed=[str(have.list_size)],
        )


def _check_model(dataset: str, stored: pa.Schema, offered: pa.Schema) -> None:
    # A plain client names no model: only the width and type of its rows are checked.
    old, new = stored.metadata or {}, offered.metadata or {}
    for key in _MODEL_KEYS:
        name = key.encode()
        if name in old and name in new and old[name] != new[name]:
            have = old[name].decode(errors="replace")
            raise ModelMismatchError(
                f"`{key}` is {new[name].decode(errors='replace') or 'empty'}, dataset `{dataset}` "
                f"was written with {have or 'an empty one'}; use that or write to another dataset",
                field=key.removeprefix("fletcher."),
                allowed=[have],
            )


def _same_type(one: pa.DataType, other: pa.DataType) -> bool:
    # The name and nullability of the items' field differ by writer.
    if pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other):
        return one.list_size == other.list_size and _same_type(one.value_type, other.value_type)
    if pa.types.is_list(one) and pa.types.is_list(other):
        return _same_type(one.value_type, other.value_type)
    return bool(one == other)


def _are_receipt_times(field: pa.Field, stored: pa.DataType) -> bool:
    return field.name == "timestamp" and {field.type, stored} <= set(_RECEIPT_TIMES)


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
        fields = list(kind)
        names = {one.name for one in fields}
        plain = len(names) == len(fields) > 0 and "\0" not in "".join(names)
        return plain and all(_is_storable(one.type) and one.type != pa.null() for one in fields)
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
    """The batch with the columns of `schema`, in that order; missing columns are null.

    Receipt times of earlier releases lose their nanoseconds if the dataset has microseconds. All
    other values are kept exactly.

    Raises:
        ColumnTypeError: A value does not fit the column's type.
    """
    if batch.schema.equals(schema):
        return batch

    def column(field: pa.Field) -> pa.Array:
        if field.name not in batch.schema.names:
            return pa.nulls(batch.num_rows, field.type)
        found = batch.column(field.name)
        return found if found.type == field.type else converted(found, field, batch.schema)

    return pa.RecordBatch.from_arrays([column(field) for field in schema], schema=schema)


def converted(values: pa.Array, field: pa.Field, offered: pa.Schema) -> pa.Array:
    """The values of a column of `offered` in the type of `field`; see `conform_batch`."""
    try:
        return values.cast(field.type)
    except pa.ArrowInvalid as error:
        by_fletcher = b"fletcher.model" in (offered.metadata or {})
        if field.type == TIMESTAMP and field.name == "timestamp" and by_fletcher:
            return values.cast(field.type, safe=False)
        raise ColumnTypeError(
            f"`{field.name[:200]}` is {values.type}, the dataset has {field.type}, and a value "
            f"does not fit: {str(error)[:200]}; send {field.type}",
            field=field.name[:200],
            allowed=[str(field.type)],
        ) from None


def check_nanoseconds(values: pa.Array, name: str, first: int) -> None:
    """Refuse times that nanoseconds cannot hold.

    `first` is the number of the first row.

    Raises:
        ColumnTypeError: A time is before 1677-09-21 or after 2262-04-11.
    """
    most = _MAX_NANOSECONDS // _NANOSECONDS[values.type.unit]
    numbers = pc.cast(values, pa.int64())
    outside = pc.or_(pc.less(numbers, -most), pc.greater(numbers, most)).fill_null(False)
    row = pc.index(outside, True).as_py()
    if row >= 0:
        raise ColumnTypeError(
            f"row {first + row}: `{name[:200]}` is {numbers[row]} {values.type.unit} since 1970, "
            "expected a time from 1677-09-22 to 2262-04-11: the store keeps times in nanoseconds; "
            "send the column as text, or leave it out",
            field=name[:200],
        )


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
    sliced = any(
        pa.types.is_struct(getattr(one.type, "storage_type", one.type)) and one.offset
        for one in batch.columns
    )
    if not (odd or sliced):
        return batch
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    options = pa.ipc.IpcReadOptions(ensure_alignment=pa.ipc.Alignment.At64Byte)
    with pa.ipc.open_stream(sink.getvalue(), options=options) as reader:
        return reader.read_next_batch()


def wanted_columns(dataset: str, schema: pa.Schema, columns: Names) -> list[str]:
    """The requested columns of a dataset; None requests all.

    Raises:
        UnknownColumnError: One of `columns` is not in `schema`.
    """
    for name in columns or ():
        if name not in schema.names:
            raise UnknownColumnError(
                f"dataset `{dataset}` has no column `{name[:200]}`; it has "
                f"{', '.join(schema.names)}",
                field=name[:200],
                allowed=schema.names,
            )
    return list(schema.names if columns is None else columns)


def last_of_each_id(table: pa.Table) -> pa.Table:
    """The table with only the last row of each `id`, in the same order of rows.

    If rows are chunks, all chunks of the last text of each id are kept. The chunks of a text are
    consecutive rows, and the first one has the index 0.
    """
    if not table.num_rows:
        return table
    text = np.arange(table.num_rows)
    if has_chunks(table.schema):
        index = table.column("chunk_index").to_numpy(zero_copy_only=False)
        text = np.cumsum(~(index > 0))  # a failed text has one row, without an index
    numbered = pa.table({"id": table.column("id"), "text": text})
    last = numbered.group_by("id").aggregate([("text", "max")]).column("text_max").to_numpy()
    if len(last) == text[-1] - text[0] + 1:
        return table
    return table.filter(pa.array(np.isin(text, last)))


def limit_rows(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, limit: int | None
) -> Iterator[pa.RecordBatch]:
    """The first `limit` rows (None: all) with the columns of `schema`."""
    if limit == 0:
        return
    for batch in batches:
        part = batch.slice(0, limit)
        yield pa.RecordBatch.from_arrays(part.select(schema.names).columns, schema=schema)
        if limit is not None:
            limit -= part.num_rows
            if limit == 0:
                return


def count_batch_keys(batch: pa.RecordBatch) -> dict[str, int]:
    """Number of rows per `batch_key`; empty for a batch without that column."""
    if "batch_key" not in batch.schema.names:
        return {}
    counts = batch.column("batch_key").drop_null().value_counts()
    keys, numbers = counts.field("values"), counts.field("counts")
    return dict(zip(keys.to_pylist(), numbers.to_pylist(), strict=True))


def num_group_rows(key: str) -> int:
    """Number of rows of the group that a batch key names; 0 for a key of another form."""
    parsed = parse_batch_key(key)
    return parsed[2] - parsed[1] + 1 if parsed else 0


def upload_ranges(keys: Iterable[str], upload_id: str) -> list[tuple[int, int]]:
    """Inclusive row ranges of an upload that batch keys cover, sorted and merged."""
    parsed = map(parse_batch_key, keys)
    return RangeSet(key[1:] for key in parsed if key and key[0] == upload_id).ranges()
