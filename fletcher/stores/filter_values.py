"""Values of filters in the types of their columns.

A filter is bound to a schema before it is run. Binding removes all negations, so that a null never
decides anything: a bound test is met or not. It also finds the nearest value that a column can
hold, so that `i8 < 300` means every number and `price < 1.005` is exact for two decimals.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from fletcher.errors import ColumnTypeError
from fletcher.stores.base import Combination, Comparison, Filter, Filters, Negation
from fletcher.stores.schemas import wanted_columns

# Largest exponent of a number in a filter; no column holds larger numbers.
MAX_EXPONENT = 400
ORDERED = ("<", "<=", ">", ">=")
_OPPOSITES = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_S = 86_400
_EPOCH = dt.date(1970, 1, 1).toordinal()
_TIME = re.compile(
    r"(?:(\d{4}-\d\d-\d\d))?(?:(?:^|[Tt ])(\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,9}))?"
    r"([Zz]|[+-]\d\d:?\d\d)?)?"
)


@dataclass(frozen=True, slots=True)
class BoundTest:
    """A test of one column, met or not met by each row.

    Attributes:
        column: Name of the column.
        kind: Type of its values; for a dictionary, of the dictionary's values.
        operator: A comparison, `in`, `not in`, `null` or `valid`. All but `null` exclude nulls.
        values: Values to compare with: numbers, texts or booleans. Times and decimals are whole
            numbers of their smallest unit.
        or_nan: NaN meets the test. Otherwise NaN meets only `!=`, `not in` and `valid`.
    """

    column: str
    kind: pa.DataType
    operator: str
    values: tuple[Any, ...] = ()
    or_nan: bool = False


@dataclass(frozen=True, slots=True)
class BoundJunction:
    """Bound conditions of which all (`and`) or one (`or`) must be met; at least two."""

    logic: Literal["and", "or"]
    conditions: tuple[Bound, ...]


Bound = BoundTest | BoundJunction | bool


def bind_filters(dataset: str, schema: pa.Schema, filters: Filters) -> Bound:
    """The condition that rows of a dataset meet if they meet all filters.

    Raises:
        UnknownColumnError: A filter names a column that the dataset lacks.
        ColumnTypeError: A value does not fit its column's type, or values of that type cannot be
            compared.
    """
    return _join("and", [_bind(dataset, schema, one, met=True) for one in filters])


def _bind(dataset: str, schema: pa.Schema, one: Filter, *, met: bool) -> Bound:
    """Condition that a filter is true, or with `met=False` that it is false."""
    if isinstance(one, Negation):
        return _bind(dataset, schema, one.condition, met=not met)
    if isinstance(one, Combination):
        logic = one.logic if met else "or" if one.logic == "and" else "and"
        return _join(logic, [_bind(dataset, schema, each, met=met) for each in one.conditions])
    wanted_columns(dataset, schema, [one.field])
    kind = schema.field(one.field).type
    return _bind_comparison(one, kind.value_type if pa.types.is_dictionary(kind) else kind, met)


def _join(logic: Literal["and", "or"], conditions: Iterable[Bound]) -> Bound:
    ends = logic == "or"  # one condition of this value decides
    rest = [one for one in conditions if one is not (not ends)]
    if any(one is ends for one in rest):
        return ends
    if len(rest) < 2:
        return rest[0] if rest else not ends
    return BoundJunction(logic, tuple(rest))


def _bind_comparison(one: Comparison, kind: pa.DataType, met: bool) -> Bound:
    column, operator, value = one.field, one.operator, one.value
    if operator == "is null" or (value is None and operator in ("=", "!=")):
        return BoundTest(column, kind, "null" if met == (operator != "!=") else "valid")
    if operator == "!=":
        operator, met = "=", not met
    if operator == "in":
        given = list(value) if isinstance(value, (list, tuple)) else []
        if not given:
            raise _unfit(one, kind, value)
    else:
        given = [value]
    places = [_place(one, kind, each) for each in given]
    if operator in ORDERED:
        return _bind_order(one, kind, places[0], met)
    found = tuple(dict.fromkeys(exact for exact, _ in places if exact is not None))
    if not found:
        return False if met else BoundTest(column, kind, "valid")
    if len(found) > 1:
        return BoundTest(column, kind, "in" if met else "not in", found)
    return BoundTest(column, kind, "=" if met else "!=", found)


def _bind_order(
    one: Comparison, kind: pa.DataType, place: tuple[Any, Any], met: bool
) -> BoundTest | bool:
    operator, (exact, floor) = str(one.operator), place
    if pa.types.is_boolean(kind):
        raise ColumnTypeError(
            f"a filter compares `{one.field}`, which is {kind}, by {operator}; use = or !=",
            field=one.field,
            allowed=["=", "!="],
        )
    or_nan = not met and pa.types.is_floating(kind)
    operator = operator if met else _OPPOSITES[operator]
    if exact is not None:
        return BoundTest(one.field, kind, operator, (exact,), or_nan)
    if floor in (-math.inf, math.inf):
        if (floor > 0) == (operator in ("<", "<=")):
            return BoundTest(one.field, kind, "valid")
        return False
    # The column has no such value; `floor` is the greatest one below it. Below all numbers is
    # only negative infinity, so that `floor` is the least number then.
    least = pa.types.is_floating(kind) and floor < 0
    below, above = ("<", ">=") if least else ("<=", ">")
    operator = below if operator in ("<", "<=") else above
    return BoundTest(one.field, kind, operator, (floor,), or_nan)


def _place(one: Comparison, kind: pa.DataType, value: Any) -> tuple[Any, Any]:
    """The column's value equal to `value`; or None, and the greatest below it."""
    types = pa.types
    try:
        if types.is_boolean(kind) and isinstance(value, bool):
            return value, None
        if is_text(kind) and isinstance(value, str):
            return value, None
        if types.is_floating(kind):
            return _float_place(kind, _number(value))
        exact = _units(kind, value)
        if exact is not None:
            low, high = _limits(kind)
            if exact < low or exact > high:
                return None, -math.inf if exact < low else math.inf
            return (int(exact), None) if exact.denominator == 1 else (None, math.floor(exact))
    except (ValueError, TypeError, OverflowError, InvalidOperation):
        pass
    raise _unfit(one, kind, value)


