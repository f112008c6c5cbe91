"""Rows in the form that delivery gives them, for tests of stores."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fletcher.core.schema import TIMESTAMP, VectorSpec, output_schema, vector_columns


def spec(dims: int = 8, dtype: str = "float16", model: str = "mini@abc") -> VectorSpec:
    return VectorSpec(
        model=model, dims=dims, dtype=dtype, layers=6, pooling="mean", normalized=True
    )


def schema(
    dims: int = 8,
    dtype: str = "float16",
    model: str = "mini@abc",
    id_type: pa.DataType | None = None,
) -> pa.Schema:
    return output_schema(
        spec(dims, dtype, model), id_type=id_type or pa.utf8(), text=True, batch_key=True
    )


def vectors(first: int, count: int, dims: int = 8) -> np.ndarray:
    """Unit vectors that depend only on the row's number."""
    rows = [np.random.default_rng(row).standard_normal(dims) for row in range(first, first + count)]
    out = np.asarray(rows, np.float32).reshape(count, dims)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def list_batch(first: int, count: int, output: str, dtype: str) -> pa.RecordBatch:
    """A group of rows of several vectors each; every seventh row has no vector."""
    draw = np.random.default_rng(first)
    counts = draw.integers(1, 9, count).astype(np.int32)
    nulls = np.arange(count) % 7 == 6
    counts[nulls] = 0
    dims = 30_000 if output == "sparse" else 8
    own = VectorSpec("m@0", dims, dtype, 2, "none", normalized=True, output=output, max_vectors=9)
    values = draw.random((int(counts.sum()), own.width)).astype(np.float32)
    if output == "sparse":
        values[:, 0] = draw.integers(0, 30_000, len(values))
    plain = batch(first, count)
    columns = {name: plain.column(name) for name in plain.schema.names if name != "vector"}
    columns |= vector_columns(values, own, nulls, counts)
    names = output_schema(own, id_type=pa.utf8(), text=True, batch_key=True)
    return pa.RecordBatch.from_arrays([columns[name] for name in names.names], schema=names)


def batch(
    first: int,
    count: int,
    *,
    dims: int = 8,
    dtype: str = "float16",
    model: str = "mini@abc",
    upload: str = "u",
    key: str | None = None,
    null_rows: tuple[int, ...] = (),
    ids: list[str] | None = None,
    text: str = "text",
) -> pa.RecordBatch:
    nulls = np.zeros(count, bool)
    nulls[list(null_rows)] = True
    numbers = range(first, first + count)
    return pa.record_batch(
        [
            pa.array(ids or [f"id{row}" for row in numbers]),
            *vector_columns(vectors(first, count, dims), spec(dims, dtype, model), nulls).values(),
            pa.array([1_700_000_000_000_000 + row for row in numbers], TIMESTAMP),
            pa.array([3] * count, pa.int32()),
            pa.array([False] * count),
            pa.array([f"{text} {row}" for row in numbers]),
            pa.array([key or f"{upload}:{first}-{first + count - 1}"] * count),
        ],
        schema=schema(dims, dtype, model),
    )
