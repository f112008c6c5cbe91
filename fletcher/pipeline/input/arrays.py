"""Validation, measurement and unification of clients' Arrow arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.batches import BoolArray, Int32Array, Int64Array
from fletcher.errors import ColumnTypeError, InvalidUtf8Error


def validate(array: pa.Array, name: str) -> None:
    """Validates an array in full: reading an invalid array may crash the process.

    Raises:
        InvalidUtf8Error, ColumnTypeError: The array is not valid.
    """
    try:
        array.validate(full=True)
        if pa.types.is_dictionary(array.type):
            array.dictionary.validate(full=True)
    except pa.ArrowException as error:  # also ArrowIndexError, of a bad view
        text = str(error)
        if "UTF8" in text or "UTF-8" in text:
            raise InvalidUtf8Error(
                f"column `{name}` holds invalid UTF-8: {text}; nothing of this batch was used",
                field=name,
            ) from None
        raise ColumnTypeError(
            f"column `{name}` is not a valid Arrow array: {text}; nothing of this batch was used",
            field=name,
        ) from None


def without_views(array: pa.Array) -> pa.Array:
    """Converts views to flat texts or bytes: Arrow has few functions for views."""
    if pa.types.is_dictionary(array.type) and _is_view(array.type.value_type):
        return pa.DictionaryArray.from_arrays(array.indices, without_views(array.dictionary))
    if not _is_view(array.type):
        return array
    is_text = pa.types.is_string_view(array.type)
    return array.cast(pa.large_utf8() if is_text else pa.large_binary())


def large_utf8(texts: pa.Array) -> pa.Array:
    """Converts texts to utf8 with 64-bit offsets, the layout that the pipeline uses."""
    return texts if pa.types.is_large_string(texts.type) else texts.cast(pa.large_utf8())


def distinct(texts: pa.Array) -> tuple[Int32Array, pa.Array]:
    """Finds the distinct texts of an array.

    Returns:
        Two values: int32 [n] with each text's index in the list of distinct texts (arbitrary for
        nulls), and that list.
    """
    if len(texts) == 1:  # saves the tenth of a millisecond that Arrow's functions take
        return np.zeros(1, np.int32), texts
    encoded = texts.dictionary_encode()
    codes = encoded.indices.fill_null(-1) if encoded.null_count else encoded.indices
    return codes.to_numpy(), encoded.dictionary


def text_offsets(texts: pa.Array) -> Int64Array:
    """Returns int64 [n + 1], the byte offsets of the n texts of a large_utf8 array."""
    if len(texts) == 0:
        return np.zeros(1, np.int64)
    buffer = texts.buffers()[1]
    return np.frombuffer(buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]


def null_mask(array: pa.Array) -> BoolArray:
    """Returns bool [n], True for nulls and for codes of a dictionary's null values."""
    if array.null_count == 0 and not pa.types.is_dictionary(array.type):
        return np.zeros(len(array), np.bool_)
    return np.asarray(pc.is_null(array).to_numpy(zero_copy_only=False))


def viewed_bytes(array: pa.Array) -> int:
    """Returns the total length in bytes of what a column's views refer to.

    For a dictionary array, the views are those of its values.
    """
    values = array.dictionary if pa.types.is_dictionary(array.type) else array
    if not _is_view(values.type) or len(values) == 0:
        return 0
    # A view is 16 bytes, of which the first 4 are the length.
    lengths = np.frombuffer(values.buffers()[1], np.int32)[::4]
    lengths = lengths[values.offset : values.offset + len(values)]
    return int(lengths[~null_mask(values)].sum(dtype=np.int64))


def decoded_bytes(array: pa.DictionaryArray) -> int:
    """Returns the size of a dictionary array after decoding, in bytes.

    For nested values this is an upper bound.
    """
    values = array.dictionary
    if values.type in _WITH_LENGTHS:
        return pc.sum(pc.binary_length(values).take(array.indices)).as_py() or 0
    # Nested values differ in size: all codes may stand for one long list among many short ones.
    share = 1 if pa.types.is_nested(values.type) else max(1, len(values))
    return len(array) * int(values.nbytes) // share


_WITH_LENGTHS = {pa.utf8(), pa.large_utf8(), pa.binary(), pa.large_binary()}


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))