def _float_place(kind: pa.DataType, value: Decimal) -> tuple[float | None, float]:
    dtype = kind.to_pandas_dtype()
    with np.errstate(over="ignore"):
        rounded = float(dtype(float(value)))
    if math.isfinite(rounded):
        return rounded + 0.0, 0.0  # no negative zero
    most = float(np.finfo(dtype).max)
    return None, most if rounded > 0 else -most


def _units(kind: pa.DataType, value: Any) -> Fraction | None:
    """The value in smallest units of a column of numbers or times; or None."""
    types = pa.types
    if types.is_integer(kind):
        return Fraction(_number(value))
    if types.is_decimal(kind):
        return Fraction(_number(value)) * Fraction(
            10 ** max(kind.scale, 0), 10 ** max(-kind.scale, 0)
        )
    if types.is_date(kind):
        seconds, _ = _seconds(value, False)
        return seconds / _DAY_S if types.is_date32(kind) else seconds * 1000
    if types.is_timestamp(kind):
        seconds, zoned = _seconds(value, False)
        if zoned and kind.tz is None:
            raise ValueError(value)
        return seconds * _UNITS[kind.unit]
    if types.is_time(kind):
        seconds, _ = _seconds(value, True)
        return seconds * _UNITS[kind.unit]
    return None


def _limits(kind: pa.DataType) -> tuple[int, int]:
    if pa.types.is_decimal(kind):
        return -(10**kind.precision) + 1, 10**kind.precision - 1
    if pa.types.is_unsigned_integer(kind):
        return 0, 2**kind.bit_width - 1
    return -(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1


def _number(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        raise TypeError(value)
    if isinstance(value, str) and len(value) > MAX_EXPONENT:
        raise ValueError(value)
    exact = Decimal(repr(value) if isinstance(value, float) else value)
    if not exact.is_finite() or abs(exact.adjusted()) > MAX_EXPONENT:
        raise ValueError(value)
    return exact


def _seconds(value: Any, of_day: bool) -> tuple[Fraction, bool]:
    """Seconds since 1970 in UTC, or of the day; and whether there is a zone."""
    if isinstance(value, (dt.date, dt.time)):
        value = value.isoformat()
    match = _TIME.fullmatch(value)
    if match is None or not value:
        raise ValueError(value)
    date, time, fraction, zone = match.groups()
    if of_day != (date is None) or (of_day and zone):
        raise ValueError(value)
    days = 0 if date is None else dt.date.fromisoformat(date).toordinal() - _EPOCH
    clock = dt.time.fromisoformat(time) if time else dt.time()
    seconds = Fraction(days * _DAY_S + clock.hour * 3600 + clock.minute * 60 + clock.second)
    seconds += Fraction(int(fraction or 0), 10 ** len(fraction or ""))
    if zone and zone not in "Zz":
        hours, minutes = int(zone[1:3]), int(zone[-2:])
        if hours > 23 or minutes > 59:
            raise ValueError(value)
        seconds -= (hours * 3600 + minutes * 60) * (-1 if zone[0] == "-" else 1)
    return seconds, zone is not None


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's types of UTF-8 text."""
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values of a type are numbers: whole, floating or decimal."""
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def to_decimal(units: int, scale: int) -> Decimal:
    """A decimal column's value from its whole number of smallest units."""
    return Decimal(units).scaleb(-scale, Context(prec=100))


def _unfit(one: Comparison, kind: pa.DataType, value: Any) -> ColumnTypeError:
    types = pa.types
    shown = json.dumps(value, default=str, ensure_ascii=False)[:200]
    remedy = "give a value of that type"
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
        remedy = "give an ISO 8601 time"
        if types.is_timestamp(kind) and kind.tz is None:
            remedy += " without a zone"
    elif not (is_text(kind) or is_number(kind) or types.is_boolean(kind)):
        remedy = "such values can only be tested by `is null` and `is not null`"
    return ColumnTypeError(
        f"a filter compares `{one.field}`, which is {kind}, with {shown}; {remedy}",
        field=one.field,
        allowed=[str(kind)],
    )
