"""Size of the next append to a dataset, and the pause before it.

The store tells its limits by refusing too much, by being slow or by asking for a rest. Each such
answer halves the next append; each full append that goes well makes it a sixteenth larger. (TCP
grows by a fixed step, which a store with a low limit would refuse every time.)
"""

from __future__ import annotations

import random
from collections.abc import Callable

from fletcher.errors import FletcherError, OverloadedError
from fletcher.util.backoff import Backoff

_GROWTH = 17 / 16
# A group cannot be divided once it was sent, so a smaller share changes nothing.
_SMALLEST_SHARE = 1 / 1024
_FIRST_REST_S = 0.1
_LONGEST_REST_S = 10.0


class AppendSize:
    """One dataset's append size. Not thread-safe. All times are of `time.monotonic`.

    Args:
        slow_s: Duration beyond which an append was too large. Four times that is the store's
            deadline.
        retry: Pauses after failed appends.
        jitter: Returns a random share of a pause, 0 to 1.

    Attributes:
        share: Share of a full append that the store bears, 0 to 1.
        ready_at: Earliest start of the next append.
        rest_s: Pause after each append, because the store asked for it.
    """

    def __init__(
        self, slow_s: float, retry: Backoff, *, jitter: Callable[[], float] = random.random
    ) -> None:
        self.share = 1.0
        self.ready_at = 0.0
        self.rest_s = 0.0
        self._slow_s = slow_s
        self._retry = retry
        self._jitter = jitter
        self._failures = 0

    def limit(self, most: int) -> int:
        """The part of `most` (rows or bytes) that the next append may carry, at least 1."""
        return max(1, int(most * self.share))

    def note_stored(self, now: float, seconds: float, *, full: bool, slow_down: bool) -> None:
        """Learn from an append that went well; `slow_down`: the store asked for a rest.

        `full`: it carried all it might; a smaller one proves nothing about more.
        """
        self._failures = 0
        if slow_down:
            self.rest_s = min(max(2 * self.rest_s, _FIRST_REST_S), _LONGEST_REST_S)
        else:
            self.rest_s = self.rest_s / 2 if self.rest_s > _FIRST_REST_S else 0.0
        if seconds > self._slow_s:
            self._halve()
        elif full and not slow_down:
            self.share = min(1.0, self.share * _GROWTH)
        self.ready_at = now + self.rest_s

    def note_failed(self, now: float, seconds: float, error: FletcherError) -> None:
        """Learn from an append that failed with a retryable error after `seconds`."""
        if isinstance(error, OverloadedError) or seconds > self._slow_s:
            self._halve()
        self._failures += 1
        self.ready_at = now + self._retry.delay_s(
            self._failures, self._jitter(), at_least_ms=error.retry_after_ms
        )

    def resume(self, now: float) -> None:
        """End the pause after failures: another dataset found the store available."""
        self._failures = 0
        self.ready_at = now

    def _halve(self) -> None:
        self.share = max(_SMALLEST_SHARE, self.share / 2)
