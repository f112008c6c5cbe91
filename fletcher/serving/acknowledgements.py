"""Queue of an upload's received batches, until they are acknowledged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any


class AckQueue:
    """Unacknowledged batches of one connection. Not thread-safe.

    Batches are acknowledged in the order of receipt, as soon as all their rows are covered. One
    acknowledgement stands for every batch up to its own, so a slow reader gets fewer of them, and
    no queue grows for it.

    Args:
        upload_id: The upload.
        covers: Whether rows, given by first and last offset, may be acknowledged.
    """

    def __init__(self, upload_id: str, covers: Callable[[int, int], bool]) -> None:
        self._upload_id = upload_id
        self._covers = covers
        self._batches: deque[tuple[int, int, int]] = deque()

    def append_batch(self, batch_id: int, row_first: int, row_last: int) -> None:
        """Add a batch that was received and submitted."""
        self._batches.append((batch_id, row_first, row_last))

    @property
    def is_due(self) -> bool:
        """Whether the oldest batch may be acknowledged."""
        return bool(self._batches) and self._covers(*self._batches[0][1:])

    def next_ack(self, counts: Callable[[], dict[str, int]]) -> dict[str, Any] | None:
        """Acknowledgement of all batches that are due; None if there are none.

        Args:
            counts: Gives the upload's cumulative `rows_*`.
        """
        due = []
        while self._batches and self._covers(*self._batches[0][1:]):
            due.append(self._batches.popleft())
        if not due:
            return None
        batch_id, _, row_last = due[-1]
        return {
            "type": "ack",
            "upload_id": self._upload_id,
            "batch_id": batch_id,
            "row_first": due[0][1],
            "row_last": row_last,
            **counts(),
        }
