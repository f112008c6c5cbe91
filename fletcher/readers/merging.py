"""Types that hold the values of several files without loss."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from pyarrow import types

from fletcher.errors import ColumnTypeError, UnknownColumnError
from fletcher.readers.columns import Selection

_UNITS = ("s", "ms", "us", "ns")


def merged_schema(schemas: Sequence[tuple[pa.Schema, str]], selection: Selection) -> pa.Schema:
    """The schema that holds the rows of all files.

    Args:
        schemas: Schema and name of each file, at least one.
        selection: Names the text and id columns.

    Raises:
        UnknownColumnError: A file lacks a column that another one has.
        ColumnTypeError: No type holds the values of a column of all files.
    """
    known: dict[str, tuple[pa.DataType, str]] = {}
    before = ""  # the file before
    for schema, where in schemas:
        plain = selection.plain_schema(schema, where)
        for name in (known.keys() - set(plain.names)) | (set(plain.names) - known.keys()):
            if known:
                lacking, having = (where, known[name][1]) if name in known else (before, where)
                raise UnknownColumnError(
                    f"{lacking} has no column `{name}`, which {having} has; give all files the "
                    "column, or ingest them apart",
                    field=name,
                )
        for field in plain:
            kind, place = known.setdefault(field.name, (field.type, where))
            common = common_type(kind, field.type)
            if common is None:
                raise ColumnTypeError(
                    f"{where}: column `{field.name}` is {schema.field(field.name).type}, and "
                    f"{kind} in {place}; no type holds both without loss, so convert one of them",
                    field=field.name,
                )
            known[field.name] = common, place if common == kind else where
        before = where
    return pa.schema({name: kind for name, (kind, _) in known.items()})


def widened(schema: pa.Schema, earlier: pa.Schema | None) -> pa.Schema:
    """A schema whose types also hold the values of `earlier`, where possible."""
    if earlier is None:
        return schema
    known = {field.name: field.type for field in earlier}
    kinds = {one.name: common_type(known.get(one.name, one.type), one.type) for one in schema}
    return pa.schema({one.name: kinds[one.name] or one.type for one in schema})


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds all values of two plain types; None if there is none.

    A cast to it must still be checked: int64 becomes float64 only up to 2^53, for example.
    """
    if one == other or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    for rule in (_numbers, _decimals, _times, _bytes):
        if (found := rule(one, other)) is not None:
            return found
    return None


def _numbers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    both = (one, other)
    if all(types.is_floating(kind) for kind in both):
        return max(both, key=lambda kind: kind.bit_width)
    if all(types.is_integer(kind) or types.is_floating(kind) for kind in both):
        if not all(types.is_integer(kind) for kind in both):
            return pa.float64()
        if types.is_signed_integer(one) == types.is_signed_integer(other):
            return max(both, key=lambda kind: kind.bit_width)
        unsigned = one if types.is_unsigned_integer(one) else other
        return None if unsigned.bit_width == 64 else pa.int64()
    return None


def _decimals(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (types.is_decimal(one) and types.is_decimal(other)):
        return None
    scale = max(one.scale, other.scale)
    precision = scale + max(one.precision - one.scale, other.precision - other.scale)
    if precision > 76:
        return None
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)


def _times(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    both = (one, other)
    if all(types.is_timestamp(kind) for kind in both):
        return None if one.tz != other.tz else max(both, key=lambda kind: _UNITS.index(kind.unit))
    if all(types.is_time(kind) for kind in both) or all(types.is_duration(kind) for kind in both):
        return max(both, key=lambda kind: _UNITS.index(kind.unit))
    return None


def _bytes(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    if not all(any(is_kind(kind) for is_kind in kinds) for kind in (one, other)):
        return None
    if types.is_decimal(one) or types.is_decimal(other):
        return None
    return pa.large_binary() if pa.large_binary() in (one, other) else pa.binary()
