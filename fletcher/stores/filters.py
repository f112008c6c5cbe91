"""Conversion of filters to JSON, LanceDB's SQL and Arrow's expressions.

The grammar of filters is ours because no other fits all stores: LanceDB reads SQL, Parquet files
are filtered by Arrow, and Longbow by JSON. `docs/datasets.md` describes the grammar.
"""

from __future__ import annotations

import datetime as dt
import functools
import operator
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from fletcher.errors import ColumnTypeError
from fletcher.stores.base import Comparison, Filter, Filters, Negation
from fletcher.stores.filter_values import (
    ORDERED,
    Bound,
    BoundJunction,
    BoundTest,
    bind_filters,
    to_decimal,
)

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_UNIT_NAMES = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}


def to_json(filters: Filters) -> list[dict[str, Any]]:
    """The filters as Longbow's JSON, with added operators.

    A Longbow joins all conditions by `and`, and does not know `in`, `is null` and `not`.
    """
    return [_to_object(one, "and") for one in filters]


def _to_object(one: Filter, logic: str) -> dict[str, Any]:
    if isinstance(one, Comparison):
        fields = {"field": one.field, "operator": one.operator, "value": _json_value(one.value)}
        return {**fields, "logic": logic}
    if isinstance(one, Negation):
        inner = [_to_object(one.condition, "and")]
        return {"field": "", "operator": "not", "value": None, "logic": logic, "filters": inner}
    inner = [_to_object(each, one.logic) for each in one.conditions]
    return {"field": "", "operator": "=", "value": None, "logic": logic, "filters": inner}


def _json_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json_value(one) for one in value]
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    # JSON readers round numbers beyond 64 bits.
    is_long = isinstance(value, int) and not -(2**63) <= value < 2**64
    return str(value) if is_long or isinstance(value, Decimal) else value


def to_sql(dataset: str, schema: pa.Schema, filters: Filters) -> str | None:
    """The filters as an SQL condition for LanceDB; None for no filters.

    Literals are escaped.

    Raises:
        UnknownColumnError: A filter names a column that the dataset lacks.
        ColumnTypeError: A value does not fit its column's type.
    """
    return _sql(bind_filters(dataset, schema, filters)) if filters else None


def to_expression(dataset: str, schema: pa.Schema, filters: Filters) -> Any:
    """The filters as a `pyarrow.dataset` expression; None for no filters.

    Raises:
        UnknownColumnError, ColumnTypeError: As `to_sql`.
    """
    return _expression(bind_filters(dataset, schema, filters)) if filters else None


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


def _sql(bound: Bound) -> str:
    if isinstance(bound, bool):
        return "TRUE" if bound else "FALSE"
    if isinstance(bound, BoundJunction):
        # Without parentheses around each part: Lance's SQL allows few levels of them.
        return f"({f' {bound.logic.upper()} '.join(map(_sql, bound.conditions))})"
    name = quoted_name(bound.column)
    if bound.operator in ("null", "valid"):
        return f"{name} IS {'NOT ' * (bound.operator == 'valid')}NULL"
    literals = [_sql_literal(value, bound.kind) for value in bound.values]
    if bound.operator in ("in", "not in"):
        return f"{name} {bound.operator.upper()} ({', '.join(literals)})"
    test = f"{name} {bound.operator} {literals[0]}"
    if bound.operator in ORDERED and pa.types.is_floating(bound.kind):
        # For Lance, NaN is greater than all numbers.
        return f"({test} OR isnan({name}))" if bound.or_nan else f"({test} AND NOT isnan({name}))"
    return test


def _sql_literal(value: Any, kind: pa.DataType) -> str:
    types = pa.types
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, str):
        return quoted(value)
    if types.is_floating(kind):
        return f"arrow_cast({value!r}, 'Float{kind.bit_width}')"
    if types.is_decimal(kind):
        name = f"Decimal{kind.bit_width}({kind.precision}, {kind.scale})"
        return f"arrow_cast('{to_decimal(value, kind.scale):f}', '{name}')"
    if types.is_integer(kind):
        return str(value)
    if types.is_timestamp(kind):
        zone = "None" if kind.tz is None else f'Some("{kind.tz}")'
        name = f"Timestamp({_UNIT_NAMES[kind.unit]}, {zone})"
    elif types.is_date(kind):
        name = f"Date{kind.bit_width}"
    else:
        name = f"Time{kind.bit_width}({_UNIT_NAMES[kind.unit]})"
    return f"arrow_cast(arrow_cast({value}, 'Int{kind.bit_width}'), {quoted(name)})"


def _expression(bound: Bound) -> Any:
    if isinstance(bound, bool):
        return pc.scalar(bound)
    if isinstance(bound, BoundJunction):
        join = operator.and_ if bound.logic == "and" else operator.or_
        return _balanced(join, [_expression(one) for one in bound.conditions])
    column = ds.field(bound.column)
    if bound.operator in ("null", "valid"):
        return column.is_null() if bound.operator == "null" else ~column.is_null()
    column, kind = _comparable(column, bound)
    values = [_scalar(value, kind) for value in bound.values]
    if bound.operator in ("in", "not in"):
        # Not `isin`, which tells 0.0 and -0.0 apart.
        test = _balanced(operator.or_, [column == value for value in values])
        return test if bound.operator == "in" else ~test & ~column.is_null()
    test = _COMPARISONS[bound.operator](column, values[0])
    return test | pc.is_nan(column) if bound.or_nan else test


def _comparable(column: Any, bound: BoundTest) -> tuple[Any, pa.DataType]:
    """The column in a type that Arrow compares, and that type."""
    kind = bound.kind
    if kind == pa.float16():
        kind = pa.float32()
    elif pa.types.is_string_view(kind):
        kind = pa.utf8()
    return column.cast(kind), kind


def _scalar(value: Any, kind: pa.DataType) -> pa.Scalar:
    types = pa.types
    if types.is_decimal(kind):
        return pa.scalar(to_decimal(value, kind.scale), kind)
    if types.is_temporal(kind):
        storage = pa.int32() if kind.bit_width == 32 else pa.int64()
        return pa.array([value], storage).view(kind)[0]
    return pa.scalar(value, kind)


def _balanced(join: Callable[[Any, Any], Any], parts: list[Any]) -> Any:
    """The parts joined as a shallow tree, as Arrow runs expressions recursively."""
    while len(parts) > 1:
        pairs = [parts[place : place + 2] for place in range(0, len(parts), 2)]
        parts = [functools.reduce(join, pair) for pair in pairs]
    return parts[0]
