import numpy as np

from fletcher.core.batches import MicroBatch
from fletcher.inference.backend import BackendConfig
from fletcher.inference.null import load


def run(rows, dim=64):
    backend = load(BackendConfig("null", "cpu", "", dim=dim))
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return backend.run(MicroBatch(ids, lengths))


def test_vectors_are_unit_length_and_float32():
    result = run([[101, 5, 102], [101, 102]])
    assert result.embeddings.shape == (2, 64)
    assert result.embeddings.dtype == np.float32
    assert np.allclose(np.linalg.norm(result.embeddings, axis=1), 1, atol=1e-6)
    assert np.array_equal(result.norms, np.ones(2, dtype=np.float32))


def test_a_row_has_the_same_vector_in_any_batch():
    alone = run([[101, 7, 8, 102]]).embeddings[0]
    together = run([[101, 102], [101, 7, 8, 102], [1]]).embeddings[1]
    assert np.array_equal(alone, together)


def test_other_tokens_and_another_order_give_another_vector():
    first, second, third = run([[1, 2, 3], [1, 3, 2], [1, 2, 4]]).embeddings
    for one, other in [(first, second), (first, third), (second, third)]:
        assert abs(one @ other) < 0.6


def test_an_empty_batch_gives_no_vectors():
    assert run([]).embeddings.shape == (0, 64)


def test_without_a_dim_vectors_are_as_wide_as_the_default_model():
    assert run([[1]], dim=0).embeddings.shape == (1, 384)
