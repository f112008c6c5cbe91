"""Interval types, which pyarrow receives and cannot read."""

from __future__ import annotations

import ctypes
from typing import Any

import pyarrow as pa
import pytest

from fletcher.core.command import EmbedCommand
from fletcher.errors import ColumnTypeError
from fletcher.pipeline.input.column_types import check_readable


class CSchema(ctypes.Structure):
    """ArrowSchema of the C data interface, by which a type without a class in pyarrow is made."""


CSchema._fields_ = [
    ("format", ctypes.c_char_p),
    ("name", ctypes.c_char_p),
    ("metadata", ctypes.c_char_p),
    ("flags", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("children", ctypes.POINTER(ctypes.POINTER(CSchema))),
    ("dictionary", ctypes.POINTER(CSchema)),
    ("release", ctypes.CFUNCTYPE(None, ctypes.POINTER(CSchema))),
    ("private_data", ctypes.c_void_p),
]


@CSchema._fields_[7][1]
def release(schema: Any) -> None:
    ctypes.memset(ctypes.byref(schema.contents, CSchema.release.offset), 0, 8)


def c_schema(form: bytes, name: bytes, *children: CSchema) -> CSchema:
    made = CSchema(form, name, None, 2, len(children), None, None, release, None)
    if children:
        pointers = (ctypes.POINTER(CSchema) * len(children))(*map(ctypes.pointer, children))
        made.children = ctypes.cast(pointers, ctypes.POINTER(ctypes.POINTER(CSchema)))
        made._kept = (pointers, children)  # type: ignore[attr-defined]
    return made


def schema_of(form: bytes, name: bytes, nested: bytes | None) -> pa.Schema:
    """A schema with the column `text`, and one of a type given in Arrow's C format."""
    column = c_schema(form, b"item" if nested else name)
    if nested:
        column = c_schema(nested, name, column)
    whole = c_schema(b"+s", b"", c_schema(b"u", b"text"), column)
    return pa.Schema._import_from_c(ctypes.addressof(whole))


@pytest.mark.parametrize("form", [b"tiM", b"tiD"])
@pytest.mark.parametrize("nested", [None, b"+l", b"+s", b"+w:2"])
def test_intervals_that_are_used_are_refused_by_name(form: bytes, nested: bytes | None) -> None:
    schema = schema_of(form, b"span", nested)
    with pytest.raises(ColumnTypeError, match="'span'") as caught:
        check_readable(schema, EmbedCommand(columns=("span",)))
    assert caught.value.field == "span"
    with pytest.raises(ColumnTypeError, match="'span'"):
        check_readable(schema, EmbedCommand(id_column="span"))
    check_readable(schema, EmbedCommand())  # not used


def test_an_interval_as_metadata_is_refused() -> None:
    with pytest.raises(ColumnTypeError, match="metadata"):
        check_readable(schema_of(b"tiM", b"metadata", None), EmbedCommand())


def test_other_types_are_readable() -> None:
    kinds = [pa.month_day_nano_interval(), pa.dictionary(pa.int8(), pa.utf8()), pa.map_("i8", "i8")]
    schema = pa.schema([(f"c{n}", kind) for n, kind in enumerate(kinds)])
    check_readable(schema, EmbedCommand(columns=tuple(schema.names)))
