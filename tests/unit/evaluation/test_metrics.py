"""Each metric against values worked out by hand, or by a loop that cannot be misread."""

import math

import numpy as np
import pytest

from fletcher.evaluation import metrics


def vectors(*rows):
    return np.array(rows, np.float32)


def test_unit_scales_rows_and_leaves_zeros():
    assert metrics.unit(vectors([3, 4], [0, 0], [0, -2])).tolist() == pytest.approx(
        np.array([[0.6, 0.8], [0, 0], [0, -1]])
    )


def test_cosines_row_by_row():
    ours = vectors([1, 0], [1, 1], [0, 0], [-2, 0])
    theirs = vectors([2, 0], [1, 0], [1, 0], [1, 0])
    assert metrics.cosines(ours, theirs) == pytest.approx([1, math.sqrt(0.5), 0, -1])


def test_cosines_of_texts_with_several_vectors_are_their_mean():
    one, other = vectors([1, 0], [0, 1]), vectors([1, 0], [1, 0], [5, 5])
    ours = [one, one, vectors([1, 1])[0], vectors([0, 0])[0]]
    theirs = [one, other, vectors([1, 0])[0], vectors([0, 0])[0]]
    # The third vector of the second text has no counterpart.
    assert metrics.text_cosines(ours, theirs) == pytest.approx([1, 1 / 3, math.sqrt(0.5), 1])
    assert metrics.text_cosines([], []).shape == (0,)
    with pytest.raises(ValueError, match="zip"):
        metrics.text_cosines(ours, [])


def test_cosines_of_fewer_dims_take_the_rest_for_zeros():
    # (3, 4, 0) and (3, 4, 12): 25 / (5 * 13)
    assert metrics.cosines(vectors([3, 4]), vectors([3, 4, 12])) == pytest.approx([25 / 65])


def test_cosines_do_not_lose_digits_of_float32():
    row = np.full((1, 1000), 0.1, np.float32)
    assert metrics.cosines(row, row)[0] == pytest.approx(1, abs=1e-12)


def test_ranks_recall_and_ndcg():
    found = np.array([[4, 7, 1], [2, 0, 5], [9, 8, 3], [6, 3, 2]])
    places = metrics.ranks(found, np.array([4, 5, 1, 3]))
    assert places.tolist() == [1, 3, 0, 2]
    assert metrics.recall(places, 1) == 0.25
    assert metrics.recall(places, 2) == 0.5
    assert metrics.recall(places, 3) == 0.75
    # 1 / log2(2), 1 / log2(4), not found, 1 / log2(3)
    assert metrics.ndcg(places, 10) == pytest.approx([1, 0.5, 0, 1 / math.log2(3)])
    assert metrics.ndcg(places, 2) == pytest.approx([1, 0, 0, 1 / math.log2(3)])


def test_loss_is_of_pairs():
    gains, reference = np.array([0.5, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.5, 0.5])
    lost, half = metrics.loss(gains, reference)
    # Differences 0.5, 0, 0.5, -0.5: mean 0.125, squares about it sum to 0.6875.
    assert lost == pytest.approx(0.125)
    assert half == pytest.approx(1.96 * math.sqrt(0.6875 / 3) / 2)
    assert metrics.loss(gains, gains) == (0, 0)


def test_shared_ignores_order():
    found = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    right = np.array([[4, 1, 9], [7, 0, 1]])
    assert metrics.shared(found, right) == pytest.approx((2 + 1) / 6)


def test_spearman_is_of_ranks():
    assert metrics.spearman([1, 2, 3, 4], [10, 100, 1000, 9999]) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Without ties 1 - 6 * sum(d^2) / (n * (n^2 - 1)): d = 1, 1, 0, 0.
    assert metrics.spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(1 - 6 * 2 / 60)
    # Ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4: covariance 4.5 of variances 4.5 and 5.
    assert metrics.spearman([7, 7, 8, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(metrics.spearman([1, 1, 1], [1, 2, 3]))


def test_alignment_and_uniformity():
    east, north, west = [1, 0], [0, 1], [-1, 0]
    # Squared distances 0, 2 and 4.
    pairs = vectors(east, east, east), vectors(east, north, west)
    assert metrics.alignment(*pairs) == pytest.approx(2)
    expected = math.log((1 + math.exp(-4) + math.exp(-8)) / 3)
    assert metrics.uniformity(*pairs) == pytest.approx(expected)
    assert metrics.uniformity(pairs[0], pairs[0]) == 0


def test_alike_counts_every_row_that_has_a_twin():
    rows = vectors([1, 2], [3, 4], [1, 2], [1, 2.0001], [3, 4], [0, 0])
    assert metrics.num_alike(rows) == 4
    assert metrics.num_alike(rows[:2]) == 0
    assert metrics.num_alike(rows[:0]) == 0
