"""Columns of one row, built from bytes, are those that Arrow builds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from fletcher.core.batches import EmbeddingBatch
from fletcher.core.schema import TIMESTAMP, VectorSpec, output_schema
from fletcher.pipeline.interactive.single_row import (
    is_plain,
    single_row_batch,
    single_text,
    vector_lists,
)


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8()])
def test_the_text_of_a_slice_of_one(kind: pa.DataType) -> None:
    texts = pa.array(["before", "wörter", "", "behind"], kind)
    assert single_text(texts.slice(1, 1)) == "wörter".encode()
    assert single_text(texts.slice(2, 1)) == b""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_row_of_output(dtype: str) -> None:
    spec = VectorSpec("m@1", 3, dtype, layers=2, pooling="mean", normalized=True)
    schema = output_schema(spec, id_type=pa.utf8())
    assert is_plain(schema, spec)
    vector = np.array([[0.1, -0.2, 0.3]], np.float32)
    outcome = EmbeddingBatch(vector, None, np.array([7], np.int32), np.ones(1, np.bool_))
    batch = single_row_batch(schema, spec, "u:5", 1_700_000_000_000_000, outcome)
    batch.validate(full=True)
    assert batch.column("vector")[0].as_py() == vector.astype(dtype)[0].tolist()
    row = {name: batch.column(name)[0] for name in ("id", "timestamp", "token_count", "truncated")}
    assert row["timestamp"] == pa.scalar(1_700_000_000_000_000, pa.int64()).cast(TIMESTAMP)
    assert [row[name].as_py() for name in ("id", "token_count", "truncated")] == ["u:5", 7, True]


@pytest.mark.parametrize(
    "vectors",
    [
        pa.array([[1, 2], [3, 4]], pa.list_(pa.float16(), 2)),
        pa.array([[1, 2], None], pa.list_(pa.float32(), 2)),
        pa.array([[[1, 2], [3, 4]], []], pa.list_(pa.list_(pa.int8(), 2))),
        pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)).slice(1),
    ],
)
def test_vectors_as_lists_are_those_of_to_pylist(vectors: pa.Array) -> None:
    assert vector_lists(vectors) == vectors.to_pylist()
