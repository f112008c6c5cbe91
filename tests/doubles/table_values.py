"""Comparison of values and types that were stored with those that were sent."""

from __future__ import annotations

import math
import uuid
from typing import Any

import pyarrow as pa

UNITS = ("s", "ms", "us", "ns")
MS = pa.time32("ms")


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal; NaN is NaN, and UUIDs are their texts."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, uuid.UUID) or isinstance(other, uuid.UUID):
        return str(one) == str(other)
    return bool(one == other and isinstance(one, bool) == isinstance(other, bool))


def csv_text(scalar: pa.Scalar) -> str | None:
    """A value as CSV has it; None for null.

    Raises:
        ValueError: The value has no text.
    """
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return str(scalar.as_py())
        raise ValueError(kind)
    if pa.types.is_dictionary(kind):
        return csv_text(scalar.value)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise ValueError(kind)
    return str(scalar.cast(pa.utf8()).as_py())


def plain(scalar: pa.Scalar) -> Any:
    """A scalar as a Python value. Times are counts of ns, which Python's types lack."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        is_uuid = kind.extension_name == "arrow.uuid"
        return str(scalar.as_py()) if is_uuid else plain(scalar.value)
    if pa.types.is_dictionary(kind) or pa.types.is_union(kind):
        return plain(scalar.value)
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        return scalar.value * 1000 ** (3 - UNITS.index(kind.unit))
    if pa.types.is_struct(kind):
        return {field.name: plain(scalar[index]) for index, field in enumerate(kind)}
    if pa.types.is_nested(kind):  # lists and maps
        return list(map(plain, scalar.values))
    return scalar.as_py()


def stand_in(kind: pa.DataType) -> pa.DataType:
    """The type as which a column comes back; docs/python.md and docs/wire.md list them.

    Parquet has neither seconds nor date64, and its lists have other names of fields.
    """
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return pa.utf8() if kind.extension_name in ("arrow.uuid", "arrow.json") else kind
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return stand_in(kind.value_type)
    if types.is_null(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.utf8()
    if types.is_struct(kind):
        return pa.struct([(field.name, stand_in(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(stand_in(kind.key_type), stand_in(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(pa.field("item", stand_in(kind.value_type)), kind.list_size)
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(pa.field("item", stand_in(kind.value_type)))
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(pa.field("item", stand_in(kind.value_type)))
    if types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    simple = {pa.binary_view(): pa.binary(), pa.date64(): pa.date32(), pa.time32("s"): MS}
    return simple.get(kind, kind)
