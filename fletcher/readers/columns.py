"""Selection of columns, and the types in which they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fletcher.errors import ColumnTypeError, UnknownColumnError

DEFAULT_ID_COLUMN = "id"


@dataclass(frozen=True, slots=True)
class Selection:
    """Names of the columns to read.

    Attributes:
        text: Column of the text.
        id: Column of the id; None: `id` if the input has one.
        carried: Further columns.
    """

    text: str
    id: str | None = None
    carried: tuple[str, ...] = ()

    def pick_names(self, names: Sequence[str], where: str) -> list[str]:
        """The names to read: the id's, the text's, the carried ones.

        Args:
            names: Columns of the input.
            where: The input, for the message.

        Raises:
            UnknownColumnError: The input lacks a selected column; the message lists its columns.
        """
        chosen = []
        if self.id is not None:
            chosen.append(self.id)
        elif DEFAULT_ID_COLUMN in names and self.text != DEFAULT_ID_COLUMN:
            chosen.append(DEFAULT_ID_COLUMN)
        chosen.append(self.text)
        chosen += [name for name in self.carried if name not in chosen]
        for name in chosen:
            if name not in names:
                raise UnknownColumnError(
                    f"{where} has no column `{name}`; it has "
                    f"{', '.join(f'`{one}`' for one in names[:50]) or 'no column'}",
                    field=name,
                    allowed=list(names[:50]),
                )
        return chosen

    def is_id(self, name: str) -> bool:
        return name == (self.id if self.id is not None else DEFAULT_ID_COLUMN)


def sent_type(selection: Selection, name: str, found: pa.DataType, where: str) -> pa.DataType:
    """The type in which a column is sent: utf8 for every kind of string.

    Args:
        selection: Roles of the columns.
        name: Of the column.
        found: Its type in the input.
        where: The input, for the message.

    Raises:
        ColumnTypeError: The text is not a string, or the id neither a string nor an integer.
    """
    value_type = found.value_type if types.is_dictionary(found) else found
    if types.is_null(value_type) or _is_string(value_type):
        return pa.utf8()
    if name == selection.text:
        raise ColumnTypeError(
            f"{where}: the text column `{name}` is {found}, expected strings", field=name
        )
    if selection.is_id(name) and not types.is_integer(value_type):
        raise ColumnTypeError(
            f"{where}: the id column `{name}` is {found}, expected strings or integers", field=name
        )
    return value_type


def sent_schema(selection: Selection, found: pa.Schema, where: str) -> pa.Schema:
    """The schema with every column's `sent_type`."""
    return pa.schema(
        [
            pa.field(field.name, sent_type(selection, field.name, field.type, where))
            for field in found
        ]
    )


def conformed(
    batch: pa.RecordBatch, schema: pa.Schema, selection: Selection, where: str
) -> pa.RecordBatch:
    """The batch converted to the schema of the first file.

    Raises:
        ColumnTypeError: A column's values do not fit.
        UnknownColumnError: A column is missing.
    """
    columns = []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            raise UnknownColumnError(
                f"{where} has no column `{field.name}`, which the files before it have",
                field=field.name,
                allowed=batch.schema.names,
            )
        column = batch.column(index)
        sent_type(selection, field.name, column.type, where)
        if column.type != field.type:
            try:
                column = pc.cast(column, field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ColumnTypeError(
                    f"{where}: column `{field.name}` is {column.type}, the first file has it as "
                    f"{field.type}: {str(error).splitlines()[0][:200]}",
                    field=field.name,
                ) from None
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _is_string(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
