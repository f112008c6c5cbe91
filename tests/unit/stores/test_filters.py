"""Filters as text: LanceDB, Arrow, JSON and a plain evaluator agree on random filters."""

from __future__ import annotations

import datetime as dt
import json
import math
import operator
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from fletcher.errors import (
    ColumnTypeError,
    FletcherError,
    InvalidCommandError,
    UnknownColumnError,
)
from fletcher.stores.base import Combination, Comparison, Filter, Negation
from fletcher.stores.filter_parser import MAX_DEPTH, MAX_TESTS, parse_filter
from fletcher.stores.filters import to_expression, to_json, to_sql
from fletcher.stores.lance.library import import_lancedb
from fletcher.storeserver.requests import FilterRequest, convert_request, to_filters

NUM_ROWS = 60
NUM_FILTERS = 60
UTC = dt.UTC
DAY = dt.date(2024, 1, 2)
COMPARE = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# Values of each column, and literals to compare with: as text, and as the value they stand for.
FLOATS = [0.0, -0.0, 1.5, -1.5, 0.1, math.inf, -math.inf, math.nan, 1e30]
NUMBERS = ["0", "-0.0", "1.5", "-1.5", ".1", "1e30", "1e39", "-1e200", "70000", "2"]
STAMPS = [
    dt.datetime(2024, 1, 2, tzinfo=UTC),
    dt.datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC),
    dt.datetime(2024, 1, 3, tzinfo=UTC),
]
EPOCH = dt.datetime(1970, 1, 1, tzinfo=UTC)
NAIVE_STAMPS = [one.replace(tzinfo=None) for one in STAMPS]
STAMP_TEXTS = ["2024-01-02", "'1969-12-31 23:59:59'", "2024-01-02T00:00:00.000001", "9999-12-31"]
COLUMNS: dict[str, tuple[pa.DataType, list[Any], list[str]]] = {
    **{
        f"i{width}": (
            getattr(pa, f"int{width}")(),
            [0, 1, -1, 5, 2 ** (width - 1) - 1, -(2 ** (width - 1))],
            ["0", "5", "-1", "300", "2.5", "-2.5", "99999999999999999999", "-1e30", "127"],
        )
        for width in (8, 16, 32, 64)
    },
    **{
        f"u{width}": (
            getattr(pa, f"uint{width}")(),
            [0, 1, 5, 2**width - 1],
            ["0", "5", "-1", "300", "2.5", "18446744073709551615", "18446744073709551616"],
        )
        for width in (8, 16, 32, 64)
    },
    "f16": (pa.float16(), [*FLOATS[:8], 60000.0], NUMBERS),
    "f32": (pa.float32(), FLOATS, NUMBERS),
    "f64": (pa.float64(), FLOATS, NUMBERS),
    "b": (pa.bool_(), [True, False], ["true", "False"]),
    "s": (pa.utf8(), ["a", "it's", "", "é", "B", "not"], ["a", "'it''s'", '"it\'s"', "''", "é"]),
    "large": (pa.large_utf8(), ["a", "b", 'q"'], ["a", "'q\"'", "zz"]),
    "cat": (pa.dictionary(pa.int32(), pa.utf8()), ["a", "b"], ["a", "'b'", "zz"]),
    "d32": (pa.date32(), [DAY, dt.date(1960, 1, 1)], ["2024-01-02", "1960-01-01", *STAMP_TEXTS]),
    "d64": (pa.date64(), [DAY, dt.date(1960, 1, 1)], ["2024-01-02", "1960-01-01", *STAMP_TEXTS]),
    "ts s": (pa.timestamp("s"), NAIVE_STAMPS, STAMP_TEXTS),
    "ts us": (pa.timestamp("us"), NAIVE_STAMPS, STAMP_TEXTS),
    "zoned": (
        pa.timestamp("us", "UTC"),
        STAMPS,
        [*STAMP_TEXTS, "2024-01-02T02:00:00+02:00", "'2024-01-02 00:00Z'"],
    ),
    "nanos": (pa.timestamp("ns", "UTC"), STAMPS, STAMP_TEXTS),
    "time": (pa.time32("s"), [dt.time(10), dt.time(0)], ["10:00", "'00:00:00'", "09:59:59.5"]),
    "time64": (pa.time64("us"), [dt.time(10), dt.time(0)], ["10:00", "'00:00:00'", "09:59:59.5"]),
    "dec": (
        pa.decimal128(6, 2),
        [Decimal("1.23"), Decimal("-5.00"), Decimal("9999.99")],
        ["1.23", "1.230", "1.225", "-5", "10000", "1e2", "-1e50"],
    ),
    "a name": (pa.int64(), [1, 2], ["1", "2"]),
    'it"s': (pa.int64(), [1, 2], ["1", "2"]),
    "and": (pa.int64(), [1, 2], ["1", "2"]),
    "Über": (pa.int64(), [1, 2], ["1", "2"]),
}


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    choose = random.Random(1)
    arrays, fields = [], []
    for name, (kind, values, _) in COLUMNS.items():
        drawn = [choose.choice([*values, None]) for _ in range(NUM_ROWS)]
        if kind == pa.float16():
            drawn = [None if one is None else np.float16(one) for one in drawn]
        plain = pa.array(drawn, kind.value_type if pa.types.is_dictionary(kind) else kind)
        arrays.append(plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain)
        fields.append(pa.field(name, kind))
    fields.append(pa.field("row", pa.int64()))
    return pa.table([*arrays, pa.array(range(NUM_ROWS))], schema=pa.schema(fields))


