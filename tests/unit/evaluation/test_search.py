"""Exact search in blocks finds what a sort of all scores finds."""

import numpy as np
import pytest

from fletcher.evaluation.search import Nearest, search


@pytest.mark.parametrize("k", [1, 10, 97, 200])
def test_blocks_find_what_a_stable_sort_finds(k):
    draw = np.random.default_rng(0)
    # Whole numbers: many scores are equal, and exact in every order of summing.
    queries = draw.integers(-2, 3, (23, 6)).astype(np.float32)
    documents = draw.integers(-2, 3, (97, 6)).astype(np.float32)
    expected = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]
    assert np.array_equal(search(queries, documents, k, block_shape=(7, 11)), expected)


def test_scores_of_both_signs_and_zeros_are_in_order():
    nearest = Nearest(1, 8)
    nearest.add_scores(np.array([[-0.0, 1e-38, -1e-38, 3]], np.float32))
    nearest.add_scores(np.array([[0.0, -3, 2.5, -np.inf]], np.float32))
    assert nearest.found.tolist() == [[3, 6, 1, 0, 4, 2, 5, 7]]
    expected = np.array([[3, 2.5, 1e-38, 0, 0, -1e-38, -3, -np.inf]], np.float32)
    assert np.array_equal(nearest.scores, expected)


def test_nothing_to_find():
    none = np.empty((0, 4), np.float32)
    assert search(none, np.ones((3, 4), np.float32), 2).shape == (0, 2)
    assert search(np.ones((3, 4), np.float32), none, 2).shape == (3, 0)
