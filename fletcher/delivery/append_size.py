"""Size of the next append to a dataset, and the pause before it.

A store shows its limit by refusing an append as too much, or by being slow. Each such append halves
the size of the next one. Each full append that succeeds makes the next one a sixteenth larger. (TCP
grows by a fixed step, which a store with a low limit would refuse every time.) A store may also ask
for a rest: then appends do not grow, and a pause follows each of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from fletcher.errors import FletcherError, OverloadedError
from fletcher.util.backoff import Backoff

_GROWTH = 17 / 16
# A group that was sent once cannot be divided, so a smaller share would change nothing.
_SMALLEST_SHARE = 1 / 1024
_FIRST_REST_S = 0.1
_LONGEST_REST_S = 10.0


class AppendSize:
    """One dataset's append size. Not thread-safe. All times are from `time.monotonic`.

    Args:
        slow_s: Duration in seconds from which an append counts as too large. The store's deadline
            is four times as long.
        retry: Lengths of the pauses after failed appends.
        jitter: Callback that returns a random number from 0 to 1, for the random part of a pause.

    Attributes:
        share: Size of the next append as a share of a full append, 0 to 1.
        ready_at: Earliest start of the next append.
        rest_s: Pause in seconds after each append, because the store asked for a rest.
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
        """Limit of the next append, in rows or bytes; at least 1.

        `most` is the limit of a full append.
        """
        return max(1, int(most * self.share))

    def note_stored(self, now: float, seconds: float, *, full: bool, slow_down: bool) -> None:
        """Learn from an append that succeeded after `seconds`.

        `full`: the append was as large as allowed. A smaller one does not prove that the store
        takes more. `slow_down`: the store asked for a rest.
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
        self.ready_at = now + self.pause_s(self._failures, error.retry_after_ms)

    def pause_s(self, num_failures: int, at_least_ms: float | None = None) -> float:
        """Pause after `num_failures` failures in a row, of the dataset or of one group."""
        return self._retry.delay_s(num_failures, self._jitter(), at_least_ms=at_least_ms)

    def resume(self, now: float) -> None:
        """End the pause after failures, because another dataset found the store available."""
        self._failures = 0
        self.ready_at = now

    def _halve(self) -> None:
        self.share = max(_SMALLEST_SHARE, self.share / 2)
