"""Checks of received vectors, so that one row cannot make a dataset unsearchable."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.similarity import OUTPUT, Similarity
from fletcher.errors import ColumnTypeError, RequestError


def check_vectors(batch: pa.RecordBatch) -> None:
    """Refuse vectors that a search cannot compare.

    Lists of a fixed size need no metadata, as in Longbow. Sparse and token vectors need the schema
    metadata that Fletcher writes. LanceDB checks dense vectors for NaN.

    Raises:
        ColumnTypeError: `vector` has another type than the metadata says.
        RequestError: A sparse or token vector holds a null, NaN, infinity or an unknown dimension.
    """
    column = batch.column("vector")
    output = (batch.schema.metadata or {}).get(OUTPUT.encode(), b"dense")
    if output == b"dense":
        if not pa.types.is_fixed_size_list(column.type):
            raise ColumnTypeError(
                f"`vector` is {column.type}, expected a fixed size list of numbers, or other lists "
                f"with `{OUTPUT}` in the schema metadata",
                field="vector",
            )
        return
    similarity = Similarity.from_schema(batch.schema)
    items = column.flatten()
    bad = np.asarray(items.is_null())
    if similarity.output == "sparse":
        index, values = (items.field(name) for name in ("index", "value"))
        places = index.fill_null(-1).to_numpy(zero_copy_only=False)
        bad = bad | (places < 0) | (places >= similarity.dims) | ~_finite(values)
    else:
        width = items.type.list_size
        numbers = items.values.slice(items.offset * width, len(items) * width)
        bad = bad | ~_finite(numbers).reshape(-1, width).all(axis=1)
    lengths = _lengths(column)
    if bad.any():
        row = int(np.searchsorted(np.cumsum(lengths), int(bad.argmax()), side="right"))
        outside = f", or a dimension outside 0 to {similarity.dims - 1}"
        what = "a null, NaN or infinity" + outside * (similarity.output == "sparse")
        raise _refused(row, what)
    if similarity.reader is not None and similarity.reader.scaled:
        _check_scales(batch, lengths)


def _check_scales(batch: pa.RecordBatch, lengths: npt.NDArray[Any]) -> None:
    if "scale" not in batch.schema.names:
        raise ColumnTypeError("`scale` is missing, which int8 vectors need", field="scale")
    scale = batch.column("scale")
    if scale.type != pa.list_(pa.float32()):
        raise ColumnTypeError(f"`scale` is {scale.type}, expected lists of float32", field="scale")
    wrong = np.flatnonzero(_lengths(scale) != lengths)
    if len(wrong):
        raise _refused(int(wrong[0]), "another number of vectors than `scale` has numbers")
    if not _finite(scale.flatten()).all():
        raise RequestError("`scale` holds a null, NaN or infinity", field="scale")


def _finite(values: pa.Array) -> npt.NDArray[np.bool_]:
    """Whether each number is there and finite."""
    if not pa.types.is_floating(values.type):
        return np.asarray(values.is_valid())
    # A null becomes NaN.
    return np.asarray(np.isfinite(values.to_numpy(zero_copy_only=False)), np.bool_)


def _lengths(column: pa.Array) -> npt.NDArray[Any]:
    """Number of items of each list; 0 for null."""
    return np.asarray(column.value_lengths().fill_null(0))


def _refused(row: int, what: str) -> RequestError:
    return RequestError(
        f"row {row} of a batch has {what} in `vector`; send null for a row without a vector",
        field="vector",
    )
