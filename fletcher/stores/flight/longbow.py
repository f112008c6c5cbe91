"""Conversion of rows for Longbow, and its capabilities.

Longbow indexes float32 only and stores timestamps without a zone. If rows are sent twice, Longbow
stores them twice.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from fletcher.errors import ColumnTypeError, RequestError, UnknownColumnError
from fletcher.stores.base import StoreCapabilities
from fletcher.stores.schemas import check_compatible, converted

CAPABILITIES = StoreCapabilities(
    dtypes=("float32",),
    null_vectors=False,
    upsert=False,
    drops_repeated_keys=False,
    durable=False,
    counts_groups=True,
    overwrite=False,
    nanosecond_times=True,
    index_lags=True,
    deletes_uploads=False,
)
_TIMESTAMP = pa.timestamp("ns")


def longbow_schema(schema: pa.Schema) -> pa.Schema:
    """The schema in types that Longbow indexes and searches.

    Vectors become float32, timestamps lose their zone, ids become utf8, int64 or uint64.

    Raises:
        ColumnTypeError: `vector` does not hold floats.
    """
    fields = []
    for field in schema:
        kind = field.type
        if field.name == "vector":
            if not (pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)):
                raise ColumnTypeError(
                    f"`vector` is {kind}, and Longbow indexes only float32; request `dtype` "
                    "float32 or float16",
                    field="vector",
                )
            kind = pa.list_(pa.field("item", pa.float32()), kind.list_size)
        elif pa.types.is_timestamp(kind):
            kind = _TIMESTAMP
        elif field.name == "id" and pa.types.is_integer(kind):
            kind = pa.uint64() if kind == pa.uint64() else pa.int64()
        elif pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            kind = pa.utf8()
        fields.append(pa.field(field.name, kind))
    metadata = {**(schema.metadata or {}), b"longbow.vector_type": b"float32"}
    return pa.schema(fields, metadata=metadata)


def dataset_schema(dataset: str, stored: pa.Schema, offered: pa.Schema) -> pa.Schema:
    """Schema for rows of `offered` in a dataset with the columns `stored`.

    Both are in Longbow's types.

    Raises:
        UnknownColumnError: The dataset lacks a column of `offered`. Longbow would take it, but only
            gives back the columns of a dataset's first rows.
        FletcherError: As `check_compatible`.
    """
    check_compatible(dataset, stored, offered)
    added = [name for name in offered.names if name not in stored.names]
    if added:
        raise UnknownColumnError(
            f"dataset `{dataset}` has no column {', '.join(f'`{name}`' for name in added)}, and a "
            "Longbow gives back only the columns of a dataset's first rows; leave out such "
            "columns, or write to a new dataset",
            field=added[0],
            allowed=stored.names,
        )
    fields = [offered.field(one.name) if one.name in offered.names else one for one in stored]
    return pa.schema(fields, metadata=offered.metadata)


def longbow_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch converted to a schema from `longbow_schema`; missing columns are null.

    Raises:
        RequestError: A row has no vector, which Longbow does not accept, or a time that
            nanoseconds cannot hold.
    """
    columns = []
    for field in schema:
        if field.name not in batch.schema.names:
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = batch.column(field.name)
        if field.name == "vector" and column.null_count:
            raise RequestError(
                "a row has no `vector`, which Longbow does not accept; leave such rows out",
                field="vector",
            )
        if pa.types.is_fixed_size_list(field.type) and column.type != field.type:
            values = pc.cast(column.flatten(), field.type.value_type)
            column = pa.FixedSizeListArray.from_arrays(values, type=field.type)
        if column.type != field.type:
            column = converted(column, field, batch.schema)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)