@pytest.fixture(scope="module")
def lance(rows: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Any:
    database = import_lancedb().connect(str(tmp_path_factory.mktemp("lance")))
    return database.create_table("d", rows)


class Draw:
    """A random filter: its text, and what a plain evaluator thinks of each row."""

    def __init__(self, rows: dict[str, list[Any]], seed: int) -> None:
        self.choose = random.Random(seed)
        self.rows = rows

    def condition(self, depth: int = 0) -> tuple[str, list[bool | None]]:
        pick = self.choose.random()
        if depth > 3 or pick < 0.4:
            return self.test()
        if pick < 0.55:
            text, met = self.condition(depth + 1)
            return f"not ({text})", [None if one is None else not one for one in met]
        logic = self.choose.choice(["and", "or"])
        number = self.choose.randint(2, 4)
        parts = [self.condition(depth + 1) for _ in range(number)]
        word = self.choose.choice([logic, logic.upper()])
        text = f" {word} ".join(f"({text})" for text, _ in parts)
        join = every if logic == "and" else some
        return text, [join(met) for met in zip(*(met for _, met in parts), strict=True)]

    def test(self) -> tuple[str, list[bool | None]]:
        name = self.choose.choice(list(COLUMNS))
        kind, _, literals = COLUMNS[name]
        column = self.rows[name]
        shown = (
            name if name.isidentifier() and name != "and" else '"' + name.replace('"', '""') + '"'
        )
        pick = self.choose.random()
        if pick < 0.15:
            if self.choose.random() < 0.5:
                return f"{shown} is null", [value is None for value in column]
            return f"{shown} IS NOT NULL", [value is not None for value in column]
        if pick < 0.35:
            drawn = [self.choose.choice(literals) for _ in range(self.choose.randint(1, 4))]
            found = [some([same(value, one, kind) for one in drawn]) for value in column]
            if self.choose.random() < 0.5:
                return f"{shown} in ({', '.join(drawn)})", found
            met = [None if one is None else not one for one in found]
            return f"{shown} not in ({','.join(drawn)})", met
        literal = self.choose.choice(literals)
        signs = ["=", "!="] if kind == pa.bool_() else list(COMPARE)
        sign = self.choose.choice(signs)
        right = meaning(literal, kind)
        met = [None if one is None else COMPARE[sign](one, right) for one in column]
        return f"{shown}{self.choose.choice(['', ' '])}{sign} {literal}", met


def same(value: Any, literal: str, kind: pa.DataType) -> bool | None:
    return None if value is None else value == meaning(literal, kind)


def some(met: Any) -> bool | None:
    return True if True in met else None if None in met else False


def every(met: Any) -> bool | None:
    return False if False in met else None if None in met else True


def to_python(value: Any, kind: pa.DataType) -> Any:
    """A stored value for the plain evaluator: times as exact seconds."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, dt.time):
        return Fraction(value.hour * 3600 + value.minute * 60 + value.second)
    if isinstance(value, dt.datetime):  # pandas' Timestamp, too
        wall = dt.datetime(*value.timetuple()[:6], tzinfo=UTC)
        return Fraction((wall - EPOCH) // dt.timedelta(seconds=1))
    if isinstance(value, dt.date):
        return Fraction((value - dt.date(1970, 1, 1)).days * 86400)
    return Fraction(value) if isinstance(value, (int, Decimal)) else float(value)


def meaning(literal: str, kind: pa.DataType) -> Any:
    """What a literal stands for, by other means than the parser's."""
    text = literal
    if text[0] in "'\"":
        text = text[1:-1].replace(text[0] * 2, text[0])
    if kind == pa.bool_():
        return text.lower() == "true"
    if pa.types.is_floating(kind):
        # The number nearest to it in the column's type; beyond all numbers stays beyond.
        with np.errstate(over="ignore"):
            near = kind.to_pandas_dtype()(float(text))
        return float(near) if np.isfinite(near) else Fraction(Decimal(text))
    if pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        return Fraction(Decimal(text))
    if pa.types.is_time(kind):
        time = dt.time.fromisoformat(text)
        whole = time.hour * 3600 + time.minute * 60 + time.second
        return whole + Fraction(time.microsecond, 10**6)
    if pa.types.is_temporal(kind):
        stamp = dt.datetime.fromisoformat(text)
        stamp = stamp.replace(tzinfo=UTC) if stamp.tzinfo is None else stamp.astimezone(UTC)
        return Fraction((stamp - EPOCH) // dt.timedelta(microseconds=1), 10**6)
    return text


def found_by_lance(lance: Any, filters: list[Filter]) -> set[int]:
    where = to_sql("d", lance.schema, filters)
    return set(lance.search().where(where).select(["row"]).to_arrow()["row"].to_pylist())


def found_by_arrow(rows: pa.Table, filters: list[Filter]) -> set[int]:
    where = to_expression("d", rows.schema, filters)
    return set(ds.dataset(rows).to_table(filter=where)["row"].to_pylist())


def from_json(filters: list[Filter], schema: pa.Schema) -> list[Filter]:
    sent = json.loads(json.dumps(to_json(filters)))
    requests = [convert_request(FilterRequest, one, "a filter") for one in sent]
    return list(to_filters(requests, schema))


def test_random_filters_find_the_same_rows_everywhere(rows: pa.Table, lance: Any) -> None:
    plain = {
        name: [to_python(value, kind) for value in rows[name].to_pylist()]
        for name, (kind, _, _) in COLUMNS.items()
    }
    for seed in range(NUM_FILTERS):
        text, met = Draw(plain, seed).condition()
        parsed = [parse_filter(text, rows.schema)]
        expected = {row for row, one in enumerate(met) if one}
        assert found_by_arrow(rows, parsed) == expected, (seed, text)
        assert found_by_lance(lance, parsed) == expected, (seed, text)
        assert found_by_arrow(rows, from_json(parsed, rows.schema)) == expected, (seed, text)


SMALL = pa.schema(
    [
        ("i8", pa.int8()),
        ("s", pa.utf8()),
        ("flag", pa.bool_()),
        ("day", pa.date32()),
        ("naive", pa.timestamp("us")),
        ("blob", pa.binary()),
        ("list", pa.list_(pa.int8())),
        ("a name", pa.int64()),
    ]
)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("s = a or s=b", Combination("or", (Comparison("s", "=", "a"), Comparison("s", "=", "b")))),
        ("not s is not null", Negation(Negation(Comparison("s", "is null")))),
        ("s = 'a or s = b'", Comparison("s", "=", "a or s = b")),
        ('"a name" NOT IN (1,-2)', Negation(Comparison("a name", "in", (1, -2)))),
        ("`a name`<> 1", Comparison("a name", "!=", 1)),
        (
            "i8=1 and i8=2 or not i8=3",
            Combination(
                "or",
                (
                    Combination("and", (Comparison("i8", "=", 1), Comparison("i8", "=", 2))),
                    Negation(Comparison("i8", "=", 3)),
                ),
            ),
        ),
        ("s = 'it''s'", Comparison("s", "=", "it's")),
        ("s = 2024-01-01", Comparison("s", "=", "2024-01-01")),
        ("i8 < 2.5", Comparison("i8", "<", Decimal("2.5"))),
        ("flag = TRUE", Comparison("flag", "=", True)),
    ],
)
def test_text_is_parsed(text: str, parsed: Filter) -> None:
    assert parse_filter(text, SMALL) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the end; expected the name of a column, at character 1"),
        ("s", "has the end; expected =, ==, !=, <>, <, <=, >, >=, `in` or `is`"),
        ("s = ", "has the end; expected a value"),
        ("s = a b", "has b; expected `and`, `or` or the end"),
        ("s = a or", "has the end; expected the name of a column, at character 9"),
        ("s = it's", "has ' that does not end, at character 7"),
        ("s ~ a", "has ~; expected ="),
        ("(s = a", "has the end; expected `)`"),
        ("s = a)", "has ); expected `and`, `or` or the end"),
        ("s = null", "test for null by `s is null`"),
        ("s is a", "has a; expected `null`"),
        ("s not = a", "has =; expected `in`"),
        ("s in ()", "has ); expected a value"),
        ("s in (a", "has the end; expected `)`"),
        ("'s' = a", "has 's'; expected the name of a column"),
        ("s = `i8`", "has `i8`; expected a value"),
        ("and = 1", "has and; expected the name of a column"),
        ("nope = 1", "names 'nope' at character 1"),
        ("s = a and days = 1", "names 'days' at character 11; did you mean day?"),
        ("i8 = '5'", "has '5'; expected a number, not quoted: 'i8' is int8, at character 6"),
        ("i8 = 1e999", "expected a number"),
        ("i8 = nan", "expected a number"),
        ("i8 = " + "1" * 200, "expected a number"),
        ("s = \udcff", "is not UTF-8"),
        ("flag = yes", "expected true or false"),
        ("flag < true", "by <; use = or !="),
        ("day = tomorrow", "give an ISO 8601 time"),
        ("day = 2024-02-30", "give an ISO 8601 time"),
        ("naive = 2024-01-01T00:00Z", "give an ISO 8601 time without a zone"),
        ("blob = a", "can only be tested by `is null`"),
        ("list = a", "can only be tested by `is null`"),
        ("(" * (MAX_DEPTH + 1) + "s = a", "nested too deeply"),
        ("not " * 5000 + "s = a", "nested too deeply"),
        ("(" * 60_000, "nested too deeply"),
        (" or ".join(["i8 = 1"] * (MAX_TESTS + 1)), "too many tests"),
        ("s = '" + "a" * 70_000 + "'", "has 70006 characters"),
    ],
)
def test_a_mistake_is_named_with_its_position(text: str, message: str) -> None:
    with pytest.raises((InvalidCommandError, UnknownColumnError, ColumnTypeError)) as raised:
        parse_filter(text, SMALL)
    assert message in raised.value.message


