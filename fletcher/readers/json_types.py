"""Types of JSON columns, by all values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import pyarrow as pa

from fletcher.errors import ColumnTypeError, InvalidUtf8Error
from fletcher.readers.columns import DEFAULT_ID_COLUMN, Selection
from fletcher.readers.json_rows import JsonGroup, OutOfRange

# Most names of columns that an error lists.
_MAX_NAMES = 1000
_KINDS: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "an object",
    list: "a list",
}
_EXACT_INTEGERS = 1 << 53  # float64 holds every integer up to this one


class JsonTypes:
    """Types of the columns of JSON files, by all values that were seen.

    Objects and lists become JSON text.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._columns: dict[str, _JsonColumn] = {}

    def observe_file(self, groups: Iterator[JsonGroup], where: str) -> list[str] | None:
        """Take the values of a file into account, and return its selected columns.

        None: the file has no row.

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
                    column.observe_values(group.values(name), group.places, where)
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

    def observe_values(self, values: Sequence[Any], places: Sequence[str], where: str) -> None:
        kinds = set(map(type, values))
        kinds.discard(type(None))
        self._check_numbers(kinds, values, places, where)
        new = {}
        for kind in kinds - self._first.keys():
            new[next(row for row, value in enumerate(values) if type(value) is kind)] = kind
        for row, kind in sorted(new.items()):
            self._first[kind] = f"{where}: {places[row]}"
            self._check_kinds(kind)
        if int in kinds:
            integers = [value for value in values if type(value) is int]
            for one in sorted((min(integers), max(integers)), key=values.index):
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
        """The values as an array of type `kind`. Raises ColumnTypeError if one misfits."""
        kind = self.kind
        fits = _FITTING.get(kind, (dict, list))
        kinds = set(map(type, values)) - {type(None)}
        self._check_numbers(kinds, values, places, where)
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
            return None if value is None else _ENCODER.encode(value)
        except _RangeError as error:
            self._refuse(f"{where}: {place}", f"nested and holds {error}{_BEYOND}")
        except ValueError:
            self._refuse(f"{where}: {place}", "not JSON: it holds NaN or Infinity")

    def _check_numbers(
        self, kinds: set[type], values: Sequence[Any], places: Sequence[str], where: str
    ) -> None:
        if OutOfRange in kinds:
            row = next(row for row, value in enumerate(values) if type(value) is OutOfRange)
            self._refuse(f"{where}: {places[row]}", f"{values[row].text[:40]}{_BEYOND}")

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


class _RangeError(Exception):
    """A nested value has a number beyond the range of float64."""


def _refuse_number(value: OutOfRange) -> NoReturn:
    raise _RangeError(value.text[:40])


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_refuse_number)
_BEYOND = ", which is beyond the numbers of float64; write it as a string"
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
