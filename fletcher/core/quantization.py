"""Quantization of vectors to int8 or bits, and their reader.

`int8` has two kinds. The schema metadata `fletcher.quantization` says which one a column has:

- `row`: symmetric, with one scale per row. `x = q * scale`, where `scale` is a column.
- `ranges@HASH`: one range per dimension, the same for all rows, from a sample of texts.
  `x = start + (q + 128.5) * step`; the schema metadata `fletcher.ranges` holds `start` and `step`
  as JSON. Values are quantized as by sentence-transformers' `quantize_embeddings`, and read back as
  the middle of their step.

`ubinary` keeps the signs: bit 1 for `x > 0`, with the first dimension in the highest bit of the
first byte (`numpy.packbits`). Bits are read back as +1 or -1, and the vector is scaled to length 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.errors import ColumnTypeError

FloatArray = npt.NDArray[np.float32]

QUANTIZATION = "fletcher.quantization"
RANGES = "fletcher.ranges"
ROW = "row"
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """One range of values per dimension, divided into 256 steps."""

    start: FloatArray  # [dims], lower end of each range
    step: FloatArray  # [dims], width of a step, above 0

    @classmethod
    def between(cls, lowest: FloatArray, highest: FloatArray) -> Ranges:
        """Ranges between the least and greatest value per dimension, both float32 [dims]."""
        step = np.maximum((highest - lowest) / np.float32(255), _TINY)
        return cls(lowest.astype(np.float32), step.astype(np.float32))

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of `start` and `step`."""
        return hashlib.sha256(self.start.tobytes() + self.step.tobytes()).hexdigest()[:12]

    def quantize(self, embeddings: FloatArray) -> npt.NDArray[np.int8]:
        """Quantized vectors, int8 [n, dims]; values outside the ranges are clipped."""
        steps = np.floor((embeddings - self.start) / self.step)
        return np.asarray(np.clip(steps, 0, 255) - 128, np.int8)

    def dequantize(self, values: npt.NDArray[np.int8]) -> FloatArray:
        """Vectors read back, float32 [n, dims]: the middle of each value's step."""
        return np.asarray(self.start + (values + np.float32(128.5)) * self.step, np.float32)

    def metadata(self) -> dict[str, str]:
        """Schema metadata from which `VectorReader` restores these ranges."""
        return {QUANTIZATION: f"ranges@{self.hash}", RANGES: json.dumps(self.to_json())}

    def to_json(self) -> dict[str, list[float]]:
        """`start` and `step` as lists, from which `from_json` restores the exact float32."""
        return {"start": self.start.tolist(), "step": self.step.tolist()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Ranges:
        """Ranges from the result of `to_json`. Raises ValueError for any other object."""
        try:
            start, step = (np.asarray(fields[name], np.float32) for name in ("start", "step"))
        except (KeyError, TypeError) as error:
            raise ValueError("no `start` and `step`") from error
        if start.ndim != 1 or start.shape != step.shape or not (step > 0).all():
            raise ValueError("`start` and `step` are not ranges")
        return cls(start, step)


def quantize_rows(embeddings: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Quantize each row with one scale, so that `x = q * scale`.

    Returns two arrays: the values, int8 [n, dims] from -127 to 127, and the scales, float32 [n].
    Rows of zeros have the scale 0.
    """
    scale = np.abs(embeddings).max(axis=1, initial=0).astype(np.float32) / np.float32(127)
    values = np.rint(embeddings / np.maximum(scale, _TINY)[:, None])
    return np.asarray(values, np.int8), scale


def pack_signs(embeddings: FloatArray) -> npt.NDArray[np.uint8]:
    """Signs as uint8 [n, dims / 8]: one bit per dimension, 1 for a value above 0."""
    return np.packbits(embeddings > 0, axis=-1)


def unpack_signs(values: npt.NDArray[np.uint8]) -> FloatArray:
    """Vectors of length 1 from the result of `pack_signs`, float32 [n, 8 * bytes]."""
    bits = np.unpackbits(values, axis=-1).astype(np.float32)
    return np.asarray((2 * bits - 1) / np.sqrt(np.float32(bits.shape[-1])), np.float32)


@dataclass(frozen=True, slots=True)
class VectorReader:
    """Reader that turns a stored column `vector` into float32 vectors."""

    dtype: str  # `float32`, `float16`, `int8` or `ubinary`
    dims: int
    scaled: bool  # whether each vector must be multiplied by the row's `scale`
    _read: Callable[[npt.NDArray[Any]], FloatArray]

    @classmethod
    def from_schema(cls, schema: pa.Schema) -> VectorReader:
        """A reader for the column `vector`.

        Raises:
            ColumnTypeError: The column is missing, has a type that Fletcher does not write, or
                lacks the metadata that says how to read its type.
        """
        kind = schema.field("vector").type if "vector" in schema.names else pa.null()
        said = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if not pa.types.is_fixed_size_list(kind):
            raise _unreadable(kind)
        width, item = kind.list_size, kind.value_type
        if pa.types.is_floating(item):
            dtype = {pa.float16(): "float16", pa.float32(): "float32"}.get(item, str(item))
            return cls(dtype, width, False, _floats)
        if item == pa.uint8() and said.get("fletcher.dtype") == "ubinary":
            return cls("ubinary", width * 8, False, unpack_signs)
        quantization = said.get(QUANTIZATION, "")
        if item == pa.int8() and quantization == ROW:
            return cls("int8", width, True, _floats)
        if item == pa.int8() and RANGES in said:
            try:
                ranges = Ranges.from_json(json.loads(said[RANGES]))
            except (ValueError, RecursionError):
                raise _unreadable(kind) from None
            if len(ranges.start) != width:
                raise _unreadable(kind)
            return cls("int8", width, False, ranges.dequantize)
        raise _unreadable(kind)

    def raw(self, column: pa.Array) -> npt.NDArray[Any]:
        """Values as stored, [num_rows, width]; null rows hold arbitrary values."""
        # Keeps null rows, which `flatten` drops, and respects slices, which `values` ignores.
        width = column.type.list_size
        values = column.values.slice(column.offset * width, len(column) * width)
        if values.null_count:  # null rows from Parquet; with nulls, NumPy would convert to float
            values = values.fill_null(0)
        return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(-1, width)

    def directions(self, column: pa.Array) -> FloatArray:
        """Vectors not multiplied by their scales, float32 [num_rows, dims]."""
        return self._read(self.raw(column))

    def vectors(self, batch: pa.RecordBatch) -> FloatArray:
        """Vectors as float32 [num_rows, dims]; a null vector becomes NaN.

        Raises:
            ColumnTypeError: The column `scale` is missing.
        """
        column = batch.column("vector")
        out = self.directions(column)
        if self.scaled:
            if "scale" not in batch.schema.names:
                raise ColumnTypeError(
                    "`scale` is missing: int8 vectors are multiples of it; read that column too",
                    field="scale",
                )
            out *= batch.column("scale").to_numpy(zero_copy_only=False)[:, None]
        if column.null_count:
            out[np.asarray(column.is_null())] = np.nan
        return out


def _floats(values: npt.NDArray[Any]) -> FloatArray:
    return values.astype(np.float32)


def _unreadable(kind: pa.DataType) -> ColumnTypeError:
    return ColumnTypeError(
        f"`vector` is {kind}, expected a fixed size list of float32 or float16, or of int8 or "
        "uint8 with the schema metadata that Fletcher writes",
        field="vector",
    )
