"""Validation, measurement and unification of clients' Arrow arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fletcher.core.batches import Int32Array, Int64Array
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
