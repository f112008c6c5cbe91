"""Exponential backoff with jitter.

No library is used, because retry libraries call the function and wait by themselves. Threads of
Fletcher that wait for a retry must also wake up for other events.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that double with each successive failure.

    Full jitter spreads retries best. Half jitter guarantees a minimum pause. Source:
    https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter
    """

    first_s: float  # longest delay after the first failure
    longest_s: float  # upper bound of every delay
    jitter: float = 0.5  # share of the delay that is random: 0.5 is half jitter, 1 is full jitter

    def delay_s(
        self, num_failures: int, chance: float, *, at_least_ms: float | None = None
    ) -> float:
        """Seconds to wait after `num_failures` successive failures; 0 without failures.

        `chance` is a random number from 0 to 1. `at_least_ms` is a lower bound of the delay.
        """
        if num_failures <= 0:
            return 0.0
        longest = min(self.first_s * 2.0 ** min(num_failures - 1, 30), self.longest_s)
        return max(longest * (1.0 - self.jitter * (1.0 - chance)), (at_least_ms or 0.0) / 1000)
