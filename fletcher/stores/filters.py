"""Conversion of filters to Longbow's JSON, LanceDB's SQL and Parquet expressions."""

from __future__ import annotations

import datetime as dt
import json
import math
import operator
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from fletcher.errors import ColumnTypeError
from fletcher.stores.base import Filter, Filters
from fletcher.stores.schemas import wanted_columns

_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


def to_json(filters: Filters) -> list[dict[str, Any]]:
    """The filters as Longbow's JSON."""
    return [
        {
            "field": one.field,
            "operator": one.operator,
            "value": one.value,
            "logic": one.logic,
            **({"filters": to_json(one.filters)} if one.filters else {}),
        }
        for one in filters
    ]


def to_sql(dataset: str, schema: pa.Schema, filters: Filters) -> str | None:
    """The filters as an SQL condition for LanceDB; None for no filters.

    Literals are escaped.

    Raises:
        UnknownColumnError: A filter names a column that the dataset lacks.
        ColumnTypeError: A value does not fit its column's type.
    """
    sql = ""
    for one in filters:
        parts = []
        if one.field:
            kind = _column_type(dataset, schema, one.field)
            parts.append(f"({quoted_name(one.field)} {_sql_test(one, kind)})")
        if one.filters:
            parts.append(f"({to_sql(dataset, schema, one.filters)})")
        term = " AND ".join(parts)
        sql = f"({sql}) {one.logic.upper()} ({term})" if sql else term
    return sql or None


def to_expression(dataset: str, schema: pa.Schema, filters: Filters) -> Any:
    """The filters as a `pyarrow.dataset` expression; None for no filters.

    Raises:
        UnknownColumnError, ColumnTypeError: As `to_sql`.
    """
    whole = None
    for one in filters:
        term = None
        if one.field:
            term = _expression(one, _column_type(dataset, schema, one.field))
        if one.filters:
            nested = to_expression(dataset, schema, one.filters)
            term = nested if term is None else term & nested
        if whole is not None:
            term = whole | term if one.logic == "or" else whole & term
        whole = term
    return whole


def _column_type(dataset: str, schema: pa.Schema, name: str) -> pa.DataType:
    wanted_columns(dataset, schema, [name])
    return schema.field(name).type


def _expression(one: Filter, kind: pa.DataType) -> Any:
    column = ds.field(one.field)
    if one.value is None:
        return ~column.is_null() if one.operator == "!=" else column.is_null()
    value = pa.scalar(_typed(one, kind), kind if not pa.types.is_dictionary(kind) else None)
    return _COMPARISONS[one.operator](column, value)


def quoted_name(name: str) -> str:
    """A column's name as Lance's SQL quotes it.

    Raises:
        ColumnTypeError: The name holds a backtick, which Lance's SQL cannot escape.
    """
    if "`" in name:
        raise ColumnTypeError(
            f"column {name[:200]!r} cannot be filtered: its name holds a backtick", field="filters"
        )
    return f"`{name}`"


def quoted(value: str) -> str:
    """A string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def _sql_test(one: Filter, kind: pa.DataType) -> str:
    if one.value is None:
        return "IS NOT NULL" if one.operator == "!=" else "IS NULL"
    value = _typed(one, kind)
    if isinstance(value, bool):
        literal = "TRUE" if value else "FALSE"
    elif isinstance(value, str):
        literal = quoted(value)
    elif isinstance(value, dt.datetime):
        zone = 'Some("UTC")' if kind.tz else "None"
        literal = f"arrow_cast({quoted(value.isoformat())}, 'Timestamp(Nanosecond, {zone})')"
    else:
        literal = repr(value)
    return f"{one.operator} {literal}"


def _typed(one: Filter, kind: pa.DataType) -> Any:
    """The filter's value in the Python type of its column."""
    value = one.value
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_boolean(values) and isinstance(value, bool):
        return value
    if isinstance(value, str) and any(is_text(values) for is_text in _TEXTS):
        return value
    if pa.types.is_integer(values) and type(value) is int and abs(value) < 2**64:
        return value
    if pa.types.is_floating(values) and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if pa.types.is_timestamp(values) and isinstance(value, str):
        try:
            return dt.datetime.fromisoformat(value)
        except ValueError:
            pass
    shown = json.dumps(value, default=repr, ensure_ascii=False)[:200]
    raise ColumnTypeError(
        f"a filter compares `{one.field}`, which is {kind}, with {shown}; give a value of that "
        "type (times as ISO 8601 text)",
        field=one.field,
        allowed=[str(kind)],
    )
