"""Selection of columns, and the types with which columns are sent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fletcher.errors import ColumnTypeError, InvalidCommandError, UnknownColumnError
from fletcher.readers.arrays import decode, plain_type
from fletcher.readers.template import TextTemplate

DEFAULT_ID_COLUMN = "id"
TEXT_COLUMN = "text"  # column of texts that a template makes
SOURCE_COLUMN = "source"
_SHOWN_NAMES = 50


@dataclass(frozen=True, slots=True)
class Selection:
    r"""The columns and rows to read.

    A name with dots is a column of that name, or else a field inside structs: `meta.text`.

    Attributes:
        text: Column of the text, or a template such as `{title}\n{body}`.
        id: Column of the id; None: the column `id` if the input has it.
        carried: Further columns to read.
        batch_rows: Maximum number of rows of a batch.
        limit: Maximum number of rows to read in all; None: no limit.
        source: Whether to add a column `source` with the path of each row's file.
        whole_files: Whether each file is one text, with its path as the id.
    """

    text: str
    id: str | None = None
    carried: tuple[str, ...] = ()
    batch_rows: int = 4096
    limit: int | None = None
    source: bool = False
    whole_files: bool = False

    def __post_init__(self) -> None:
        sent = [_sent_name(name) for name in dict.fromkeys(self.carried)]
        others = [*sent, *([self.id] if self.id else [])]
        taken = {SOURCE_COLUMN} if self.source else set()
        if self.template is not None:
            taken.add(TEXT_COLUMN)
        for name in others:
            if name in taken or sent.count(name) > 1:
                raise InvalidCommandError(
                    f"column `{name}` is asked for, and another one of this name is made; rename "
                    "it in the input",
                    field="columns",
                )

    @property
    def template(self) -> TextTemplate | None:
        """The template of the text; None if the text is a column."""
        return _template(self.text)

    @property
    def text_column(self) -> str:
        """Column of the text in the batches."""
        return self.text if self.template is None else TEXT_COLUMN

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns of the input that make the text."""
        return (self.text,) if self.template is None else self.template.names

    @property
    def carried_columns(self) -> tuple[str, ...]:
        """Further columns of the batches. Dots in names become `_`: LanceDB takes none."""
        names = tuple(_sent_name(name) for name in self.carried)
        return names + ((SOURCE_COLUMN,) if self.source else ())

    def pick_names(self, names: Sequence[str], where: str, has: Callable[[str], int]) -> list[str]:
        """Names of the columns to read from an input: id, text and carried columns.

        Args:
            names: Columns of the input, for the message.
            where: Name of the input in errors.
            has: Number of columns of a name in the input.

        Raises:
            UnknownColumnError: The input lacks a selected column; the message lists its columns.
            InvalidCommandError: The input has several columns of a selected name.
        """
        chosen = []
        if self.id is not None:
            chosen.append(self.id)
        elif has(DEFAULT_ID_COLUMN) and DEFAULT_ID_COLUMN not in self.text_columns:
            chosen.append(DEFAULT_ID_COLUMN)
        chosen += self.text_columns
        chosen += self.carried
        for name in chosen:
            if has(name) > 1:
                raise InvalidCommandError(
                    f"{where} has {has(name)} columns `{name}`; rename all but one", field=name
                )
            if not has(name):
                shown = ", ".join(f"`{one}`" for one in names[:_SHOWN_NAMES]) or "no column"
                raise UnknownColumnError(
                    f"{where} has no column `{name}`; it has {shown}",
                    field=name,
                    allowed=list(names[:_SHOWN_NAMES]),
                )
        return list(dict.fromkeys(chosen))

    def is_id(self, name: str) -> bool:
        return name == (DEFAULT_ID_COLUMN if self.id is None else self.id)

    def plain_schema(self, found: pa.Schema, where: str) -> pa.Schema:
        """The schema without encodings; see `plain_type`.

        Raises:
            ColumnTypeError: The text is not a string, or the id is neither a string nor an integer.
        """
        return pa.schema({one.name: self._plain_type(one.name, one.type, where) for one in found})

    def _plain_type(self, name: str, found: pa.DataType, where: str) -> pa.DataType:
        kind = plain_type(found, name, where)
        if types.is_null(found) and name not in self.text_columns:
            return found  # any other type of another file holds nulls too
        if name == self.text and not types.is_string(kind):
            raise ColumnTypeError(
                f"{where}: the text column `{name}` is {found}, expected strings", field=name
            )
        if self.is_id(name) and not (types.is_string(kind) or types.is_integer(kind)):
            raise ColumnTypeError(
                f"{where}: the id column `{name}` is {found}, expected strings or integers",
                field=name,
            )
        return kind

    def sent_schema(self, schema: pa.Schema) -> pa.Schema:
        """The schema of the batches that are sent: `schema` with nulls as strings.

        A template's columns are replaced by the text. Raises ColumnTypeError if the template's
        columns are of a wrong type.
        """
        kinds = {one.name: pa.utf8() if types.is_null(one.type) else one.type for one in schema}
        plain = pa.schema(kinds)
        if self.template is not None:
            self.template.check(plain, "the input")
        names = [name for name in plain.names if self.is_id(name) and name != self.text]
        sent = {name: kinds[name] for name in names} | {self.text_column: pa.utf8()}
        sent |= {_sent_name(name): kinds[name] for name in self.carried}
        return pa.schema(sent | ({SOURCE_COLUMN: pa.utf8()} if self.source else {}))

    def conform(
        self, batch: pa.RecordBatch, schema: pa.Schema, where: str, row_first: int
    ) -> pa.RecordBatch:
        """The columns to send of a batch, converted to `schema`, that of all files.

        Raises:
            ColumnTypeError: A value cannot be converted without loss; the message names its row.
            UnknownColumnError: A column is missing.
        """
        columns = {}
        for field in schema:
            if field.name not in batch.schema.names:
                raise UnknownColumnError(
                    f"{where} has no column `{field.name}`, which other files have",
                    field=field.name,
                    allowed=batch.schema.names,
                )
            kind = pa.utf8() if types.is_null(field.type) else field.type
            columns[field.name] = _converted(
                batch.column(field.name), kind, field, where, row_first
            )
        plain = pa.RecordBatch.from_pydict(columns)
        if self.template is not None:
            columns[TEXT_COLUMN] = self.template.compose(plain)
        if self.source:
            columns[SOURCE_COLUMN] = pa.array([where] * batch.num_rows, pa.utf8())
        sent = self.sent_schema(schema)
        columns |= {_sent_name(name): columns[name] for name in self.carried}
        return pa.RecordBatch.from_arrays([columns[name] for name in sent.names], schema=sent)


