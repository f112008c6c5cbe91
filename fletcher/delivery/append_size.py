"""How much one append to a dataset carries, and how soon the next may follow.

The store says what it bears: by refusing too much, by being slow, by asking to slow down. Then half
as much goes at once; each good append of what is allowed makes it a sixteenth more again. (TCP adds
a fixed step, which a store that bears little would refuse every time.)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from fletcher.delivery.breaker import pause_s
from fletcher.errors import FletcherError, OverloadedError

_GROWTH = 17 / 16
# At least this share: a group cannot be divided once it was sent, so less changes nothing.
_LEAST = 1 / 1024
_FIRST_REST_S = 0.1
_MAX_REST_S = 10.0


class AppendSize:
    """One lane's. Not thread-safe.

    Args:
        slow_s: An append that takes longer is too large: four times that is the store's deadline.
        clock: Seconds that only grow.
        jitter: A share of a pause, 0 to 1.
    """

    def __init__(
        self,
        slow_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._slow_s = slow_s
        self._clock = clock
        self._jitter = jitter
        self._rest_s = 0.0  # after each append, where the store asked to slow down
        self._failures = 0
        self._not_before = clock()
        self.share = 1.0

    def limit(self, most: int) -> int:
        """How much of `most` (rows, bytes) the next append may carry."""
        return max(1, int(most * self.share))

    def delay_s(self) -> float:
        """How long to wait before the next append."""
        return max(0.0, self._not_before - self._clock())

    def stored(self, seconds: float, *, full: bool, slow_down: bool) -> None:
        """An append went well.

        Args:
            seconds: What it took.
            full: It carried all it might; else it proves nothing about more.
            slow_down: The store asked to slow down.
        """
        self._failures = 0
        if slow_down:
            self._rest_s = min(max(2 * self._rest_s, _FIRST_REST_S), _MAX_REST_S)
        else:
            self._rest_s = self._rest_s / 2 if self._rest_s > _FIRST_REST_S else 0.0
        if seconds > self._slow_s:
            self._halve()
        elif full and not slow_down:
            self.share = min(1.0, self.share * _GROWTH)
        self._not_before = self._clock() + self._rest_s

    def failed(self, seconds: float, error: FletcherError) -> None:
        """An append failed in a way that passes.

        Args:
            seconds: What it took; the deadline, where the store stalled.
            error: Why.
        """
        if isinstance(error, OverloadedError) or seconds > self._slow_s:
            self._halve()
        pause = pause_s(self._failures, error, self._jitter())
        self._failures += 1
        self._not_before = self._clock() + pause

    def resume(self) -> None:
        """The store is back, as another lane found: the pause after failures is over."""
        self._failures = 0
        self._not_before = self._clock()

    def _halve(self) -> None:
        self.share = max(_LEAST, self.share / 2)
