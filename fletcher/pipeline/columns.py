"""The columns of a client's input that are used: found by name, and of a type that can be."""

from __future__ import annotations

import pyarrow as pa

from fletcher.errors import ColumnTypeError, InvalidCommandError, UnknownColumnError


def column(schema: pa.Schema, name: str, field: str) -> int:
    """The place of the column that an option, `field`, names.

    Raises:
        InvalidCommandError: Several have the name.
        UnknownColumnError: None has.
    """
    indices = schema.get_all_field_indices(name)
    if len(indices) == 1:
        return int(indices[0])
    if indices:
        raise InvalidCommandError(
            f"`{field}` is {name!r}, a name that {len(indices)} input columns have", field=field
        )
    raise UnknownColumnError(
        f"`{field}` is {name!r}, but the input has no such column; it has "
        f"{', '.join(schema.names[:50]) or 'none'}",
        field=field,
        allowed=schema.names[:50],
    )


def optional_utf8(schema: pa.Schema, name: str) -> int | None:
    """The place of the one column of that name, if there is one, and of utf8."""
    indices = schema.get_all_field_indices(name)
    if len(indices) == 1 and pa.types.is_string(schema.field(indices[0]).type):
        return int(indices[0])
    return None


def check_text(field: pa.Field) -> pa.DataType:
    """The type of a column of texts.

    Raises:
        ColumnTypeError: It holds something else.
    """
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not _is_text(kind):
        raise ColumnTypeError(
            f"`text_column` {field.name!r} is {field.type}, expected utf8, large_utf8, "
            "utf8_view or a dictionary of one",
            field="text_column",
            allowed=["utf8", "large_utf8", "utf8_view", "dictionary of one of these"],
        )
    return field.type


def _is_text(kind: pa.DataType) -> bool:
    return is_flat_text(kind) or bool(pa.types.is_string_view(kind))


def is_flat_text(kind: pa.DataType) -> bool:
    """Whether an array has the texts one after the other, with their offsets beside them."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def plain(field: pa.Field) -> pa.Field:
    """Dictionaries and views leave as what they stand for: stores read plain columns."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, _UNVIEWED.get(kind, kind))


_UNVIEWED = {pa.string_view(): pa.utf8(), pa.binary_view(): pa.binary()}
