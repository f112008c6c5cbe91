"""JSON lines and arrays of JSON objects, with types by all values.

pyarrow's JSON reader is not used. Its errors do not name the line, and each row must fit into one
of its blocks. These readers hold at most one batch in memory.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import pyarrow as pa

from fletcher.errors import ColumnTypeError, InvalidCommandError, InvalidUtf8Error
from fletcher.readers.arrays import BATCH_BYTES
from fletcher.readers.columns import DEFAULT_ID_COLUMN, Selection
from fletcher.readers.lines import MAX_LINE_BYTES, numbered_lines

# Most names of columns that an error lists.
_MAX_NAMES = 1000
_CHUNK_BYTES = 1 << 20
_KINDS: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "an object",
    list: "a list",
}
_EXACT_INTEGERS = 1 << 53  # float64 holds every integer up to this one
Row = tuple[str, dict[str, Any]]  # a place such as `line 3`, and an object


class JsonGroup:
    """Consecutive rows of a file: the selected values by column, and the places of the rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [row for _, row in rows]
        self.places = [place for place, _ in rows]
        self.num_rows = len(rows)

    def names(self) -> Iterator[str]:
        """Names of the top-level fields, repeated."""
        return itertools.chain.from_iterable(self._rows)

    def has(self, name: str) -> bool:
        """Whether a row has a field; dots lead into objects."""
        return any(_value(row, name, _MISSING) is not _MISSING for row in self._rows)

    def values(self, name: str) -> list[Any]:
        return [_value(row, name, None) for row in self._rows]


_MISSING = object()


