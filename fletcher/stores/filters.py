"""Conditions on rows: Longbow's JSON, SQL for LanceDB, expressions for Parquet."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from fletcher.errors import ColumnTypeError
from fletcher.stores.base import Filter
from fletcher.stores.schemas import check_columns


def to_json(filters: Sequence[Filter]) -> list[dict[str, Any]]:
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


def to_sql(dataset: str, schema: pa.Schema, filters: Sequence[Filter]) -> str | None:
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
            check_columns(dataset, schema, [one.field])
            kind = schema.field(one.field).type
            parts.append(f"({quoted_name(one.field)} {_sql_test(one, kind)})")
        if one.filters:
            parts.append(f"({to_sql(dataset, schema, one.filters)})")
        term = " AND ".join(parts)
        sql = f"({sql}) {one.logic.upper()} ({term})" if sql else term
    return sql or None


def to_expression(dataset: str, schema: pa.Schema, filters: Sequence[Filter]) -> Any:
    """The filters as a `pyarrow.dataset` expression; None for no filters.

    Raises:
        UnknownColumnError, ColumnTypeError: As `to_sql`.
    """
    whole = None
    for one in filters:
        term = None
        if one.field:
            check_columns(dataset, schema, [one.field])
            term = _expression(one, schema.field(one.field).type)
        if one.filters:
            nested = to_expression(dataset, schema, one.filters)
            term = nested if term is None else term & nested
        whole = _joined(whole, term, one.logic)
    return whole


def _joined(whole: Any, term: Any, logic: str) -> Any:
    if whole is None:
        return term
    return whole | term if logic == "or" else whole & term


def _expression(one: Filter, kind: pa.DataType) -> Any:
    column = ds.field(one.field)
    if one.value is None:
        return ~column.is_null() if one.operator == "!=" else column.is_null()
    value = pa.scalar(_typed(one, kind), kind if not pa.types.is_dictionary(kind) else None)
    return {
        "=": column == value,
        "!=": column != value,
        ">": column > value,
        "<": column < value,
        ">=": column >= value,
        "<=": column <= value,
    }[one.operator]


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
    if _is_text(values) and isinstance(value, str):
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
    raise ColumnTypeError(
        f"a filter compares `{one.field}`, which is {kind}, with {_shown(value)}; give a value of "
        "that type (times as ISO 8601 text)",
        field=one.field,
        allowed=[str(kind)],
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _shown(value: Any) -> str:
    return json.dumps(value, default=repr, ensure_ascii=False)[:200]
