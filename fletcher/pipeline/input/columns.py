"""Used columns of a client's input: found by name, validated, and decoded."""

from __future__ import annotations

import pyarrow as pa

from fletcher.core.command import EmbedCommand
from fletcher.errors import (
    BatchTooLargeError,
    ColumnTypeError,
    InvalidCommandError,
    UnknownColumnError,
)
from fletcher.pipeline.input.arrays import decoded_bytes, validate, viewed_bytes, without_views

# Least bytes of a row in this process, whatever its size on the wire: offsets, lengths, masks.
_ROW_BYTES = 16


class InputColumns:
    """Used columns of one call's input.

    Args:
        max_message_bytes: Largest decoded size of one batch.

    Attributes:
        text: Index of the text column.
        has_metadata: Whether there is a `metadata` column of strings.
        carried: Fields of columns that are copied to the output, as they leave.
        only_texts: Whether the input is one flat column named `text`, as a search sends it.

    Raises:
        UnknownColumnError: A named column does not exist.
        ColumnTypeError: The type of the text or id column is not accepted.
        InvalidCommandError: Several columns have the name.
    """

    def __init__(self, schema: pa.Schema, options: EmbedCommand, max_message_bytes: int) -> None:
        self._max_bytes = max_message_bytes
        self.text = _place(schema, options.text_column, "text_column")
        kind = _check_text(schema.field(self.text))
        self._id = _id(schema, options)
        self._metadata = _optional_utf8(schema, "metadata")
        self._carried = [_place(schema, name, "columns") for name in options.columns]
        self.has_ids, self.has_metadata = self._id is not None, self._metadata is not None
        self.id_type = pa.utf8() if self._id is None else schema.field(self._id).type
        self.carried = [_plain(schema.field(place)) for place in self._carried]
        only_texts = schema.names == ["text"] and not self.has_ids and not self._carried
        self.only_texts = only_texts and _is_flat_text(kind)

    def checked(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Validates a batch; returns its `text`, `id`, `metadata` and `carried:NAME`.

        Dictionaries of texts stay; all other dictionaries and views are decoded.

        Raises:
            BatchTooLargeError: The batch, as received or decoded, exceeds `max_message_bytes`.
            InvalidUtf8Error, ColumnTypeError: Its arrays are not valid.
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
            # A few bytes may stand for many, which are counted before they are decoded.
            self._check_size(viewed_bytes(array), f"`{name}` holds views of")
            arrays[key] = without_views(array)
            if key != "text":
                arrays[key] = self.decoded(arrays[key], name)
        return pa.RecordBatch.from_pydict(arrays)

    def decoded(self, array: pa.Array, name: str) -> pa.Array:
        """Decodes a column if it is a dictionary. Raises BatchTooLargeError."""
        if not pa.types.is_dictionary(array.type):
            return array
        self._check_size(decoded_bytes(array), f"column `{name}` stands for")
        return array.dictionary_decode()

    def held_bytes(self, batch: pa.RecordBatch, checked: pa.RecordBatch, text_bytes: int) -> int:
        """Returns the bytes that a batch keeps in memory beside its texts.

        Counts unused columns, too: a column that came over Flight keeps its whole message in
        memory, and its buffers may hold more than its rows refer to.
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
    """Returns the index of the column that an option, `field`, names."""
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
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
        raise ColumnTypeError(
            f"`id_column` {options.id_column!r} is {kind}, expected utf8 or an integer type",
            field="id_column",
            allowed=["utf8", "integers"],
        )
    return place


def _optional_utf8(schema: pa.Schema, name: str) -> int | None:
    """Returns the index of a utf8 column if exactly one has the name."""
    indices = schema.get_all_field_indices(name)
    if len(indices) == 1 and pa.types.is_string(schema.field(indices[0]).type):
        return int(indices[0])
    return None


def _check_text(field: pa.Field) -> pa.DataType:
    """Returns the type of a text column."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (_is_flat_text(kind) or pa.types.is_string_view(kind)):
        raise ColumnTypeError(
            f"`text_column` {field.name!r} is {field.type}, expected utf8, large_utf8, "
            "utf8_view or a dictionary of one",
            field="text_column",
            allowed=["utf8", "large_utf8", "utf8_view", "dictionary of one of these"],
        )
    return field.type


def _is_flat_text(kind: pa.DataType) -> bool:
    """Whether an array holds consecutive texts and their offsets, without views."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _plain(field: pa.Field) -> pa.Field:
    """Returns the field of a decoded column: stores read no dictionaries and views."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, _UNVIEWED.get(kind, kind))


_UNVIEWED = {pa.string_view(): pa.utf8(), pa.binary_view(): pa.binary()}
