from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fletcher.core.ranges import RangeSet

RANGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda one: (one[0], one[0] + one[1])),
    max_size=12,
)


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {n for first, last in ranges for n in range(first, last + 1)}


@given(RANGES, RANGES)
def test_behaves_as_a_set_of_numbers(
    added: list[tuple[int, int]], removed: list[tuple[int, int]]
) -> None:
    ranges = RangeSet(added)
    expected = members(added)
    assert members(ranges.ranges()) == expected
    assert ranges.count == len(expected)
    for first, last in removed:
        gaps = ranges.missing(first, last)
        assert members(gaps) == set(range(first, last + 1)) - expected
        assert ranges.covers(first, last) == (not gaps)
        ranges.remove_range(first, last)
        expected -= set(range(first, last + 1))
        assert members(ranges.ranges()) == expected
        assert ranges.count == len(expected)


@given(RANGES)
def test_ranges_are_sorted_disjoint_and_not_adjacent(added: list[tuple[int, int]]) -> None:
    ranges = RangeSet(added).ranges()
    for (_, last), (first, _) in pairwise(ranges):
        assert last + 1 < first


@given(RANGES)
def test_prefix_counts_from_zero_without_a_gap(added: list[tuple[int, int]]) -> None:
    expected = members(added)
    prefix = 0
    while prefix in expected:
        prefix += 1
    assert RangeSet(added).prefix == prefix
