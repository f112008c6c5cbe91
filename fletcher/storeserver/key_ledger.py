"""Which batch keys a dataset holds, in memory that grows with gaps, not with keys."""

from __future__ import annotations

from collections.abc import Iterable

from fletcher.core.ranges import RangeSet
from fletcher.core.schema import parse_batch_key


class KeyLedger:
    """The stored batch keys of one dataset. Not thread-safe.

    Keys of the form `upload_id:first-last` are kept as merged ranges per upload, so an upload
    without gaps costs one range however many keys it had. Other keys are kept as they are.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._others: set[str] = set()
        found: dict[str, list[tuple[int, int]]] = {}
        for key in keys:
            parsed = parse_batch_key(key)
            if parsed is None:
                self._others.add(key)
            else:
                found.setdefault(parsed[0], []).append(parsed[1:])
        self._ranges = {upload_id: RangeSet(ranges) for upload_id, ranges in found.items()}

    def holds(self, key: str) -> bool:
        """Whether all rows of `key` are covered by keys that were added."""
        parsed = parse_batch_key(key)
        if parsed is None:
            return key in self._others
        upload_id, first, last = parsed
        return upload_id in self._ranges and self._ranges[upload_id].covers(first, last)

    def add(self, key: str) -> None:
        """Notes a key as stored."""
        parsed = parse_batch_key(key)
        if parsed is None:
            self._others.add(key)
            return
        upload_id, first, last = parsed
        self._ranges.setdefault(upload_id, RangeSet()).add(first, last)

    def ranges(self, upload_id: str) -> list[tuple[int, int]]:
        """Stored row offsets of an upload: inclusive (first, last), sorted, merged."""
        return self._ranges[upload_id].ranges() if upload_id in self._ranges else []
