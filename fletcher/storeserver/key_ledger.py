"""Ledger of the batch keys that a dataset has stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from fletcher.core.ranges import RangeSet
from fletcher.core.schema import parse_batch_key


class KeyLedger:
    """The stored batch keys of one dataset. Not thread-safe.

    Keys of the form `upload_id:first-last` are kept as merged ranges for each upload. An upload
    without gaps therefore takes only one range. Other keys are kept as strings.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._others: set[str] = set()
        found: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for key in keys:
            parsed = parse_batch_key(key)
            if parsed is None:
                self._others.add(key)
            else:
                found[parsed[0]].append(parsed[1:])
        self._ranges = {upload_id: RangeSet(ranges) for upload_id, ranges in found.items()}

    def holds(self, key: str) -> bool:
        """Whether the stored keys together cover all rows that `key` names."""
        parsed = parse_batch_key(key)
        if parsed is None:
            return key in self._others
        upload_id, first, last = parsed
        return upload_id in self._ranges and self._ranges[upload_id].covers(first, last)

    def add_key(self, key: str) -> None:
        """Record a key as stored."""
        parsed = parse_batch_key(key)
        if parsed is None:
            self._others.add(key)
            return
        upload_id, first, last = parsed
        self._ranges.setdefault(upload_id, RangeSet()).add_range(first, last)

    def forget_upload(self, upload_id: str) -> None:
        """Forget the keys of an upload, whose rows were deleted."""
        self._ranges.pop(upload_id, None)

    def ranges(self, upload_id: str) -> list[tuple[int, int]]:
        """Offsets of an upload's stored rows: sorted, inclusive ranges (first, last)."""
        return self._ranges[upload_id].ranges() if upload_id in self._ranges else []
