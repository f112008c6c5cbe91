"""Exact search in blocks finds what a sort of all scores finds."""

import numpy as np
import pyarrow as pa
import pytest

from fletcher.core.schema import VectorSpec, vector_columns
from fletcher.core.similarity import Similarity
from fletcher.evaluation.search import Nearest, search
from fletcher.evaluation.vectors import Embedded


def embedded(rows):
    """Vectors of a model that was trained for the dot product."""
    spec = VectorSpec("m@0", rows.shape[1], "float32", 1, "mean", False, similarity="dot")
    batch = pa.record_batch(vector_columns(rows, spec, None))
    batch = batch.replace_schema_metadata(spec.metadata())
    return Embedded(batch, Similarity.from_schema(batch.schema), 0, None)


@pytest.mark.parametrize("k", [1, 10, 97, 200])
def test_blocks_find_what_a_stable_sort_finds(k, monkeypatch):
    draw = np.random.default_rng(0)
    # Whole numbers: many scores are equal, and exact in every order of summing.
    queries = draw.integers(-2, 3, (300, 6)).astype(np.float32)
    documents = draw.integers(-2, 3, (97, 6)).astype(np.float32)
    expected = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]
    monkeypatch.setattr("fletcher.evaluation.search._DOCUMENTS", {"dense": 11})
    assert np.array_equal(search(embedded(queries), embedded(documents), k), expected)


def test_scores_of_both_signs_and_zeros_are_in_order():
    nearest = Nearest(1, 8)
    nearest.add_scores(np.array([[-0.0, 1e-38, -1e-38, 3]], np.float32))
    nearest.add_scores(np.array([[0.0, -3, 2.5, -np.inf]], np.float32))
    assert nearest.found.tolist() == [[3, 6, 1, 0, 4, 2, 5, 7]]
    expected = np.array([[3, 2.5, 1e-38, 0, 0, -1e-38, -3, -np.inf]], np.float32)
    assert np.array_equal(nearest.scores, expected)
