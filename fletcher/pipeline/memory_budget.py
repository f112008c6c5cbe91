"""Global memory budget for in-flight data, and each stream's share of it.

The budget has four parts:

- Reserves: each stream has a reserve that no other stream uses. So a stalled stream never stops
  another.
- Shared part: memory for data beyond a stream's reserve. If neither the reserve nor the shared part
  has room, the stream waits: its handler stops reading, and the client's writes block.
- Tables: memory for vectors of dictionaries, which are kept until their stream ends. Streams do not
  wait for room here: if there is none, the stream keeps no table.
- Rows: memory for rows that are kept until all of their chunks have vectors. If these rows were in
  the shared part, the beginnings of rows could fill it, and all streams would wait for each other.
  In this separate part, the oldest incomplete row always finds the room that it may still need.
  The stream of that row also gets one row slice of the shared part at a time, even if the shared
  part is full.

Why no library: a semaphore knows neither reserves nor the oldest row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from fletcher.errors import DrainingError, FletcherError


class MemoryBudget:
    """Memory budget of all streams together, in bytes.

    Args:
        total_bytes: Size of the budget: 1/4 for reserves, 1/8 for tables, 3/16 for rows, and the
            rest for the shared part.
        max_streams: Number of streams among which the memory for reserves is divided.
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
        self._growing: dict[Allowance, int] = {}  # incomplete rows, the oldest first
        self.max_row_bytes = self._rows_bytes * 3 // 4
        self._shared_bytes = (
            total_bytes - self._tables_bytes - self._rows_bytes - self.reserve_bytes * max_streams
        )
        self._shared_used = 0
        self._used = 0
        self._clock = clock
        self._waiting: dict[Allowance, float] = {}  # start of each wait
        self._spare_bytes = 0
        self._changed = threading.Condition()

    def open_allowance(self) -> Allowance:
        """Opens a stream's share of the budget.

        The caller ensures that at most `max_streams` are open.
        """
        return Allowance(self)

    def statistics(self) -> dict[str, Any]:
        with self._changed:
            used = self._used + self._rows_used
            return {"used_bytes": used, "total_bytes": self.total_bytes}

    def used_share(self) -> float:
        """Fraction of the shared part that is in use; 1 is full, more is overdrawn."""
        return self._shared_used / max(1, self._shared_bytes)

    def starving(self, longer_than_s: float) -> int:
        """Number of streams that have waited for memory for more than `longer_than_s`."""
        with self._changed:
            now = self._clock()
            return sum(now - since > longer_than_s for since in self._waiting.values())

    def spare(self, *, half: bool) -> None:
        """Sets whether bulk work must leave half of the shared part free."""
        with self._changed:
            self._spare_bytes = self._shared_bytes // 2 if half else 0
            self._changed.notify_all()


class Allowance:
    """Memory of one stream. Thread-safe."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._used = 0
        self._kept = 0
        self._rows = 0
        self._closed: FletcherError | None = None  # what waiting threads get

    @property
    def max_row_bytes(self) -> int:
        """Largest `num_bytes` that `grow_row` accepts."""
        return self._budget.max_row_bytes

    def keep_table(self, num_bytes: int) -> bool:
        """Returns whether a table of `num_bytes` may be kept until the stream ends.

        Never waits. The memory of the stream's previous table is released first, whatever the
        answer.
        """
        budget = self._budget
        with budget._changed:
            budget._tables_used -= self._kept
            free = budget._tables_bytes - budget._tables_used
            granted = num_bytes <= free and self._closed is None
            self._kept = num_bytes if granted else 0
            budget._tables_used += self._kept
            return granted

    def acquire(self, num_bytes: int, *, bulk: bool = True) -> None:
        """Waits until the stream may hold `num_bytes` more, and counts them.

        A row slice may be larger than the budget, and must not wait forever. So a stream that holds
        nothing gets any number of bytes once all of the shared part is free. `bulk` work leaves
        free the memory that `MemoryBudget.spare` sets aside.

        Raises:
            FletcherError: The stream was closed: the error given to `close`.
        """
        budget = self._budget
        with budget._changed:
            if self._closed is None and not self._fits(num_bytes, bulk=bulk):
                budget._waiting[self] = budget._clock()
                try:
                    while self._closed is None and not self._fits(num_bytes, bulk=bulk):
                        budget._changed.wait()
                finally:
                    budget._waiting.pop(self, None)
            if self._closed is not None:
                raise self._closed
            self._add(num_bytes)

    def grow_row(self, num_bytes: int) -> None:
        """Waits until the stream's incomplete row may hold `num_bytes` in total.

        `num_bytes` is at most `max_row_bytes`; 0 gives the row up. Raises the error given to
        `close` if the stream is closed.
        """
        budget = self._budget
        with budget._changed:
            if num_bytes and self._closed is None:
                budget._growing.setdefault(self, 0)
                budget._changed.notify_all()  # this may admit an `acquire` of the stream
                budget._changed.wait_for(
                    lambda: self._closed is not None or self._may_grow(num_bytes)
                )
            if self._closed is not None:
                raise self._closed
            self._add_row(num_bytes - budget._growing.get(self, 0))
            if num_bytes:
                budget._growing[self] = num_bytes
            else:
                budget._growing.pop(self, None)
                budget._changed.notify_all()

    def complete_row(self) -> int:
        """Ends the growth of the stream's row.

        Returns:
            Bytes that the row holds. Pass them to `release_bytes` later.
        """
        with self._budget._changed:
            num_bytes = self._budget._growing.pop(self, 0)
            self._budget._changed.notify_all()
            return num_bytes

    def release_bytes(self, num_bytes: int, row_bytes: int = 0) -> None:
        """Gives back bytes from `acquire`, and `row_bytes` from `complete_row`.

        Does nothing after `close`.
        """
        with self._budget._changed:
            if self._closed is None:
                self._add(-num_bytes)
                self._add_row(-row_bytes)
                self._budget._changed.notify_all()

    def close(self, error: FletcherError | None = None) -> None:
        """Gives all memory of the stream back and wakes a waiting `acquire`. Idempotent.

        `error`: raised by `acquire` and `grow_row` from now on; None: a DrainingError.
        """
        with self._budget._changed:
            if self._closed is None:
                self._add(-self._used)
                self._closed = error or DrainingError("the stream was closed")
                self._budget._tables_used -= self._kept
                self._kept = 0
                self._add_row(-self._rows)
                self._budget._growing.pop(self, None)
                self._budget._changed.notify_all()

    @property
    def used_bytes(self) -> int:
        return self._used

    def _beyond_reserve(self, used: int) -> int:
        return max(0, used - self._budget.reserve_bytes)

    def _fits(self, num_bytes: int, *, bulk: bool) -> bool:
        more = self._beyond_reserve(self._used + num_bytes) - self._beyond_reserve(self._used)
        free = self._budget._shared_bytes - self._budget._shared_used
        free -= self._budget._spare_bytes if bulk else 0
        # A stream's reserve is available even while one huge row slice overdraws the shared part.
        if more <= max(0, free) or (self._used == 0 and self._budget._shared_used == 0):
            return True
        # The last row slice of the oldest row counts the memory of its whole text. Once that slice
        # is done, all other streams can proceed.
        return self._is_oldest and self._beyond_reserve(self._used) == 0

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
        used = self._used + num_bytes
        shared = self._beyond_reserve(used) - self._beyond_reserve(self._used)
        # No call between these lines: they are done together or not at all.
        self._used = used
        self._budget._used += num_bytes
        self._budget._shared_used += shared