def _sent_name(name: str) -> str:
    return name.replace(".", "_")


@functools.lru_cache(maxsize=64)
def _template(text: str) -> TextTemplate | None:
    return TextTemplate.parse(text)


def _converted(
    column: pa.Array, kind: pa.DataType, field: pa.Field, where: str, row_first: int
) -> pa.Array:
    try:
        return decode(column, kind)
    except (pa.ArrowException, ValueError) as error:
        reason = (str(error).splitlines() or ["?"])[0][:200]
    row = next((row for row in range(len(column)) if not _converts(column, row, kind)), None)
    place = "" if row is None else f"row {row_first + row + 1}: "
    raise ColumnTypeError(
        f"{where}: {place}column `{field.name}` is {column.type}, and all files together have it "
        f"as {kind}: {reason}",
        field=field.name,
    )


def _converts(column: pa.Array, row: int, kind: pa.DataType) -> bool:
    try:
        decode(column.slice(row, 1), kind)
    except (pa.ArrowException, ValueError):
        return False
    return True


def arrow_paths(selection: Selection, schema: pa.Schema, where: str) -> dict[str, tuple[str, ...]]:
    """The selected columns of an Arrow schema: by name, the path of fields to each."""

    def path_of(name: str) -> tuple[str, ...] | None:
        if name in schema.names:
            return (name,)
        first, *rest = name.split(".")
        kind = schema.field(first).type if schema.names.count(first) == 1 else pa.null()
        for one in rest:
            place = kind.get_field_index(one) if types.is_struct(kind) else -1
            if place < 0:
                return None
            kind = kind.field(place).type
        return (first, *rest) if rest else None

    def has(name: str) -> int:
        return schema.names.count(name) or int(path_of(name) is not None)

    return {name: path_of(name) or () for name in selection.pick_names(schema.names, where, has)}


def take_paths(batch: pa.RecordBatch, paths: dict[str, tuple[str, ...]]) -> pa.RecordBatch:
    """The columns at some paths of a batch, named by the keys of `paths`."""
    columns = {}
    for name, (first, *rest) in paths.items():
        column = batch.column(first)
        columns[name] = pc.struct_field(column, rest) if rest else column
    return pa.RecordBatch.from_pydict(columns)
