from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fletcher
from fletcher.core.quantization import Ranges, VectorReader, pack_signs, quantize_rows, unpack_signs
from fletcher.core.schema import VectorSpec, output_schema, vector_columns
from fletcher.errors import ColumnTypeError, DimensionMismatchError, InvalidCommandError

MINILM = Path(__file__).parents[2] / "golden" / "minilm.parquet"


@pytest.fixture(scope="module")
def minilm() -> np.ndarray:
    """Real vectors of all-MiniLM-L6-v2: float32 [n, 384] of length 1."""
    return np.stack(pq.read_table(MINILM).column("embedding").to_numpy()).astype(np.float32)


def spec(dtype: str, dims: int = 384, ranges: Ranges | None = None) -> VectorSpec:
    return VectorSpec("m@0", dims, dtype, 6, "mean", normalized=True, ranges=ranges)


def batch(embeddings, one: VectorSpec, nulls=()) -> pa.RecordBatch:
    mask = np.zeros(len(embeddings), bool)
    mask[list(nulls)] = True
    columns = vector_columns(embeddings, one, mask)
    fields = {"id": pa.array([f"r{n}" for n in range(len(embeddings))]), **columns}
    return pa.record_batch(fields).replace_schema_metadata(one.metadata())


def cosines(one, other):
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / norms


def test_int8_by_rows_keeps_real_vectors(minilm):
    values, scale = quantize_rows(minilm)
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    assert np.abs(values.astype(int)).max(axis=1).tolist() == [127] * len(minilm)
    back = values * scale[:, None]
    assert cosines(minilm, back).min() >= 0.9998
    assert np.abs(back - minilm).max() <= scale.max() / 2 * 1.0001


def test_int8_by_rows_of_zeros_is_zeros():
    values, scale = quantize_rows(np.zeros((2, 4), np.float32))
    assert not values.any()
    assert scale.tolist() == [0, 0]


def test_int8_by_ranges_is_sentence_transformers_and_is_read_at_the_middle_of_a_step(minilm):
    lowest, highest = minilm.min(axis=0), minilm.max(axis=0)
    ranges = Ranges.between(lowest, highest)
    values = ranges.quantize(minilm)
    # https://sbert.net, quantize_embeddings: 255 steps from the least value on, minus 128.
    step = (highest - lowest) / 255
    expected = np.clip(np.floor((minilm - lowest) / step), 0, 255) - 128
    np.testing.assert_array_equal(values, expected)
    assert cosines(minilm, ranges.dequantize(values)).min() >= 0.998
    assert np.abs(ranges.dequantize(values) - minilm).max() <= step.max() / 2 * 1.001


def test_what_lies_outside_of_the_ranges_is_clipped():
    ranges = Ranges.between(np.full(2, -1, np.float32), np.ones(2, np.float32))
    far = np.array([[-9, 9]], np.float32)
    assert ranges.quantize(far).tolist() == [[-128, 127]]
    assert ranges.dequantize(ranges.quantize(far)) == pytest.approx(np.array([[-1, 1]]), abs=0.01)


def test_a_dimension_that_never_changes_is_kept():
    ranges = Ranges.between(np.zeros(2, np.float32), np.zeros(2, np.float32))
    assert ranges.dequantize(ranges.quantize(np.zeros((1, 2), np.float32))) == pytest.approx(0)


def test_signs_are_packed_with_the_first_dimension_first():
    rows = np.array([[1, -1, 0, 2, -3, 1e-9, -1e-9, 5, 1, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    packed = pack_signs(rows)
    assert packed.tolist() == [[0b10010101, 0b10000000]]
    assert unpack_signs(packed).tolist() == (np.where(rows > 0, 1, -1) / np.float32(4)).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "ubinary", "ranges"])
def test_a_reader_needs_the_schema_alone(minilm, dtype):
    ranges = Ranges.between(minilm.min(axis=0), minilm.max(axis=0)) if dtype == "ranges" else None
    one = spec("int8" if ranges else dtype, ranges=ranges)
    sent = batch(minilm, one, nulls=(3,))
    floor = {"float32": 1, "float16": 1, "int8": 0.9998, "ranges": 0.998, "ubinary": 0.6}[dtype]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, sent.schema) as writer:
        writer.write_batch(sent)
    table = pa.ipc.open_stream(sink.getvalue()).read_all()
    back = fletcher.dequantize(table)
    assert (back.dtype, back.shape) == (np.float32, minilm.shape)
    assert np.isnan(back[3]).all()
    rest = np.delete(np.arange(len(minilm)), 3)
    assert cosines(minilm[rest], back[rest]).min() >= floor - 1e-6
    np.testing.assert_array_equal(fletcher.dequantize(sent.slice(5, 4)), back[5:9])
    assert fletcher.dequantize(table.slice(0, 0)).shape == (0, 384)


