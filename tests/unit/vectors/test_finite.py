"""Vectors that cannot be stored are found row by row, whatever their form."""

from __future__ import annotations

import numpy as np
import pytest

from fletcher.core.batches import EmbeddingBatch
from fletcher.vectors.finite import not_finite, refuse_not_finite, rows_not_finite
from fletcher.vectors.pooling import finish, normalize
from fletcher.vectors.ragged import sparse

BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bad", BAD)
def test_rows_with_nan_or_infinity_are_found(bad: float, dtype: type) -> None:
    values = np.ones((5, 8), dtype)
    assert not_finite(values) is None
    values[3, 7] = bad
    found = not_finite(values)
    assert found is not None
    assert found.tolist() == [False, False, False, True, False]
    assert not_finite(values[:, :7]) is None
    assert not_finite(values[:0]) is None


def test_what_float16_cannot_hold_is_found_before_it_is_converted() -> None:
    values = np.array([[65_519.0], [-65_519.0], [65_520.0], [-1e30], [1e-30]], np.float32)
    assert np.isfinite(values[:2].astype(np.float16)).all()
    found = not_finite(values, "float16")
    assert found is not None
    assert found.tolist() == [False, False, True, True, False]
    assert not_finite(values, "float32") is None
    assert not_finite(values, "int8") is None


def test_a_row_fails_for_any_of_its_vectors_or_its_norm() -> None:
    vectors = np.ones((6, 2), np.float32)
    vectors[4, 0] = np.nan
    counts = np.array([2, 0, 3, 1], np.int32)
    assert rows_not_finite(vectors, None, counts) == [2]
    assert rows_not_finite(vectors, None, None) == [4]
    norms = np.array([1, np.inf, 1, 1, 1, 1], np.float32)
    assert rows_not_finite(vectors, norms, None) == [1, 4]


def test_other_rows_and_earlier_errors_stay_as_they_are() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    vectors[1, 2] = np.inf
    batch = EmbeddingBatch.zeros(4, 3)
    batch = EmbeddingBatch(vectors, None, batch.token_count, batch.truncated)
    found = refuse_not_finite(batch, "float32")
    assert {row: error.code for row, error in found.errors.items()} == {1: "not_finite"}
    assert found.embeddings[1].tolist() == [0, 0, 0]
    assert np.array_equal(found.embeddings[[0, 2, 3]], vectors[[0, 2, 3]])
    assert refuse_not_finite(EmbeddingBatch.zeros(4, 3), "float16").errors == {}


def test_dimensions_of_sparse_vectors_may_exceed_float16() -> None:
    pairs = np.array([[250_000, 0.5], [7, 70_000]], np.float32)
    zeros = EmbeddingBatch.zeros(2, 2)
    counts = np.ones(2, np.int32)
    batch = EmbeddingBatch(pairs, None, zeros.token_count, zeros.truncated, counts=counts)
    assert list(refuse_not_finite(batch, "float16", first_column=1).errors) == [1]
    assert refuse_not_finite(batch, "float32", first_column=1).errors == {}


def test_nan_is_no_missing_weight_of_a_sparse_vector() -> None:
    pairs, counts = sparse(np.array([[0, np.nan, 1], [0, 2, -1]], np.float32))
    assert counts.tolist() == [2, 1]
    assert rows_not_finite(pairs, None, counts) == [0]


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e18, 1e25])
def test_vectors_of_any_size_get_length_one(size: float) -> None:
    vectors = np.array([[3, 4, 0], [0, 0, 0]], np.float32) * np.float32(size)
    for dims in (2, 3):
        made = finish(vectors, None, dims=dims, normalized=True)
        assert np.allclose(made, [[0.6, 0.8, 0][:dims], [0, 0, 0][:dims]], atol=1e-6)


def test_a_norm_beyond_float32_does_not_become_a_vector_of_zeros_without_a_word() -> None:
    made, norms = normalize(np.full((2, 4), 3e38, np.float32))
    assert rows_not_finite(made, norms, None) == [0, 1]
    raw = finish(
        np.full((1, 4), 0.5, np.float32), np.array([3e38], np.float32), dims=4, normalized=False
    )
    assert refuse_not_finite(
        EmbeddingBatch(raw, None, np.ones(1, np.int32), np.zeros(1, np.bool_)), "float16"
    ).errors
