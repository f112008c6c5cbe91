"""Readers of JSON lines and plain text, line by line.

pyarrow's JSON reader is not used. Its errors do not name the line, and each row must fit into one
of its blocks. These readers hold at most one batch in memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from fletcher.errors import (
    ColumnTypeError,
    InvalidCommandError,
    InvalidUtf8Error,
    UnknownColumnError,
)
from fletcher.readers.columns import BATCH_BYTES, Batches, Selection

MAX_LINE_BYTES = 64 << 20

# Errors that pyarrow raises for a value that does not have the type of the column.
_MISFITS = (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError)
_TYPES = {str: pa.utf8(), bool: pa.bool_(), float: pa.float64()}
_KINDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}


def numbered_lines(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, as (line number from 1, text without line end).

    Raises:
        InvalidUtf8Error: A line is not UTF-8.
        InvalidCommandError: A line is longer than MAX_LINE_BYTES.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InvalidCommandError(
                f"{name}: line {number} has more than {MAX_LINE_BYTES >> 20} MiB; "
                "expected one row per line"
            )
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidUtf8Error(
                f"{name}: line {number} is not UTF-8: byte {error.start + 1} of it is "
                f"0x{line[error.start]:02x}"
            ) from None
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text and not text.isspace():
            yield number, text


def read_text(stream: io.BufferedReader, name: str, selection: Selection) -> Batches:
    """Batches of plain text: one column with a row for each line that is not blank."""
    names = [selection.text]
    selection.pick_names(names, f"{name} (plain text)")
    for group in _groups(numbered_lines(stream, name), selection.batch_rows):
        column = pa.array([text for _, text in group], pa.utf8())
        yield pa.RecordBatch.from_arrays([column], names=names)


def read_jsonl(stream: io.BufferedReader, name: str, selection: Selection) -> Batches:
    """Batches of JSON lines.

    The rows of the first batch decide the types of the columns. Objects and lists become JSON text.
    A field that is missing in a row is null.
    """
    schema: pa.Schema | None = None
    for group in _groups(numbered_lines(stream, name), selection.batch_rows):
        numbers = [number for number, _ in group]
        rows = [_row(text, number, name) for number, text in group]
        if schema is None:
            schema = _infer_schema(rows, selection, name)
        columns = [
            _array([_scalar(row.get(field.name)) for row in rows], field, numbers, name)
            for field in schema
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _groups(lines: Iterator[tuple[int, str]], batch_rows: int) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line[1])
        if len(group) >= batch_rows or size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _row(text: str, number: int, name: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        hint = ""
        if number == 1 and text.startswith("["):
            hint = "; expected one object per line, not one array over all of them"
        raise InvalidCommandError(f"{name}: line {number} is not JSON: {reason}{hint}") from None
    if not isinstance(row, dict):
        raise InvalidCommandError(
            f"{name}: line {number} is not a JSON object, expected one object per line"
        )
    return row


def _infer_schema(rows: Sequence[dict[str, Any]], selection: Selection, name: str) -> pa.Schema:
    known = list(dict.fromkeys(key for row in rows for key in row))
    try:
        chosen = selection.pick_names(known, name)
    except UnknownColumnError as error:
        error.add_note(f"within the first {len(rows)} rows")
        raise
    fields = []
    for column in chosen:
        values = [_scalar(row[column]) for row in rows if row.get(column) is not None]
        if column == selection.text or not values:
            kind = pa.utf8()
        elif {type(value) for value in values} == {int, float}:
            kind = pa.float64()
        else:  # the first value's type; `_array` reports a row that differs
            kind = _TYPES.get(type(values[0]), pa.int64())
        fields.append(pa.field(column, kind))
    return pa.schema(fields)


def _scalar(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return value


def _array(values: Sequence[Any], field: pa.Field, numbers: Sequence[int], name: str) -> pa.Array:
    try:
        return pa.array(values, field.type)
    except _MISFITS:
        row = next(index for index, value in enumerate(values) if not _fits(value, field.type))
    if isinstance(values[row], str) and field.type == pa.utf8():
        raise InvalidUtf8Error(
            f"{name}: line {numbers[row]}: `{field.name}` holds half a surrogate pair, expected "
            "Unicode text",
            field=field.name,
        )
    found = _KINDS.get(type(values[row]), "something else")
    raise ColumnTypeError(
        f"{name}: line {numbers[row]}: `{field.name}` is {found}, expected {field.type}",
        field=field.name,
    )


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.scalar(value, kind)
    except _MISFITS:
        return False
    return True
