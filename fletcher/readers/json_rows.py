"""Readers of JSON lines and of arrays of JSON objects.

pyarrow's JSON reader is not used. Its errors do not name the line, and each row must fit into one
of its blocks. These readers hold at most one batch in memory.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fletcher.errors import InvalidCommandError, InvalidUtf8Error
from fletcher.readers.arrays import BATCH_BYTES
from fletcher.readers.bad_rows import OnBadLine
from fletcher.readers.lines import MAX_LINE_BYTES, numbered_lines

_CHUNK_BYTES = 1 << 20
Row = tuple[str, dict[str, Any]]  # a place such as `line 3`, and an object


class JsonGroup:
    """Consecutive rows of a file, and their places."""

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


def read_groups(
    stream: io.BufferedReader,
    name: str,
    batch_rows: int,
    on_bad_line: OnBadLine,
    first_line: int = 1,
) -> Iterator[JsonGroup]:
    """The rows of a file in groups of a batch each.

    Lines that are no JSON object go to `on_bad_line`. The first line has the number `first_line`.

    Raises:
        InvalidCommandError: An element of an array is no JSON object.
        InvalidUtf8Error: An array is not UTF-8.
    """
    if first_line == 1 and is_array(stream):
        return _groups(_elements(stream, name), batch_rows)
    return _groups(_lines(stream, name, on_bad_line, first_line), batch_rows)


def is_array(stream: io.BufferedReader) -> bool:
    """Whether a file begins as a JSON array."""
    start = stream.peek(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    return start.startswith(b"[")


def _groups(
    rows: Iterator[tuple[str, dict[str, Any], int]], batch_rows: int
) -> Iterator[JsonGroup]:
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


def _lines(
    stream: io.BufferedReader, name: str, on_bad_line: OnBadLine, first_line: int
) -> Iterator[tuple[str, dict[str, Any], int]]:
    for number, text in numbered_lines(stream, name, on_bad_line, first_line):
        place = f"line {number}"
        try:
            row = _object(_decoded(text, place, name), place, name)
        except InvalidCommandError as error:
            on_bad_line(name, number, text.encode(), error)
            continue
        yield place, row, len(text)


def _decoded(text: str, place: str, name: str) -> Any:
    """The value of a line. Raises InvalidCommandError if it is not JSON."""
    try:
        return _DECODER.decode(text)
    except _BadJsonError as error:
        raise InvalidCommandError(f"{name}: {place}: {error}") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        raise InvalidCommandError(f"{name}: {place} is not JSON: {reason}") from None


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
                if size > MAX_LINE_BYTES:
                    raise InvalidCommandError(
                        f"{self._name}: {place} has more than {MAX_LINE_BYTES >> 20} MiB"
                    ) from None
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


@dataclass(frozen=True, slots=True)
class OutOfRange:
    """Text of a number that would become infinite or zero in float64."""

    text: str


def _number(text: str) -> float | OutOfRange:
    """The number, or OutOfRange: it is no error if the column is not read."""
    value = float(text)
    if math.isinf(value) or (value == 0 and re.match(_NOT_ZERO, text)):
        return OutOfRange(text)
    return value


_NOT_ZERO = r"-?[0.]*[1-9]"
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_number)


def _object(row: Any, place: str, name: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InvalidCommandError(
            f"{name}: {place} is not a JSON object, expected one object per row"
        )
    return row
