"""How much of its time a device computes: of the last seconds, and of the load it had last."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

RECENT_S = 10
# A device that got nothing for so long was not under load.
_PAUSE_S = 1.0


class Utilization:
    """One device's share of time; fed with its runs as they end. Thread-safe.

    Args:
        clock: Seconds, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # By the whole second of the clock in which runs ended: seconds that they took.
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_S + 1)
        self._began = self._ended = 0.0  # of the last load; nothing has run where they are equal
        self._load_s = 0.0  # that its runs took

    def record_run(self, seconds: float) -> None:
        """A run has ended that took so long."""
        now = self._clock()
        with self._lock:
            if self._ended == self._began or now - seconds > self._ended + _PAUSE_S:
                self._began, self._load_s = now - seconds, 0.0
            self._ended = now
            self._load_s += seconds
            before = 0.0
            if self._recent and self._recent[-1][0] == int(now):
                before = self._recent.pop()[1]
            self._recent.append((int(now), before + seconds))

    def recent_share(self, concurrency: int) -> float:
        """Of the last `RECENT_S` whole seconds, from 0 to 1.

        Args:
            concurrency: Runs that the device has at once when it is busy.
        """
        last = int(self._clock())
        with self._lock:
            seconds = sum(some for end, some in self._recent if last - RECENT_S <= end < last)
        return min(1.0, seconds / (RECENT_S * concurrency))

    def last_load(self, concurrency: int) -> tuple[float, float]:
        """Of the last load, from 0 to 1, and its seconds; it goes on where it ended just now.

        A load lasts as long as the device is never without a run for a second.
        """
        with self._lock:
            elapsed = self._ended - self._began
            share = self._load_s / (elapsed * concurrency) if elapsed else 0.0
            return min(1.0, share), elapsed
