"""Which columns are read, and the types that they are sent in."""

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
    """The columns to read.

    Attributes:
        text: The column of the text.
        id: The column of the id; None: `id` where there is one.
        carried: Further columns.
    """

    text: str
    id: str | None = None
    carried: tuple[str, ...] = ()

    def of(self, names: Sequence[str], where: str) -> list[str]:
        """The names to read out of those there are: the id's, the text's, the others.

        Raises:
            UnknownColumnError: One of them is not there; names those that are.
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
    """The type that a column found as `found` is sent in: plain utf8 for every kind of string.

    Raises:
        ColumnTypeError: The text is no string, or the id neither string nor integer.
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
    """`sent_type` of every column."""
    return pa.schema(
        [
            pa.field(field.name, sent_type(selection, field.name, field.type, where))
            for field in found
        ]
    )


def conformed(
    batch: pa.RecordBatch, schema: pa.Schema, selection: Selection, where: str
) -> pa.RecordBatch:
    """A batch in the schema that the first file set.

    Raises:
        ColumnTypeError: A column's values do not fit.
        UnknownColumnError: A column is not there.
    """
    columns = []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            raise UnknownColumnError(
                f"{where} has no column `{field.name}`, which files before it have",
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
