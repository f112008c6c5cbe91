"""How much data may be in the house at once, in bytes, and who may bring more.

Every stream owns a reserve that nobody can take from it, so that a stalled stream never stops
another; what it holds beyond its reserve comes from a common part. A stream that finds neither
waits: its handler stops reading, and the client's writes block. What a stream keeps to its end, the
vectors of a dictionary, has a part of its own that nobody waits for: without room there, it does
without.

A row that is kept until all of its chunks are there is in a part of its own, too: were it in the
common part, streams that keep rows could fill that with the beginnings of rows, and each would wait
for the others. Here the oldest row that is not whole always finds the room that it may still need,
and its stream one piece of the common part at a time, also where that is full of those who wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from fletcher.errors import DrainingError


class MemoryBudget:
    """Bytes for all streams together.

    Args:
        total_bytes: Reserves, tables (1/8), rows that are kept (3/16) and common part.
        max_streams: Streams that each own a reserve: 1/4 of the total, divided among them.
        clock: Seconds that only grow.
    """

    def __init__(
        self, total_bytes: int, max_streams: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_bytes = total_bytes
        self.reserve_bytes = total_bytes // 4 // max_streams
        self._tables_bytes = total_bytes // 8
        self._tables_used = 0
        self._rows_bytes = total_bytes * 3 // 16
        self._rows_used = 0
        self._growing: dict[Allowance, int] = {}  # rows that are not whole, the oldest first
        self.max_row_bytes = self._rows_bytes * 3 // 4
        self._common_bytes = (
            total_bytes - self._tables_bytes - self._rows_bytes - self.reserve_bytes * max_streams
        )
        self._common_used = 0
        self._used = 0
        self._clock = clock
        self._waiting: dict[Allowance, float] = {}  # since when
        self._spare_bytes = 0
        self._changed = threading.Condition()

    def open_allowance(self) -> Allowance:
        """A stream's share; the caller has made sure that there are at most `max_streams`."""
        return Allowance(self)

    def statistics(self) -> dict[str, Any]:
        """Bytes in use, and the limit."""
        with self._changed:
            used = self._used + self._rows_used
            return {"used_bytes": used, "total_bytes": self.total_bytes}

    def used_share(self) -> float:
        """Of what waiting streams wait for, the common part, how much is in use."""
        return self._common_used / max(1, self._common_bytes)

    def starving(self, longer_than_s: float) -> int:
        """Streams that have waited longer than that for memory."""
        with self._changed:
            now = self._clock()
            return sum(now - since > longer_than_s for since in self._waiting.values())

    def spare(self, *, half: bool) -> None:
        """Whether bulk work must leave half of the common part free, for interactive work."""
        with self._changed:
            self._spare_bytes = self._common_bytes // 2 if half else 0
            self._changed.notify_all()


class Allowance:
    """What one stream holds. Thread-safe."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._used = 0
        self._kept = 0
        self._rows = 0
        self._closed = False

    @property
    def max_row_bytes(self) -> int:
        """What `grow_row` may be asked for."""
        return self._budget.max_row_bytes

    def keep_table(self, num_bytes: int) -> bool:
        """Whether `num_bytes` may be kept until the stream ends, or keeps something else instead.

        Never waits; where the answer is no, the stream keeps nothing.
        """
        budget = self._budget
        with budget._changed:
            budget._tables_used -= self._kept
            free = budget._tables_bytes - budget._tables_used
            granted = num_bytes <= free and not self._closed
            self._kept = num_bytes if granted else 0
            budget._tables_used += self._kept
            return granted

    def acquire(self, num_bytes: int, *, bulk: bool = True) -> None:
        """Waits until `num_bytes` more may be held.

        A stream that holds nothing gets what it asks for once the common part is free enough, or
        all of the common part is free: one piece larger than the budget must not wait for ever.

        Args:
            num_bytes: How much.
            bulk: It leaves free what `MemoryBudget.spare` says.

        Raises:
            DrainingError: The stream was closed while waiting.
        """
        budget = self._budget
        with budget._changed:
            if not self._closed and not self._fits(num_bytes, bulk=bulk):
                budget._waiting[self] = budget._clock()
                while not self._closed and not self._fits(num_bytes, bulk=bulk):
                    budget._changed.wait()
                budget._waiting.pop(self, None)
            if self._closed:
                raise DrainingError("the stream was closed")
            self._add(num_bytes)

    def grow_row(self, num_bytes: int) -> None:
        """Waits until the row at hand may take `num_bytes` in all; with 0 there is none any more.

        Args:
            num_bytes: At most `max_row_bytes`.

        Raises:
            DrainingError: The stream was closed.
        """
        budget = self._budget
        with budget._changed:
            if num_bytes and not self._closed:
                budget._growing.setdefault(self, 0)
                budget._changed.notify_all()  # an `acquire` of the stream may be let in by that
                budget._changed.wait_for(lambda: self._closed or self._may_grow(num_bytes))
            if self._closed:
                raise DrainingError("the stream was closed")
            self._add_row(num_bytes - budget._growing.get(self, 0))
            if num_bytes:
                budget._growing[self] = num_bytes
            else:
                budget._growing.pop(self, None)
                budget._changed.notify_all()

    def complete_row(self) -> int:
        """The row at hand does not grow any more: what it takes, to be given to `release_bytes`."""
        with self._budget._changed:
            num_bytes = self._budget._growing.pop(self, 0)
            self._budget._changed.notify_all()
            return num_bytes

    def release_bytes(self, num_bytes: int, row_bytes: int = 0) -> None:
        """Gives bytes back, and what a row took. After `close` there is nothing to give."""
        with self._budget._changed:
            if not self._closed:
                self._add(-num_bytes)
                self._add_row(-row_bytes)
                self._budget._changed.notify_all()

    def close(self) -> None:
        """Gives everything back and wakes a waiting `acquire`. Idempotent."""
        with self._budget._changed:
            if not self._closed:
                self._add(-self._used)
                self._closed = True
                self._budget._tables_used -= self._kept
                self._kept = 0
                self._add_row(-self._rows)
                self._budget._growing.pop(self, None)
                self._budget._changed.notify_all()

    @property
    def used_bytes(self) -> int:
        """Bytes held now."""
        return self._used

    def _common(self, used: int) -> int:
        return max(0, used - self._budget.reserve_bytes)

    def _fits(self, num_bytes: int, *, bulk: bool) -> bool:
        more = self._common(self._used + num_bytes) - self._common(self._used)
        free = self._budget._common_bytes - self._budget._common_used
        free -= self._budget._spare_bytes if bulk else 0
        # What is in the reserve is nobody else's, also while one huge piece overdraws the rest.
        if more <= max(0, free) or (self._used == 0 and self._budget._common_used == 0):
            return True
        # With the last of its pieces, which counts the whole text, it lets all others go on.
        return self._is_oldest and self._common(self._used) == 0

    @property
    def _is_oldest(self) -> bool:
        return next(iter(self._budget._growing), None) is self

    def _may_grow(self, num_bytes: int) -> bool:
        budget = self._budget
        more = num_bytes - budget._growing[self]
        of_oldest = next(iter(budget._growing.values()))
        needed = 0 if self._is_oldest else budget.max_row_bytes - of_oldest
        return budget._rows_used + more + needed <= budget._rows_bytes

    def _add_row(self, num_bytes: int) -> None:
        self._rows += num_bytes
        self._budget._rows_used += num_bytes

    def _add(self, num_bytes: int) -> None:
        before = self._common(self._used)
        self._used += num_bytes
        self._budget._used += num_bytes
        self._budget._common_used += self._common(self._used) - before
