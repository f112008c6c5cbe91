import numpy as np
import pytest

from fletcher.vectors.pooling import normalize, pool

MASK = np.array([[True, True, False], [True, True, True]])


@pytest.fixture
def token_embeddings():
    values = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    values[0, 2] = np.nan  # padding: must not be looked at
    return values


def test_mean_leaves_padding_out(token_embeddings):
    assert pool(token_embeddings, MASK, "mean").tolist() == [[1, 2], [8, 9]]


def test_cls_is_the_first_token(token_embeddings):
    assert pool(token_embeddings, MASK, "cls").tolist() == [[0, 1], [6, 7]]


def test_last_token_is_the_last_before_padding(token_embeddings):
    assert pool(token_embeddings, MASK, "last_token").tolist() == [[2, 3], [10, 11]]


def test_another_pooling_is_refused(token_embeddings):
    with pytest.raises(ValueError, match="`pooling` is 'median'"):
        pool(token_embeddings, MASK, "median")


def test_rows_are_scaled_to_length_one_and_zeros_stay():
    unit, norms = normalize(np.array([[3, 4], [0, 0]], dtype=np.float32))
    assert np.allclose(unit, [[0.6, 0.8], [0, 0]], atol=1e-7)
    assert norms.tolist() == [5, 0]
    assert unit.dtype == norms.dtype == np.float32