def test_any_text_is_a_filter_or_one_of_our_errors() -> None:
    choose = random.Random(7)
    words = ["s", "i8", "'", '"', "`", "(", ")", "=", "<", "in", "not", "is", "null", "and", "or"]
    words += [",", "1", "a", "\x00", "\n", "é", "\ud800", "1e9999", "2024-13-01", "--", ";", "%"]
    for _ in range(3000):
        text = choose.choice(["", " "]).join(choose.choices(words, k=choose.randint(0, 12)))
        try:
            filters = [parse_filter(text, SMALL)]
            to_sql("d", SMALL, filters)
            to_expression("d", SMALL, filters)
        except FletcherError:
            pass


def test_any_json_is_a_filter_or_one_of_our_errors() -> None:
    choose = random.Random(8)
    values = [None, True, 5, 2**70, -1.5, math.inf, math.nan, "x", "1e999999999", [], [1], {}, [[]]]

    def request(depth: int) -> dict[str, Any]:
        inner = [request(depth + 1) for _ in range(choose.randint(0, 3) * (depth < 4))]
        return {
            "field": choose.choice(["", "i8", "s", "flag", "day", "blob", "nope"]),
            "operator": choose.choice(["=", "!=", "<", "in", "is null", "not", "LIKE", ""]),
            "value": choose.choice(values),
            "logic": choose.choice(["and", "or", "xor", None]),
            "filters": choose.choice([inner, None]),
        }

    for _ in range(2000):
        try:
            filters = to_filters([convert_request(FilterRequest, request(0), "a filter")], SMALL)
            to_sql("d", SMALL, filters)
            to_expression("d", SMALL, filters)
        except FletcherError:
            pass
