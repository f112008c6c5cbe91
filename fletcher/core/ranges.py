"""Sets of row offsets, stored as inclusive ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class RangeSet:
    """A set of whole numbers as sorted, disjoint, inclusive ranges. Not thread-safe.

    Row offsets arrive mostly in order, so even a large set consists of few ranges.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        self.count = 0
        for first, last in sorted(ranges):  # sorted, so that each range is added at the end
            self.add_range(first, last)

    def add_range(self, first: int, last: int) -> None:
        """Add the numbers from first to last, both included."""
        left = bisect_left(self._ranges, first, key=lambda one: one[1] + 1)
        right = left
        while right < len(self._ranges) and self._ranges[right][0] <= last + 1:
            right += 1
        for one_first, one_last in self._ranges[left:right]:
            first, last = min(first, one_first), max(last, one_last)
            self.count -= one_last - one_first + 1
        self._ranges[left:right] = [(first, last)]
        self.count += last - first + 1

    def remove_range(self, first: int, last: int) -> None:
        """Remove the numbers from first to last, both included."""
        kept: list[tuple[int, int]] = []
        for one_first, one_last in self._ranges:
            if one_first < first:
                kept.append((one_first, min(one_last, first - 1)))
            if one_last > last:
                kept.append((max(one_first, last + 1), one_last))
        self._ranges = kept
        self.count = sum(one_last - one_first + 1 for one_first, one_last in kept)

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of the numbers from first to last that are not in the set."""
        gaps = []
        start = bisect_left(self._ranges, first, key=lambda one: one[1])
        end = bisect_right(self._ranges, last, key=lambda one: one[0])
        for one_first, one_last in self._ranges[start:end]:
            if one_first > first:
                gaps.append((first, one_first - 1))
            first = one_last + 1
        if first <= last:
            gaps.append((first, last))
        return gaps

    def covers(self, first: int, last: int) -> bool:
        """Whether all numbers from first to last are in the set."""
        return not self.missing(first, last)

    @property
    def prefix(self) -> int:
        """Count of numbers from 0 up to the first missing number."""
        return self._ranges[0][1] + 1 if self._ranges and self._ranges[0][0] == 0 else 0

    def ranges(self) -> list[tuple[int, int]]:
        """A copy of the ranges, sorted."""
        return list(self._ranges)
