"""Arrow's encodings of columns, and extension types that stand for other values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

# Extension types whose values have a usual text.
TEXT_EXTENSIONS = ("arrow.uuid", "arrow.json")


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
