"""Nested Arrow columns as JSON text."""

from __future__ import annotations

import json

import pyarrow as pa
from pyarrow import types


def is_json_type(kind: pa.DataType) -> bool:
    """Whether JSON can hold every value of a type, except NaN and infinities."""
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return is_json_type(kind.value_type)
    if types.is_struct(kind):
        return all(is_json_type(field.type) for field in kind)
    if types.is_map(kind):
        return types.is_string(kind.key_type) and is_json_type(kind.item_type)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if any(is_list(kind) for is_list in lists):
        return is_json_type(kind.value_type)
    plain = (
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_integer, types.is_floating, types.is_boolean, types.is_null),
    )
    return any(is_kind(kind) for is_kind in plain)


def json_texts(column: pa.Array) -> pa.Array:
    """Each value of a column as JSON text, utf8; null stays null.

    The type is one of `is_json_type`.

    Raises:
        ValueError: A value holds NaN or an infinity; the message names its row from 0.
    """
    texts: list[str | None] = []
    for row, value in enumerate(column.to_pylist(maps_as_pydicts="strict")):
        try:
            text = None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise ValueError(f"row {row} holds NaN or an infinity, which JSON lacks") from None
        texts.append(text)
    return pa.array(texts, pa.utf8())