def _value(row: dict[str, Any], name: str, default: Any) -> Any:
    if name in row or "." not in name:
        return row.get(name, default)
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def read_groups(stream: io.BufferedReader, name: str, batch_rows: int) -> Iterator[JsonGroup]:
    """The rows of a file in groups of a batch each.

    Raises:
        InvalidCommandError: A line or an element is no JSON object.
        InvalidUtf8Error: The file is not UTF-8.
    """
    start = stream.peek(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    is_array = start.startswith(b"[")
    rows = _elements(stream, name) if is_array else _lines(stream, name)
    group: list[Row] = []
    size = 0
    for place, row, num_chars in rows:
        group.append((place, row))
        size += num_chars
        if len(group) >= batch_rows or size >= BATCH_BYTES:
            yield JsonGroup(group)
            group, size = [], 0
    if group:
        yield JsonGroup(group)


def _lines(stream: io.BufferedReader, name: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    for number, text in numbered_lines(stream, name):
        place = f"line {number}"
        try:
            row = _DECODER.decode(text)
        except _BadJsonError as error:
            raise InvalidCommandError(f"{name}: {place}: {error}") from None
        except (ValueError, RecursionError) as error:
            reason = (
                error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
            )
            raise InvalidCommandError(f"{name}: {place} is not JSON: {reason}") from None
        yield place, _object(row, place, name), len(text)


def _elements(stream: io.BufferedReader, name: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The objects of one JSON array, read piece by piece."""
    text = _ArrayText(stream, name)
    text.expect("[")
    if text.take("]"):
        text.expect_end()
        return
    for number in itertools.count(1):
        place = f"element {number}"
        row, num_chars = text.element(place)
        yield place, _object(row, place, name), num_chars
        if text.take("]"):
            text.expect_end()
            return
        text.expect(",")


class _ArrayText:
    """The text of a JSON array, of which one element at a time is in memory."""

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self._stream = stream
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False

    def take(self, sign: str) -> bool:
        """Skip white space, and the sign if it comes next."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._read(_CHUNK_BYTES):
                break
        found = self._text.startswith(sign, self._at)
        self._at += len(sign) if found else 0
        return found

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            found = self._text[self._at : self._at + 20]
            raise InvalidCommandError(
                f"{self._name} is not a JSON array: expected {sign!r}, found {found!r}"
                if found
                else f"{self._name} is not a JSON array: it ends early"
            )

    def expect_end(self) -> None:
        self.take("")
        if self._at < len(self._text):
            raise InvalidCommandError(
                f"{self._name} goes on after its JSON array: {self._text[self._at :][:20]!r}"
            )

    def element(self, place: str) -> tuple[Any, int]:
        """The next value and its length in characters."""
        self.take("")
        wanted = _CHUNK_BYTES
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except _BadJsonError as error:
                raise InvalidCommandError(f"{self._name}: {place}: {error}") from None
            except (ValueError, RecursionError) as error:
                # The value may be incomplete. Reading doubles the text, so the work stays linear.
                size = len(self._text) - self._at
                if size <= MAX_LINE_BYTES and self._read(wanted):
                    wanted = max(wanted, size)
                    continue
                syntax = isinstance(error, json.JSONDecodeError)
                reason = error.msg if syntax else "too deep or too long"  # type: ignore[union-attr]
                raise InvalidCommandError(f"{self._name}: {place} is not JSON: {reason}") from None
            num_chars, self._at = end - self._at, end
            return value, num_chars

    def _read(self, num_bytes: int) -> bool:
        """Read more text; False at the end."""
        while not self._ended:
            data = self._stream.read1(num_bytes)
            self._ended = not data
            try:
                more = self._decoder.decode(data, final=self._ended)
            except UnicodeDecodeError:
                raise InvalidUtf8Error(
                    f"{self._name} is not UTF-8; if it has another encoding, give --encoding"
                ) from None
            if more:
                self._text, self._at = self._text[self._at :] + more, 0
                return True
        return False


class _BadJsonError(Exception):
    """A value that Python's JSON reader would accept with a loss."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _BadJsonError(f"an object has two fields `{twice}`")
    return row


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _BadJsonError(f"{text[:40]} is beyond the numbers of float64")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite)


def _object(row: Any, place: str, name: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InvalidCommandError(
            f"{name}: {place} is not a JSON object, expected one object per row"
        )
    return row


class JsonTypes:
    """Types of the columns of JSON files, by all values that were seen.

    Objects and lists become JSON text.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._columns: dict[str, _JsonColumn] = {}

    def observe(self, groups: Iterator[JsonGroup], where: str) -> list[str] | None:
        """Take the values of a file into account; its selected columns. None: it has no row.

        Raises:
            UnknownColumnError: No row has a selected column.
            ColumnTypeError: The values of a column have no type in common.
        """
        names: dict[str, None] = {}
        wanted = [self._selection.id or DEFAULT_ID_COLUMN]
        wanted += [*self._selection.text_columns, *self._selection.carried]
        found: set[str] = set()
        columns = {name: _JsonColumn(name, self._selection) for name in wanted}
        empty = True
        for group in groups:
            empty = False
            if len(names) < _MAX_NAMES:
                names |= dict.fromkeys(group.names())
            for name, column in columns.items():
                if name not in found and group.has(name):
                    found.add(name)
                if name in found:
                    column.observe(group.values(name), group.places, where)
        if empty:
            return None
        chosen = self._selection.pick_names(list(names), where, lambda name: int(name in found))
        for name in chosen:
            self._columns.setdefault(name, columns[name]).merge(columns[name])
        return chosen

    def schema(self, names: list[str]) -> pa.Schema:
        """The types of some columns."""
        return pa.schema({name: self._columns[name].kind for name in names})

    def convert(self, group: JsonGroup, where: str) -> pa.RecordBatch:
        """The group as a batch with the types of all values that were observed.

        Raises:
            ColumnTypeError: A value was not observed and does not fit.
        """
        if DEFAULT_ID_COLUMN not in self._columns and self._selection.id is None:
            for place, value in zip(group.places, group.values(DEFAULT_ID_COLUMN), strict=True):
                if value is not None and DEFAULT_ID_COLUMN not in self._selection.text_columns:
                    raise ColumnTypeError(
                        f"{where}: {place} has an `id`, which the rows before it lack; give each "
                        "row an id, or name another column by --id",
                        field="id",
                    )
        arrays = {
            name: column.array(group.values(name), group.places, where)
            for name, column in self._columns.items()
        }
        return pa.RecordBatch.from_pydict(arrays)


class _JsonColumn:
    """Kinds and range of the values of one column."""

    def __init__(self, name: str, selection: Selection) -> None:
        self._name = name
        self._only: tuple[type, ...] = tuple(_KINDS)
        if name == selection.text:
            self._only = (str,)
        elif selection.is_id(name):
            self._only = (str, int)
        self._first: dict[type, str] = {}  # the place of the first value of a kind
        self._low = self._high = 0
        self._integer_places: dict[int, str] = {}

    def observe(self, values: Sequence[Any], places: Sequence[str], where: str) -> None:
        kinds = set(map(type, values))
        kinds.discard(type(None))
        for kind in kinds - self._first.keys():
            row = next(row for row, value in enumerate(values) if type(value) is kind)
            self._first[kind] = f"{where}: {places[row]}"
            self._check_kinds(kind)
        if int in kinds:
            integers = [value for value in values if type(value) is int]
            for one in (min(integers), max(integers)):
                if not self._low <= one <= self._high:
                    place = f"{where}: {places[values.index(one)]}"
                    self._low, self._high = min(self._low, one), max(self._high, one)
                    self._check_range(place)
            if float in self._first:
                self._check_exact(integers, values, places, where)
            elif max(self._high, -self._low) > _EXACT_INTEGERS:
                self._remember_inexact(values, places, where)

    def merge(self, other: _JsonColumn) -> None:
        """Take the values of another file into account."""
        for kind, place in other._first.items():
            if kind not in self._first:
                self._first[kind] = place
                self._check_kinds(kind)
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        self._integer_places = {**other._integer_places, **self._integer_places}
        self._check_range(next(iter(other._first.values()), ""))
        self._check_known_integers()

    @property
    def kind(self) -> pa.DataType:
        """The type that holds all values; null if there is no value."""
        kinds = self._first.keys()
        if not kinds:
            return pa.null()
        if kinds <= {dict, list}:
            return pa.json_(pa.utf8())
        if float in kinds:
            return pa.float64()
        if int in kinds:
            return pa.uint64() if self._high >= 1 << 63 else pa.int64()
        return pa.bool_() if bool in kinds else pa.utf8()

    def array(self, values: Sequence[Any], places: Sequence[str], where: str) -> pa.Array:
        """The values as an array of type `kind`. Raises ColumnTypeError for one that misfits."""
        kind = self.kind
        fits = _FITTING.get(kind, (dict, list))
        kinds = set(map(type, values)) - {type(None)}
        if not kinds.issubset(fits):
            row = next(
                n for n, one in enumerate(values) if one is not None and type(one) not in fits
            )
            found = _KINDS[type(values[row])]
            self._refuse(f"{where}: {places[row]}", f"{found}, and {kind} before; {_REMEDY}")
        if int in kinds and kind == pa.float64():
            integers = [value for value in values if type(value) is int]
            self._check_exact(integers, values, places, where)
        if fits == (dict, list):
            values = [
                self._json(one, place, where) for one, place in zip(values, places, strict=True)
            ]
            kind = pa.utf8()
        try:
            array = pa.array(values, kind)
        except (pa.ArrowException, OverflowError):
            row = next(row for row, value in enumerate(values) if not _fits(value, kind))
            self._refuse(f"{where}: {places[row]}", f"beyond {kind}, the type before; {_REMEDY}")
        except UnicodeError:
            row = next(row for row, value in enumerate(values) if not _fits(value, kind))
            raise InvalidUtf8Error(
                f"{where}: {places[row]}: `{self._name}` holds half a surrogate pair, expected "
                "Unicode text",
                field=self._name,
            ) from None
        return array if fits != (dict, list) else pa.ExtensionArray.from_storage(self.kind, array)

    def _json(self, value: Any, place: str, where: str) -> str | None:
        try:
            return None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            self._refuse(f"{where}: {place}", "not JSON: it holds NaN or Infinity")

    def _check_kinds(self, new: type) -> None:
        """Refuse kinds that no type holds together."""
        place = self._first[new]
        if new not in self._only:
            wanted = " or ".join(_KINDS[one] for one in self._only)
            self._refuse(place, f"{_KINDS[new]}, expected {wanted}")
        together = self._first.keys()
        if together <= {int, float} or together <= {dict, list} or len(together) == 1:
            if {int, float} <= together:
                self._check_known_integers()
            return
        other = next(one for one in self._first if one is not new)
        self._refuse(place, f"{_KINDS[new]}, and {_KINDS[other]} in {self._first[other]}")

    def _check_range(self, place: str) -> None:
        if (
            self._high >= 1 << 64
            or (self._high >= 1 << 63 and self._low < 0)
            or self._low < -(1 << 63)
        ):
            self._refuse(
                place, "an integer, and no integer type of 64 bits holds it and the others"
            )

    def _remember_inexact(self, values: Sequence[Any], places: Sequence[str], where: str) -> None:
        """Keep the first integer that float64 cannot hold, in case a fraction comes later."""
        for value, place in zip(values, places, strict=True):
            if not self._integer_places and type(value) is int and not _is_exact(value):
                self._integer_places[value] = f"{where}: {place}"

    def _check_exact(
        self, integers: Sequence[int], values: Sequence[Any], places: Sequence[str], where: str
    ) -> None:
        for one in integers:
            if not _is_exact(one):
                self._integer_places[one] = f"{where}: {places[values.index(one)]}"
                self._check_known_integers()

    def _check_known_integers(self) -> None:
        if float in self._first and self._integer_places:
            value, place = next(iter(self._integer_places.items()))
            self._refuse(
                place, f"{value}, which float64 cannot hold, and a fraction in {self._first[float]}"
            )

    def _refuse(self, place: str, found: str) -> NoReturn:
        raise ColumnTypeError(f"{place}: `{self._name}` is {found}", field=self._name)


_REMEDY = "the types of a pipe are those of its first rows: give a file"
_FITTING: dict[pa.DataType, tuple[type, ...]] = {
    pa.null(): (),
    pa.utf8(): (str,),
    pa.bool_(): (bool,),
    pa.int64(): (int,),
    pa.uint64(): (int,),
    pa.float64(): (int, float),
}


def _is_exact(value: int) -> bool:
    return abs(value) <= _EXACT_INTEGERS or (abs(value) < 1 << 1000 and int(float(value)) == value)


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.scalar(value, kind)
    except (pa.ArrowException, OverflowError, UnicodeError):
        return False
    return True
