"""Selection of columns, and the types with which columns are sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fletcher.errors import ColumnTypeError, UnknownColumnError

DEFAULT_ID_COLUMN = "id"
BATCH_BYTES = 4 << 20  # approximate maximum size of a batch
Batches = Iterator[pa.RecordBatch]
_TEXTS = (types.is_string, types.is_large_string, types.is_string_view)


@dataclass(frozen=True, slots=True)
class Selection:
    """The columns and rows to read.

    Attributes:
        text: Column of the text.
        id: Column of the id; None: the column `id` if the input has it.
        carried: Further columns to read.
        batch_rows: Maximum number of rows of a batch.
        limit: Maximum number of rows to read in all; None: no limit.
    """

    text: str
    id: str | None = None
    carried: tuple[str, ...] = ()
    batch_rows: int = 4096
    limit: int | None = None

    def pick_names(self, names: Sequence[str], where: str) -> list[str]:
        """Names of the columns to read from an input: id, text and carried columns.

        `names` are the columns of the input, `where` names the input in errors.

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
        return name == (DEFAULT_ID_COLUMN if self.id is None else self.id)

    def sent_schema(self, found: pa.Schema, where: str) -> pa.Schema:
        """The schema with the column types that are sent.

        Every kind of string becomes utf8, and a dictionary becomes the type of its values.

        Raises:
            ColumnTypeError: The text is not a string, or the id is neither a string nor an integer.
        """
        return pa.schema({one.name: self._sent_type(one.name, one.type, where) for one in found})

    def conform(self, batch: pa.RecordBatch, schema: pa.Schema, where: str) -> pa.RecordBatch:
        """The batch converted to `schema`, which comes from the first file.

        Raises:
            ColumnTypeError: The values of a column cannot be converted.
            UnknownColumnError: A column is missing.
        """
        columns = []
        for field in schema:
            if field.name not in batch.schema.names:
                raise UnknownColumnError(
                    f"{where} has no column `{field.name}`, which the files before it have",
                    field=field.name,
                    allowed=batch.schema.names,
                )
            column = batch.column(field.name)
            self._sent_type(field.name, column.type, where)
            try:
                columns.append(column if column.type == field.type else pc.cast(column, field.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ColumnTypeError(
                    f"{where}: column `{field.name}` is {column.type}, the first file has it as "
                    f"{field.type}: {str(error).splitlines()[0][:200]}",
                    field=field.name,
                ) from None
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _sent_type(self, name: str, found: pa.DataType, where: str) -> pa.DataType:
        value_type = found.value_type if types.is_dictionary(found) else found
        if types.is_null(value_type) or any(is_text(value_type) for is_text in _TEXTS):
            return pa.utf8()
        if name == self.text:
            raise ColumnTypeError(
                f"{where}: the text column `{name}` is {found}, expected strings", field=name
            )
        if self.is_id(name) and not types.is_integer(value_type):
            raise ColumnTypeError(
                f"{where}: the id column `{name}` is {found}, expected strings or integers",
                field=name,
            )
        return value_type
