"""Rows of several vectors, gather_rows and scatter_rows, against plain lists."""

import numpy as np

from fletcher.vectors.ragged import gather_rows, scatter_rows, sparse

ROWS = [[1, 2], [], [3], [4, 5, 6]]
COUNTS = np.array([len(row) for row in ROWS], np.int32)
VECTORS = np.array([[value, -value] for row in ROWS for value in row], np.float32)


def lists(vectors, counts):
    assert np.array_equal(vectors[:, 1], -vectors[:, 0])
    return [part[:, 0].tolist() for part in np.split(vectors, np.cumsum(counts)[:-1])]


def test_rows_are_gathered_in_any_order_and_twice():
    for rows in ([3, 0, 0, 1, 2], [1], [0, 1, 2, 3]):
        found = gather_rows(VECTORS, COUNTS, np.array(rows))
        assert lists(*found) == [ROWS[row] for row in rows]
    vectors, counts = gather_rows(VECTORS, COUNTS, np.zeros(0, np.int64))
    assert vectors.shape == (0, 2)
    assert len(counts) == 0


def test_parts_come_together_in_the_rows_order():
    parts = []
    for rows in ([3, 1], [0]):
        own = np.array(rows)
        parts.append((own, *gather_rows(VECTORS, COUNTS, own)))
    assert lists(*scatter_rows(5, 2, parts)) == [[1, 2], [], [], [4, 5, 6], []]
    vectors, counts = scatter_rows(2, 7, [])
    assert vectors.shape == (0, 7)
    assert counts.tolist() == [0, 0]


def test_sparse_keeps_what_is_above_zero_by_its_place():
    dense = np.array([[0, 0.5, 0, 2], [0, 0, 0, 0], [-1, 0, 3, 0]], np.float32)
    pairs, counts = sparse(dense)
    assert counts.tolist() == [2, 0, 1]
    assert pairs.tolist() == [[1, 0.5], [3, 2], [2, 3]]
