"""Rows that are known when they come in, and need not be embedded."""

from __future__ import annotations

from collections import deque

import numpy as np
import pyarrow as pa

from fletcher.core.batches import BoolArray
from fletcher.delivery.dedupe.index import DedupeIndex, entries_of
from fletcher.delivery.upload import Upload


class DedupePrefilter:
    """Finds rows that need not be embedded, for they are known; used by one thread.

    Args:
        known: What the dataset holds.
        upload: Whose rows these are; `known_by` is set.
    """

    def __init__(self, known: DedupeIndex, upload: Upload) -> None:
        self._known = known
        self._upload = upload
        self._kind = upload.dedupe_by or ""
        # Of ids on their way: what the store has is about to change, so they cannot be told yet.
        self._moving: dict[bytes, int] = {}
        self._passed: deque[tuple[int, int, list[bytes]]] = deque()

    def skip(self, rows: pa.RecordBatch, row_first: int) -> BoolArray:
        """Rows that are known, bool [num_rows].

        Args:
            rows: With the columns `id` and `text`.
            row_first: Offset of the first one in the upload.
        """
        while self._passed and self._upload.covers(*self._passed[0][:2]):
            first, _, keys = self._passed.popleft()
            for one in keys:
                if self._moving.get(one) == first:
                    del self._moving[one]
        entries = entries_of(self._kind, rows)
        known = self._known.find(self._kind, entries)
        skipped = np.array(
            [
                is_known and key not in self._moving
                for is_known, (key, _) in zip(known, entries, strict=True)
            ],
            np.bool_,
        )
        if self._kind == "delta":
            passed: set[bytes] = set()
            for place, (key, _) in enumerate(entries):
                if key in passed:
                    skipped[place] = False  # after a change of it in these rows
                elif key is not None and not skipped[place]:
                    passed.add(key)
            self._moving.update(dict.fromkeys(passed, row_first))
            self._passed.append((row_first, row_first + rows.num_rows - 1, list(passed)))
        return skipped
