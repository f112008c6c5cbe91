"""Whether a store is there: what all lanes of one store know together.

Closed, everybody calls the store. After some failures in a row it opens: nobody calls. When its
pause is over one lane tries (half-open); that closes it for all, or the next pause is longer.

    closed ──`_FAILURES` in a row──▶ open ──pause over, one lane──▶ half-open ──answer──▶ closed
                                      ▲────────────────────failure───────┘
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fletcher.errors import (
    DeadlineExceededError,
    FletcherError,
    OverloadedError,
    StoreUnavailableError,
    UnavailableError,
)

log = logging.getLogger(__name__)

# What passes by itself; any other error is an answer, and the store is there to give it.
PASSING = (UnavailableError, DeadlineExceededError)

_FAILURES = 3
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 10.0
# Who tried in vain tries later than the others: it may be its dataset alone that is in trouble.
_AFTER_YOU_S = 0.05


class Breaker:
    """One store's state. Thread-safe.

    Args:
        name: The store's, for the log.
        clock: Seconds that only grow.
        jitter: A share of a pause, 0 to 1.
    """

    def __init__(
        self,
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._name = name
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._failures = 0
        self._since = 0.0  # of the first failure
        self._reason = ""
        self._retry_at: float | None = None  # None: closed
        self._tries = 0
        self._probing: object | None = None
        self._last_probe: object | None = None
        self._outages = 0
        self._watchers: list[Callable[[], None]] = []

    def watch(self, wake: Callable[[], None]) -> None:
        """Calls `wake` when the store was tried while it was away; `wake` must not block."""
        with self._lock:
            self._watchers.append(wake)

    def unwatch(self, wake: Callable[[], None]) -> None:
        """Ends what `watch` began."""
        with self._lock:
            self._watchers.remove(wake)

    def delay_s(self, who: object) -> float:
        """How long `who` has to wait before it calls; infinite while another one tries."""
        with self._lock:
            return self._delay(who)

    def check(self, who: object) -> None:
        """Fails where `who` may not call now.

        Raises:
            StoreUnavailableError: See `error`.
        """
        if self.delay_s(who) > 0:
            raise self.error(who)

    def error(self, who: object) -> StoreUnavailableError:
        """That the store is away, why, and when to come again."""
        with self._lock:
            delay = self._delay(who)
            return StoreUnavailableError(
                f"the store has been away for {self._clock() - self._since:.0f} s: {self._reason}",
                field="store",
                retry_after_ms=math.ceil(1000 * (delay if delay < math.inf else _FIRST_PAUSE_S)),
            )

    @contextmanager
    def call(self, who: object, *, proof: bool = True) -> Iterator[None]:
        """Around a call to the store: learns from how it ends, and raises what it raised.

        Args:
            who: Who calls.
            proof: That it goes well proves that the store is there; a store whose disk is full
                opens datasets and takes no rows.
        """
        with self._lock:
            if self._retry_at is not None and self._delay(who) == 0:
                self._probing = self._last_probe = who
        try:
            yield
        except OverloadedError:  # it is there, and says so
            self._answered(who, proof=proof)
            raise
        except PASSING as error:
            self._failed(who, error)
            raise
        except BaseException:
            self._answered(who, proof=proof)
            raise
        else:
            self._answered(who, proof=proof)

    @property
    def away_since(self) -> float | None:
        """When the calls began to fail, where the store is away."""
        with self._lock:
            return None if self._retry_at is None else self._since

    def snapshot(self) -> dict[str, Any]:
        """The state for the `stats` action."""
        with self._lock:
            away = self._retry_at is not None
            state = "probing" if self._probing is not None else "away" if away else "there"
            now = self._clock()
            return {
                "state": state,
                "outages": self._outages,
                **({"away_s": round(now - self._since, 3), "reason": self._reason} if away else {}),
            }

    def _delay(self, who: object) -> float:
        if self._retry_at is None:
            return 0.0
        if self._probing is not None:
            return math.inf
        courtesy = _AFTER_YOU_S if who is self._last_probe else 0.0
        return max(0.0, self._retry_at + courtesy - self._clock())

    def _failed(self, who: object, error: FletcherError) -> None:
        now = self._clock()
        with self._lock:
            if not self._failures:
                self._since = now
            self._failures += 1
            self._reason = error.message
            probed = self._probing is who
            opened = self._retry_at is None and self._failures >= _FAILURES
            if opened:
                self._tries = 0
                self._outages += 1
            # Calls that were under way when the store went away tell nothing new.
            if opened or probed:
                self._probing = None
                self._retry_at = now + pause_s(self._tries, error, self._jitter())
                self._tries += 1
            watchers = list(self._watchers) if probed else []
        if opened:
            log.warning("store %s is away: %s", self._name, error)
        for wake in watchers:
            wake()

    def _answered(self, who: object, *, proof: bool) -> None:
        now = self._clock()
        with self._lock:
            away = self._retry_at is not None
            away_s = now - self._since
            if proof:
                self._failures = 0
                self._retry_at = self._probing = self._last_probe = None
            elif self._probing is who:
                self._retry_at, self._probing, self._last_probe = now, None, None
            watchers = list(self._watchers) if away else []
        if away and proof:
            log.info("store %s is back after %.3g s", self._name, away_s)
        for wake in watchers:
            wake()


def pause_s(tries: int, error: FletcherError, jitter: float) -> float:
    """How long to wait after the (`tries` + 1)-th failure: as the error asks, or longer.

    Exponential with full jitter: https://aws.amazon.com/builders-library (timeouts, retries,
    backoff).
    """
    longest: float = min(_FIRST_PAUSE_S * 2.0 ** min(tries, 30), _MAX_PAUSE_S)
    return max(jitter * longest, (error.retry_after_ms or 0) / 1000)
