"""Share of time that a device spends computing, recently and under its last load."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

RECENT_S = 10
# A load ends when the device runs nothing for this long.
_PAUSE_S = 1.0


class Utilization:
    """Computes a device's busy share from the durations of its runs. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # (second, sum): seconds of computing in runs that ended in that whole second of the clock.
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_S + 1)
        # Start and end on the clock.
        self._began = self._ended = 0.0  # of the last load; equal before the first run
        self._load_s = 0.0  # sum of the runs of the last load

    def record_run(self, seconds: float) -> None:
        """Record a run of this duration that ends now."""
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
        """Busy share, 0 to 1, during the last `RECENT_S` whole seconds.

        `concurrency` is the number of runs that the device can do at the same time.
        """
        last = int(self._clock())
        with self._lock:
            seconds = sum(some for end, some in self._recent if last - RECENT_S <= end < last)
        return min(1.0, seconds / (RECENT_S * concurrency))

    def last_load(self, concurrency: int) -> tuple[float, float]:
        """Busy share during the last load, 0 to 1, and that load's duration in seconds.

        A load ends when the device runs nothing for a second. The last load may not have ended yet.
        `concurrency` is the number of runs that the device can do at the same time.
        """
        with self._lock:
            elapsed = self._ended - self._began
            share = self._load_s / (elapsed * concurrency) if elapsed else 0.0
            return min(1.0, share), elapsed
