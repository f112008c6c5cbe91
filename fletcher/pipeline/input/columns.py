"""The columns of a client's input that are used: found by name, checked in full, and plain."""

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

# What a row takes here at least, whatever its size on the wire: offsets, lengths, masks.
_ROW_BYTES = 16


class InputColumns:
    """What is used of one call's input, and where it is.

    Args:
        schema: Of the input stream.
        options: The command.
        max_message_bytes: Decoded size of one batch, at most.

    Attributes:
        text: The place of the texts.
        has_ids: There is a column of ids.
        id_type: Theirs.
        has_metadata: There is a `metadata` column of strings.
        carried: Fields of columns that are carried through, as they leave.
        only_texts: There are texts, one after the other, and nothing else, as a search sends them;
            they are called as `checked` calls them.

    Raises:
        UnknownColumnError: A named column is not there.
        ColumnTypeError: The text or id column is of no accepted type.
        InvalidCommandError: Several have the name.
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
        """The columns: `text`, `id` and `metadata` where these are, and `carried:NAME`.

        Of texts dictionaries stay; all else leaves as what it stands for.

        Raises:
            BatchTooLargeError: The batch is larger than `max_message_bytes`, or stands for more.
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
            # A few bytes may stand for many: those are counted before they are written out.
            self._check_size(viewed_bytes(array), f"`{name}` holds views of")
            arrays[key] = without_views(array)
            if key != "text":
                arrays[key] = self.decoded(arrays[key], name)
        return pa.RecordBatch.from_pydict(arrays)

    def decoded(self, array: pa.Array, name: str) -> pa.Array:
        """What a column stands for, if it is a dictionary's codes. Raises BatchTooLargeError."""
        if not pa.types.is_dictionary(array.type):
            return array
        self._check_size(decoded_bytes(array), f"column `{name}` stands for")
        return array.dictionary_decode()

    def held_bytes(self, batch: pa.RecordBatch, checked: pa.RecordBatch, text_bytes: int) -> int:
        """What a batch keeps in memory beside its texts, of so many bytes.

        Used columns or not: a column that came over Flight keeps its whole message, and its buffers
        may hold more than its rows refer to.
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
                f"{what} {num_bytes} bytes, at most {self._max_bytes} are accepted; send smaller "
                "batches",
                allowed=[f"<= {self._max_bytes} bytes"],
            )


def _place(schema: pa.Schema, name: str, field: str) -> int:
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
    """The place of the one column of that name, if there is one, and of utf8."""
    indices = schema.get_all_field_indices(name)
    if len(indices) == 1 and pa.types.is_string(schema.field(indices[0]).type):
        return int(indices[0])
    return None


def _check_text(field: pa.Field) -> pa.DataType:
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
    return _is_flat_text(kind) or bool(pa.types.is_string_view(kind))


def _is_flat_text(kind: pa.DataType) -> bool:
    """Whether an array has the texts one after the other, with their offsets beside them."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _plain(field: pa.Field) -> pa.Field:
    """Dictionaries and views leave as what they stand for: stores read plain columns."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, _UNVIEWED.get(kind, kind))


_UNVIEWED = {pa.string_view(): pa.utf8(), pa.binary_view(): pa.binary()}
