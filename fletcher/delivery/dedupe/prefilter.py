"""Filter that finds duplicates among arriving rows before they are embedded."""

from __future__ import annotations

from collections import deque

import numpy as np
import pyarrow as pa

from fletcher.core.batches import BoolArray
from fletcher.delivery.dedupe.fingerprints import is_delta, row_keys
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.upload import Upload


class DedupePrefilter:
    """Finds duplicates among the arriving rows of one connection. Not thread-safe."""

    def __init__(self, dedupe_index: DedupeIndex, upload: Upload) -> None:
        self._dedupe_index = dedupe_index
        self._upload = upload
        self._kind = upload.dedupe_by or ""
        # For `delta` only: each pending id with the first row of its batch. The pending rows are
        # about to replace the stored ones, so later rows with these ids cannot be compared yet.
        self._pending: dict[bytes, int] = {}
        self._passed: deque[tuple[int, int, list[bytes]]] = deque()

    def find_duplicates(self, rows: pa.RecordBatch, row_first: int) -> BoolArray:
        """Whether each row is a duplicate, bool [num_rows].

        `rows` has the columns `id` and `text`, and `carried:NAME` for carried ones. `row_first` is
        the offset of its first row in the upload.
        """
        while self._passed and self._upload.covers(*self._passed[0][:2]):
            first, _, keys = self._passed.popleft()
            for one in keys:
                if self._pending.get(one) == first:
                    del self._pending[one]
        entries = row_keys(self._kind, rows)
        indexed = self._dedupe_index.find_duplicates(self._kind, entries)
        duplicates = np.array(
            [
                is_indexed and key not in self._pending
                for is_indexed, (key, _) in zip(indexed, entries, strict=True)
            ],
            np.bool_,
        )
        if is_delta(self._kind):
            passed: set[bytes] = set()
            for place, (key, _) in enumerate(entries):
                if key in passed:
                    duplicates[place] = False  # an earlier row of these replaces the stored one
                elif key is not None and not duplicates[place]:
                    passed.add(key)
            self._pending.update(dict.fromkeys(passed, row_first))
            self._passed.append((row_first, row_first + rows.num_rows - 1, list(passed)))
        return duplicates
