"""Arrow's encodings of columns, and extension types that stand for other values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fletcher.core.batches import BoolArray

# Extension types whose values have a usual text.
TEXT_EXTENSIONS = ("arrow.uuid", "arrow.json")
_WITH_LENGTHS = {pa.utf8(), pa.large_utf8(), pa.binary(), pa.large_binary()}


def is_extension(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)


def is_text_extension(kind: pa.DataType) -> bool:
    return is_extension(kind) and kind.extension_name in TEXT_EXTENSIONS


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of the string types that are neither encoded nor nested."""
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary or of runs; other types as they are."""
    encoded = types.is_dictionary(kind) or types.is_run_end_encoded(kind)
    return value_type(kind.value_type) if encoded else kind


def runs_as_dictionary(array: pa.RunEndEncodedArray) -> pa.DictionaryArray:
    """A run-end encoded array as a dictionary.

    The size of a dictionary array can be told before it is decoded.
    """
    indices = pa.array(np.arange(len(array.values), dtype=np.int32))
    runs = pa.RunEndEncodedArray.from_arrays(array.run_ends, indices)
    part = runs.slice(array.offset, len(array))
    return pa.DictionaryArray.from_arrays(pc.run_end_decode(part), array.values)


def extension_texts(array: pa.ExtensionArray) -> pa.Array:
    """The texts of an array of `TEXT_EXTENSIONS`: UUIDs in their usual form, or JSON."""
    if array.type.extension_name == "arrow.json":
        return array.storage
    return pa.array([None if one is None else str(one) for one in array.to_pylist()], pa.utf8())


def without_views(array: pa.Array) -> pa.Array:
    """Converts views to flat texts or bytes: Arrow has few functions for views."""
    if pa.types.is_dictionary(array.type) and _is_view(array.type.value_type):
        return pa.DictionaryArray.from_arrays(array.indices, without_views(array.dictionary))
    if not _is_view(array.type):
        return array
    is_text = pa.types.is_string_view(array.type)
    return array.cast(pa.large_utf8() if is_text else pa.large_binary())


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


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))
