"""Filter that finds arriving rows that need not be embedded."""

from __future__ import annotations

from collections import deque

import numpy as np
import pyarrow as pa

from fletcher.core.batches import BoolArray
from fletcher.core.stored_vectors import StoredVectors
from fletcher.delivery.dedupe.fingerprints import has_same_text, is_delta, row_keys
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.dedupe.stored_vector_reader import StoredVectorReader
from fletcher.delivery.upload import Upload


class DedupePrefilter:
    """Finds duplicates among the arriving rows of one connection. Not thread-safe.

    `vectors` reads stored vectors of unchanged texts. If it is None, all rows except duplicates are
    embedded.
    """

    def __init__(
        self, dedupe_index: DedupeIndex, upload: Upload, vectors: StoredVectorReader | None = None
    ) -> None:
        self._dedupe_index = dedupe_index
        self._upload = upload
        self._vectors = vectors
        self._kind = upload.dedupe_by or ""
        # For `delta` only: each pending id with the first row of its batch. The pending rows are
        # about to replace the stored ones, so later rows with these ids cannot be compared yet.
        self._pending: dict[bytes, int] = {}
        self._passed: deque[tuple[int, int, list[bytes]]] = deque()

    def check_rows(
        self, rows: pa.RecordBatch, row_first: int
    ) -> tuple[BoolArray, StoredVectors | None]:
        """Whether each row is a duplicate, bool [num_rows], and stored vectors of others.

        `rows` has the columns `id` and `text`, and `carried:NAME` for carried ones. `row_first` is
        the offset of its first row in the upload. For `delta`, a row in which only other columns
        than the text changed gets its stored vector.
        """
        while self._passed and self._upload.covers(*self._passed[0][:2]):
            first, _, keys = self._passed.popleft()
            for one in keys:
                if self._pending.get(one) == first:
                    del self._pending[one]
        entries = row_keys(self._kind, rows)
        indexed = self._dedupe_index.find_values(self._kind, entries)
        duplicates = np.array(
            [
                value is not None and value == found and key not in self._pending
                for found, (key, value) in zip(indexed, entries, strict=True)
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
        stored = None
        if self._vectors is not None:
            same = [
                place
                for place, (found, (_, value)) in enumerate(zip(indexed, entries, strict=True))
                if not duplicates[place] and has_same_text(value, found)
            ]
            stored = self._vectors.read_vectors(rows, same)
        return duplicates, stored