def test_output_columns_and_metadata_say_how_vectors_are_read(minilm):
    by_row = output_schema(spec("int8"), id_type=pa.utf8())
    assert by_row.names[:3] == ["id", "vector", "scale"]
    assert by_row.metadata[b"fletcher.quantization"] == b"row"
    ranges = Ranges.between(minilm.min(axis=0), minilm.max(axis=0))
    by_range = output_schema(spec("int8", ranges=ranges), id_type=pa.utf8())
    assert "scale" not in by_range.names
    assert by_range.metadata[b"fletcher.quantization"] == f"ranges@{ranges.hash}".encode()
    bits = output_schema(spec("ubinary"), id_type=pa.utf8())
    assert bits.field("vector").type == pa.list_(pa.uint8(), 48)
    assert (bits.metadata[b"fletcher.dims"], bits.metadata[b"fletcher.dtype"]) == (
        b"384",
        b"ubinary",
    )
    assert [spec(name).num_bytes for name in ("float32", "int8", "ubinary")] == [1536, 388, 48]


@pytest.mark.parametrize(
    ("kind", "metadata"),
    [
        (pa.utf8(), {}),
        (pa.list_(pa.float32()), {}),
        (pa.list_(pa.int8(), 8), {}),
        (pa.list_(pa.uint8(), 8), {}),
        (pa.list_(pa.int16(), 8), {"fletcher.dtype": "int8"}),
        (pa.list_(pa.int8(), 2), {"fletcher.ranges": "{}"}),
        (pa.list_(pa.int8(), 2), {"fletcher.ranges": "[" * 9999}),
        (pa.list_(pa.int8(), 2), {"fletcher.ranges": '{"start": [0, 0], "step": [0, 1]}'}),
        (pa.list_(pa.int8(), 2), {"fletcher.ranges": '{"start": [0], "step": [1]}'}),
    ],
)
def test_vectors_of_others_are_not_guessed_at(kind, metadata):
    with pytest.raises(ColumnTypeError, match="`vector` is"):
        VectorReader.from_schema(pa.schema([("vector", kind)], metadata=metadata))


def test_int8_without_its_scale_is_refused(minilm):
    with pytest.raises(ColumnTypeError, match="`scale` is missing"):
        fletcher.dequantize(batch(minilm, spec("int8")).select(["id", "vector"]))


def test_rescoring_orders_candidates_by_the_query_in_float32(minilm):
    exact = minilm @ minilm[7]
    # Candidates in the order of their bits, as a search gives them.
    signs = unpack_signs(pack_signs(minilm))
    order = np.argsort(-(signs @ signs[7]), kind="stable")
    table = pa.table(batch(minilm, spec("int8"), nulls=(9,))).take(order)
    table = table.append_column("score", pa.array(np.zeros(len(table), np.float32)))
    best = fletcher.rescore(table, 3 * minilm[7], k=10)
    exact[9] = -np.inf
    expected = np.argsort(-exact, kind="stable")[:10]
    assert best.column("id").to_pylist() == [f"r{row}" for row in expected]
    assert best.column("score").to_numpy() == pytest.approx(exact[expected], abs=2e-3)
    assert best.schema.metadata == table.schema.metadata
    assert len(fletcher.rescore(table, minilm[7])) == len(minilm) - 1


def test_queries_that_cannot_be_rescored_with(minilm):
    rows = batch(minilm, spec("ubinary"))
    with pytest.raises(DimensionMismatchError, match="384 dimensions"):
        fletcher.rescore(rows, np.ones(48, np.float32))
    with pytest.raises(InvalidCommandError, match="zero"):
        fletcher.rescore(rows, np.zeros(384, np.float32))
