"""Columns of one row, built as bytes; see `fletcher.pipeline.interactive`."""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from fletcher.core.batches import EmbeddingBatch
from fletcher.core.schema import ELEMENT_TYPES, TIMESTAMP, VectorSpec

# Two offsets of a utf8 array, and two of a large_utf8 array.
_PAIR, _LARGE_PAIR = struct.Struct("<2i"), struct.Struct("<2q")
_INT, _LONG = struct.Struct("<i"), struct.Struct("<q")


def single_text(texts: pa.Array) -> bytes:
    """UTF-8 bytes of the only text in an array, which is utf8 or large_utf8, not null."""
    _, offsets, data = texts.buffers()
    pair = _LARGE_PAIR if pa.types.is_large_string(texts.type) else _PAIR
    first, last = pair.unpack_from(offsets, texts.offset * pair.size // 2)
    return bytes(memoryview(data)[first:last]) if last > first else b""


def is_plain(schema: pa.Schema, spec: VectorSpec) -> bool:
    """Whether `single_row_batch` can build rows with this output schema."""
    plain = ["id", "vector", "timestamp", "token_count", "truncated"]
    return schema.names == plain and spec.output == "dense" and spec.dtype in ("float32", "float16")


def single_row_batch(
    schema: pa.Schema, spec: VectorSpec, identifier: str, timestamp_us: int, outcome: EmbeddingBatch
) -> pa.RecordBatch:
    """Output batch of one text.

    Args:
        schema: Schema of the output, for which `is_plain` is True.
        identifier: Value of the `id` column.
        timestamp_us: When the text was received, in microseconds since the epoch.
        outcome: Vector of the text, float32 [1, dims], with the dimensions and norm that the
            command asks for.
    """
    raw_id, vector = identifier.encode(), outcome.embeddings.astype(spec.dtype, copy=False)
    numbers = _array(ELEMENT_TYPES[spec.dtype], vector.tobytes(), length=vector.size)
    arrays = [
        _array(pa.utf8(), _PAIR.pack(0, len(raw_id)), raw_id),
        pa.Array.from_buffers(spec.arrow_type, 1, [None], children=[numbers]),
        _array(TIMESTAMP, _LONG.pack(timestamp_us)),
        _array(pa.int32(), _INT.pack(outcome.token_count[0])),
        _array(pa.bool_(), b"\1" if outcome.truncated[0] else b"\0"),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def vector_lists(vectors: pa.Array) -> list[Any]:
    """Vectors of a `vector` column as Python lists.

    Arrow's `to_pylist` builds a scalar for each number. That takes half a millisecond a vector.
    """
    if vectors.null_count or not pa.types.is_fixed_size_list(vectors.type):
        return list(vectors.to_pylist())
    width = vectors.type.list_size
    numbers = vectors.values.slice(vectors.offset * width, len(vectors) * width).to_numpy()
    return list(numbers.reshape(len(vectors), width).tolist())


def _array(kind: pa.DataType, *buffers: bytes, length: int = 1) -> pa.Array:
    return pa.Array.from_buffers(kind, length, [None, *map(pa.py_buffer, buffers)])
