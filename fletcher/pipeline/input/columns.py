"""Input columns that a command uses: found by name, validated and decoded."""

from __future__ import annotations

import pyarrow as pa

from fletcher.core.command import EmbedCommand
from fletcher.core.encodings import (
    decoded_bytes,
    extension_texts,
    is_text,
    is_text_extension,
    runs_as_dictionary,
    value_type,
    viewed_bytes,
    without_views,
)
from fletcher.core.json_columns import is_json_type, json_texts
from fletcher.errors import (
    BatchTooLargeError,
    ColumnTypeError,
    InvalidCommandError,
    UnknownColumnError,
)
from fletcher.pipeline.input.arrays import validate

METADATA = "metadata"

# Least memory of a row in this process, for offsets, lengths and masks. A row may be smaller on the
# wire.
_ROW_BYTES = 16


class InputColumns:
    """Columns of one call's input that the command uses.

    Args:
        max_message_bytes: Largest decoded size of one batch.

    Attributes:
        text: Index of the text column.
        has_metadata: Whether the input has a `metadata` column. A nested one becomes JSON text.
        carried: Output fields of the columns that are copied from input to output.
        only_texts: Whether `text` is the only column and holds no views or dictionary, as in a
            search.

    Raises:
        UnknownColumnError: The input has no column of a name in the command.
        ColumnTypeError: The type of the text, id or metadata column is not accepted.
        InvalidCommandError: The input has several columns of a name in the command.
    """

    def __init__(self, schema: pa.Schema, options: EmbedCommand, max_message_bytes: int) -> None:
        self._max_bytes = max_message_bytes
        self.text = _place(schema, options.text_column, "text_column")
        kind = _check_text(schema.field(self.text))
        self._id = _id(schema, options)
        self._metadata = _metadata(schema)
        self._carried = [
            _place(schema, name, "columns") for name in options.columns if name != METADATA
        ]
        if METADATA in options.columns:
            _place(schema, METADATA, "columns")
        self.has_ids, self.has_metadata = self._id is not None, self._metadata is not None
        self.id_type = pa.utf8() if self._id is None else _id_type(schema.field(self._id).type)
        self.carried = [_plain(schema.field(place)) for place in self._carried]
        only_texts = schema.names == ["text"] and not self.has_ids and not self._carried
        self.only_texts = only_texts and _is_flat_text(kind)

    def checked(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Validates a batch and returns its used columns.

        The returned columns are named `text`, `id`, `metadata` and `carried:NAME`. A text column
        that is a dictionary stays one, and runs of texts become one. All other dictionaries and
        runs, and all views, are decoded. Ids that are texts, and metadata, become utf8.

        Raises:
            BatchTooLargeError: The batch, as received or decoded, exceeds `max_message_bytes`.
            InvalidUtf8Error, ColumnTypeError: The batch has invalid arrays.
        """
        self._check_size(
            max(batch.get_total_buffer_size(), _ROW_BYTES * batch.num_rows),
            f"a batch has {batch.num_rows} rows and",
        )
        places = {"text": self.text, "id": self._id, "metadata": self._metadata}
        arrays = {name: batch.column(place) for name, place in places.items() if place is not None}
        for place in self._carried:
            arrays[f"carried:{batch.schema.field(place).name}"] = batch.column(place)
        for key, array in arrays.items():
            name = key.removeprefix("carried:")
            validate(array, name)
            if pa.types.is_run_end_encoded(array.type):
                array = runs_as_dictionary(array)  # noqa: PLW2901
            # A few bytes of views may stand for many bytes. So the size is checked before decoding.
            self._check_size(viewed_bytes(array), f"`{name}` holds views of")
            arrays[key] = without_views(array)
            if key != "text":
                arrays[key] = self.decoded(arrays[key], name)
            if is_text_extension(arrays[key].type):
                arrays[key] = extension_texts(arrays[key])
        if self._id is not None:
            arrays["id"] = arrays["id"].cast(self.id_type)
        if self._metadata is not None:
            arrays[METADATA] = _as_metadata(arrays[METADATA])
        return pa.RecordBatch.from_pydict(arrays)

    def decoded(self, array: pa.Array, name: str) -> pa.Array:
        """Decodes a column if it is a dictionary; returns other columns as they are.

        Raises:
            BatchTooLargeError: The decoded column would exceed `max_message_bytes`.
        """
        if not pa.types.is_dictionary(array.type):
            return array
        self._check_size(decoded_bytes(array), f"column `{name}` stands for")
        return array.dictionary_decode()

    def held_bytes(self, batch: pa.RecordBatch, checked: pa.RecordBatch, text_bytes: int) -> int:
        """Returns the bytes that a batch keeps in memory beside its texts.

        Unused columns count too: any column received over Flight keeps the whole message in memory.
        Bytes of the buffers that no row refers to count for the same reason.
        """
        text = batch.column(self.text)
        if pa.types.is_dictionary(text.type):
            text_bytes = text.nbytes
        written_out = sum(
            checked.column(f"carried:{field.name}").nbytes
            for place, field in zip(self._carried, self.carried, strict=True)
            if batch.schema.field(place).type != field.type
        )
        return int(max(0, batch.get_total_buffer_size() - text_bytes) + written_out)

    def _check_size(self, num_bytes: int, what: str) -> None:
        if num_bytes > self._max_bytes:
            raise BatchTooLargeError(
                f"{what} {num_bytes} bytes, expected at most {self._max_bytes}; send smaller "
                "batches",
                allowed=[f"<= {self._max_bytes} bytes"],
            )


def _place(schema: pa.Schema, name: str, field: str) -> int:
    """Returns the index of the column `name`, which the command gives in `field`."""
    indices = schema.get_all_field_indices(name)
    if len(indices) == 1:
        return int(indices[0])
    if indices:
        raise InvalidCommandError(
            f"`{field}` is {name!r}, the name of {len(indices)} input columns; rename all but one",
            field=field,
        )
    raise UnknownColumnError(
        f"`{field}` is {name!r}, expected a column of the input, which has "
        f"{', '.join(schema.names[:50]) or 'none'}",
        field=field,
        allowed=schema.names[:50],
    )


def _id(schema: pa.Schema, options: EmbedCommand) -> int | None:
    if options.id_column == "id" and options.id_column not in schema.names:
        return None
    place = _place(schema, options.id_column, "id_column")
    kind = schema.field(place).type
    plain = _id_type(kind)
    if not (pa.types.is_string(plain) or pa.types.is_integer(plain)):
        remedy = "; cast whole numbers to int64" if pa.types.is_floating(plain) else ""
        raise ColumnTypeError(
            f"`id_column` {options.id_column!r} is {kind}, expected strings, UUIDs or integers"
            f"{remedy}",
            field="id_column",
            allowed=[
                "utf8",
                "large_utf8",
                "utf8_view",
                "dictionary of one",
                "arrow.uuid",
                "integers",
            ],
        )
    return place


def _id_type(kind: pa.DataType) -> pa.DataType:
    """The type of stored ids: utf8 for all strings and UUIDs, else the type itself."""
    plain = value_type(kind)
    return pa.utf8() if is_text(plain) or is_text_extension(plain) else plain


def _metadata(schema: pa.Schema) -> int | None:
    """Returns the index of the column `metadata`; None if there is none.

    Raises:
        InvalidCommandError: Several columns have this name.
        ColumnTypeError: The column holds neither texts nor values that JSON can hold.
    """
    if METADATA not in schema.names:
        return None
    place = _place(schema, METADATA, METADATA)
    kind = value_type(schema.field(place).type)
    if not (is_text_extension(kind) or is_json_type(kind)):
        raise ColumnTypeError(
            f"`{METADATA}` is {kind}, expected JSON text, or a struct, map or list of strings, "
            "numbers and booleans; cast its other fields to strings, or rename the column",
            field=METADATA,
        )
    return place


def _as_metadata(column: pa.Array) -> pa.Array:
    """Returns metadata as utf8. Raises ColumnTypeError for NaN and infinities."""
    if is_text(column.type):
        return column.cast(pa.utf8())
    try:
        return json_texts(column)
    except ValueError as error:
        raise ColumnTypeError(f"`{METADATA}`: {error}", field=METADATA) from None


def _check_text(field: pa.Field) -> pa.DataType:
    """Returns the type of a text column. Raises ColumnTypeError if it is not accepted."""
    if not is_text(value_type(field.type)):
        raise ColumnTypeError(
            f"`text_column` {field.name!r} is {field.type}, expected utf8, large_utf8, "
            "utf8_view, or a dictionary or runs of one",
            field="text_column",
            allowed=["utf8", "large_utf8", "utf8_view", "dictionary or runs of one of these"],
        )
    return field.type


def _is_flat_text(kind: pa.DataType) -> bool:
    """Whether arrays of a type hold consecutive texts and offsets, without views."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _plain(field: pa.Field) -> pa.Field:
    """Returns the field of a column after decoding encodings, views and UUIDs.

    Stores read none of them. The field keeps its metadata, except that of Arrow's own encodings.
    """
    kind = value_type(field.type)
    kind = pa.utf8() if is_text_extension(kind) else _UNVIEWED.get(kind, kind)
    metadata = field.metadata or {}
    own = {key: value for key, value in metadata.items() if not key.startswith(b"ARROW:")}
    return pa.field(field.name, kind, metadata=own or None)


_UNVIEWED = {pa.string_view(): pa.utf8(), pa.binary_view(): pa.binary()}
