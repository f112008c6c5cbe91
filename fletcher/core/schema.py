"""Output columns and their schema metadata (docs/wire.md, Output)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.chunking import Chunking
from fletcher.core.quantization import QUANTIZATION, ROW, Ranges, pack_signs, quantize_rows
from fletcher.core.similarity import OUTPUT, SIMILARITY
from fletcher.errors import InvalidCommandError

ELEMENT_TYPES: dict[str, pa.DataType] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "ubinary": pa.uint8(),
}
# Element types of each kind of vectors, see VectorSpec.
DTYPES = {
    "dense": tuple(ELEMENT_TYPES),
    "sparse": ("float32", "float16"),
    "multi": ("float32", "float16", "int8"),
}
SPARSE_WIDTH = 2  # a dimension and its weight: `fletcher.vectors.ragged`
# Microseconds: pandas, Polars and DuckDB narrow or refuse nanoseconds with a zone.
TIMESTAMP = pa.timestamp("us", tz="UTC")
# Extra columns of rows that are chunks: the chunk's index in its text, the first character of its
# range of the text, and the character after its range.
CHUNK_FIELDS = (
    pa.field("chunk_index", pa.int32()),
    pa.field("chunk_start", pa.int64()),
    pa.field("chunk_end", pa.int64()),
)


_BATCH_KEY = re.compile(r"(.+):(\d+)-(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """Description of the vectors in one stream. It must never change within a dataset."""

    model: str  # `name@hash`
    dims: int
    dtype: str  # a key of ELEMENT_TYPES
    layers: int  # layer from which vectors are taken
    pooling: str  # `cls`, `mean` or `last_token`
    normalized: bool  # the L2 norm is 1
    ranges: Ranges | None = None  # for int8; None: int8 vectors have one scale each
    output: str = "dense"  # or `sparse` or `multi`, as in ModelBundle
    max_vectors: int = 1  # most vectors of one row
    chunking: Chunking | None = None  # None: texts are not cut
    similarity: str = "cosine"  # one of `core.similarity.SIMILARITIES`
    prompt: str = ""  # text in front of each text

    @property
    def arrow_type(self) -> pa.DataType:
        """Arrow type of the column `vector`.

        `dense`: FixedSizeList<dtype>[dims], for `ubinary` FixedSizeList<uint8>[dims / 8]. `multi`:
        a List of the type for `dense`. `sparse`: List<Struct<index: int32, value: dtype>> by
        ascending index.
        """
        return _vector_type(self.output, self.dtype, self.dims)

    @property
    def scale_type(self) -> pa.DataType:
        """Type of the column `scale`: float32, or a list of float32 for `multi`."""
        return pa.list_(pa.float32()) if self.output == "multi" else pa.float32()

    @property
    def width(self) -> int:
        """Count of numbers in each vector inside the pipeline."""
        return SPARSE_WIDTH if self.output == "sparse" else self.dims

    @property
    def scaled(self) -> bool:
        """Whether each vector has a `scale`."""
        return self.dtype == "int8" and self.ranges is None

    @property
    def num_bytes(self) -> int:
        """Maximum size of one row's vectors, in bytes."""
        bits: int = ELEMENT_TYPES[self.dtype].bit_width
        if self.output == "sparse":
            return self.max_vectors * (4 + bits // 8)
        width = self.dims // 8 if self.dtype == "ubinary" else self.dims
        return self.max_vectors * (width * bits // 8 + 4 * self.scaled)

    def metadata(self) -> dict[str, str]:
        """Schema metadata that lets a reader use the vectors without asking the server."""
        fields = {
            "fletcher.model": self.model,
            "fletcher.dims": str(self.dims),
            "fletcher.layers": str(self.layers),
            "fletcher.pooling": self.pooling,
            "fletcher.normalized": "true" if self.normalized else "false",
            "fletcher.dtype": self.dtype,
            "longbow.vector_type": self.dtype,
            SIMILARITY: self.similarity,
            "fletcher.prompt": self.prompt,
            "fletcher.chunking": "none" if self.chunking is None else str(self.chunking),
        }
        if self.dtype == "int8":
            fields |= self.ranges.metadata() if self.ranges else {QUANTIZATION: ROW}
        if self.output != "dense":
            fields[OUTPUT] = self.output
        return fields


@functools.lru_cache
def _vector_type(output: str, dtype: str, dims: int) -> pa.DataType:
    item = ELEMENT_TYPES[dtype]
    if output == "sparse":
        return pa.list_(pa.struct([("index", pa.int32()), ("value", item)]))
    one = pa.list_(pa.field("item", item), dims // 8 if dtype == "ubinary" else dims)
    return pa.list_(one) if output == "multi" else one


def output_schema(
    spec: VectorSpec,
    *,
    id_type: pa.DataType,
    carried: Sequence[pa.Field] = (),
    text: bool = False,
    metadata_column: bool = False,
    batch_key: bool = False,
) -> pa.Schema:
    """The schema of a stream's output.

    The columns in order, optional ones in brackets: id, vector, [scale], timestamp, token_count,
    truncated, [chunk_index, chunk_start, chunk_end], [text], [metadata], carried..., [batch_key].

    Raises:
        InvalidCommandError: A carried column has the name of an output column of Fletcher.
    """
    fields = [
        pa.field("id", id_type),
        pa.field("vector", spec.arrow_type),
        *([pa.field("scale", spec.scale_type)] * spec.scaled),
        pa.field("timestamp", TIMESTAMP),
        pa.field("token_count", pa.int32()),
        pa.field("truncated", pa.bool_()),
        *(CHUNK_FIELDS if spec.chunking is not None and spec.chunking.rows else ()),
        *([pa.field("text", pa.utf8())] * text),
        *([pa.field("metadata", pa.utf8())] * metadata_column),
    ]
    names = {one.name for one in fields} | {"batch_key", "scale", "score", "text", "metadata"}
    for column in carried:
        if column.name in names:
            raise InvalidCommandError(
                f"`columns` asks for `{column.name}`, which is the name of an output column; "
                "rename it in the input",
                field="columns",
            )
        fields.append(column)
    if batch_key:
        fields.append(pa.field("batch_key", pa.utf8()))
    return pa.schema(fields, metadata=spec.metadata())


def vector_columns(
    embeddings: npt.NDArray[np.float32 | np.float16],
    spec: VectorSpec,
    null_rows: npt.NDArray[np.bool_] | None,
    counts: npt.NDArray[np.int32] | None = None,
) -> dict[str, pa.Array]:
    """The columns `vector`, and `scale` if the spec has scales, from arrays.

    Args:
        embeddings: float32 [num_rows, dims], or with `counts` [num_vectors, width]. The type may be
            float16 if that is the dtype of the output.
        spec: Description of the vectors, which determines the columns' types.
        null_rows: bool [num_rows], True for rows without a vector; None: every row has one.
        counts: int32 [num_rows], number of vectors of each row, 0 for null rows. None: one vector
            per row if the spec is `dense`, else no vectors at all.
    """
    if spec.output != "dense":
        return _list_columns(embeddings, spec, null_rows, counts)
    mask = _null_mask(null_rows)
    columns = {}
    values: npt.NDArray[Any]
    if spec.dtype in ("float32", "float16"):
        values = np.ascontiguousarray(embeddings, dtype=np.dtype(spec.dtype))
    else:
        exact = np.asarray(embeddings, np.float32)
        if spec.dtype == "ubinary":
            values = pack_signs(exact)
        elif spec.ranges is not None:
            values = spec.ranges.quantize(exact)
        else:
            values, scale = quantize_rows(exact)
            columns["scale"] = pa.array(scale, mask=null_rows)
    flat = column(values.reshape(-1), ELEMENT_TYPES[spec.dtype])
    kind = spec.arrow_type
    if mask is None:
        vector = pa.Array.from_buffers(kind, len(embeddings), [None], children=[flat])
    else:
        vector = pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=mask)
    return {"vector": vector, **columns}


def _null_mask(null_rows: npt.NDArray[np.bool_] | None) -> pa.Array | None:
    return pa.array(null_rows) if null_rows is not None and null_rows.any() else None


def column(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array of type `kind` without nulls that shares the memory of `values`.

    `pa.array` does the same, but for a few rows it takes several times as long.
    """
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _list_columns(
    vectors: npt.NDArray[np.float32 | np.float16],
    spec: VectorSpec,
    null_rows: npt.NDArray[np.bool_] | None,
    counts: npt.NDArray[np.int32] | None,
) -> dict[str, pa.Array]:
    """The result of `vector_columns` for rows that may have several vectors."""
    if counts is None:
        vectors, counts = vectors[:0], np.zeros(len(vectors), np.int32)
    offsets = pa.array(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))
    mask = _null_mask(null_rows)
    if spec.output == "sparse":
        index = pa.array(vectors[:, 0].astype(np.int32))
        value = pa.array(np.ascontiguousarray(vectors[:, 1], np.dtype(spec.dtype)))
        items = {"vector": pa.StructArray.from_arrays([index, value], ["index", "value"])}
    else:
        one = dataclasses.replace(spec, output="dense")
        items = vector_columns(vectors, one, None)
    types = {"vector": spec.arrow_type, "scale": spec.scale_type}
    return {
        name: pa.ListArray.from_arrays(offsets, array, type=types[name], mask=mask)
        for name, array in items.items()
    }


def batch_key(upload_id: str, first: int, last: int) -> str:
    """Group key of the rows from `first` to `last`, both included."""
    return f"{upload_id}:{first}-{last}"


def row_keys(upload_id: str, offsets: npt.NDArray[np.int64]) -> pa.Array:
    """Keys of rows of one upload, one key for each run of consecutive offsets.

    Each key names exactly the rows that have it. `offsets`: sorted, at least one.
    """
    breaks = np.flatnonzero(np.diff(offsets) != 1) + 1
    starts, ends = np.append(0, breaks), np.append(breaks, len(offsets))
    keys = [
        batch_key(upload_id, int(offsets[start]), int(offsets[end - 1]))
        for start, end in zip(starts, ends, strict=True)
    ]
    return pa.array(keys, pa.utf8()).take(pa.array(np.repeat(np.arange(len(keys)), ends - starts)))


def parse_batch_key(key: str) -> tuple[str, int, int] | None:
    """Split a batch key into (upload_id, first, last); None if it has another form."""
    match = _BATCH_KEY.fullmatch(key)
    if match is None or int(match[2]) > int(match[3]):
        return None
    return match[1], int(match[2]), int(match[3])
