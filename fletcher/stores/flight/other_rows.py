"""Rows that other clients wrote into a Longbow's datasets.

If batches of a dataset differ in their columns, a filtered read of a Longbow leaves rows out and
tells no error. Each batch of Fletcher has keys; batches of other clients do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa


class OtherRows:
    """Knowledge whether datasets have rows of other clients. Thread-safe.

    Only a whole read tells. After it, the number of rows does, as long as only own rows are added.

    Args:
        count_rows: Returns a dataset's number of rows; None if the store does not tell it.
    """

    def __init__(self, count_rows: Callable[[str], int | None]) -> None:
        self._count_rows = count_rows
        self._lock = threading.Lock()
        # Numbers of rows of datasets without other rows; None: the store does not tell a number.
        self._counts: dict[str, int | None] = {}

    def add_own(self, dataset: str, num_rows: int) -> None:
        """Note rows of Fletcher that were added."""
        with self._lock:
            counted = self._counts.get(dataset)
            if counted is not None:
                self._counts[dataset] = counted + num_rows

    def has_none(self, dataset: str) -> bool:
        """Whether a dataset is known to have no rows of other clients."""
        counted = self._counts.get(dataset)
        return counted is not None and self._count_rows(dataset) == counted

    def watch(self, dataset: str, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches of a whole read; notes at its end whether all rows have keys."""
        # A store that tells no number is asked only once: its port may be unreachable.
        is_asked = self._counts.get(dataset, 0) is not None
        num_rows = self._count_rows(dataset) if is_asked else None
        num_read = num_others = 0
        for batch in batches:
            has_keys = "batch_key" in batch.schema.names
            num_others += batch["batch_key"].null_count if has_keys else batch.num_rows
            num_read += batch.num_rows
            yield batch
        with self._lock:
            if num_others or (num_rows is None and not num_read):
                self._counts.pop(dataset, None)
            else:
                self._counts[dataset] = num_rows
