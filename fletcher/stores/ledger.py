"""Which batch keys a dataset holds, in memory that grows with gaps, not with keys."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from fletcher.schema import merge_ranges, parse_batch_key


class KeyLedger:
    """The stored batch keys of one dataset. Not thread-safe.

    Keys of the form `upload_id:first-last` are kept as merged ranges per upload, so an upload
    without gaps costs one range however many keys it had. Other keys are kept as they are.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._ranges: dict[str, list[tuple[int, int]]] = {}
        self._others: set[str] = set()
        found: dict[str, list[tuple[int, int]]] = {}
        for key in keys:
            parsed = parse_batch_key(key)
            if parsed is None:
                self._others.add(key)
            else:
                found.setdefault(parsed[0], []).append(parsed[1:])
        for upload_id, ranges in found.items():
            self._ranges[upload_id] = merge_ranges(ranges)

    def holds(self, key: str) -> bool:
        """Whether all rows of `key` are covered by keys that were added."""
        parsed = parse_batch_key(key)
        if parsed is None:
            return key in self._others
        upload_id, first, last = parsed
        ranges = self._ranges.get(upload_id, [])
        index = bisect_right(ranges, (first, last)) - 1
        # The range that starts at `first` and ends later sorts after (first, last).
        return any(
            start <= first and last <= end for start, end in ranges[max(index, 0) : index + 2]
        )

    def add(self, key: str) -> None:
        """Notes a key as stored."""
        parsed = parse_batch_key(key)
        if parsed is None:
            self._others.add(key)
            return
        upload_id, first, last = parsed
        ranges = self._ranges.setdefault(upload_id, [])
        low = bisect_right(ranges, (first,)) - 1
        if low < 0 or ranges[low][1] < first - 1:
            low += 1
        high = low
        while high < len(ranges) and ranges[high][0] <= last + 1:
            first, last = min(first, ranges[high][0]), max(last, ranges[high][1])
            high += 1
        ranges[low:high] = [(first, last)]

    def ranges(self, upload_id: str) -> list[tuple[int, int]]:
        """Stored row offsets of an upload: inclusive (first, last), sorted, merged."""
        return list(self._ranges.get(upload_id, []))
