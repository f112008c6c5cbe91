"""Circuit breaker of a store, shared by the committers of all its datasets.

While the breaker is closed, all datasets call the store. After some failures in a row it opens, and
the datasets that it holds back do not call. After a pause the breaker is half-open: one of them
tries. If the store answers, the breaker closes for all. If the try fails, the next pause is longer.
No library is used: breaker libraries block or raise by themselves, but a committer's thread also
waits for other events.

    closed ──`_FAILURES` in a row──▶ open ──pause over, one tries──▶ half-open ──answer──▶ closed
                                      ▲────────────────────failure───────┘

A failure of one dataset does not stop the other datasets. After such a failure only the committer
of that dataset pauses. The field of an error says what the error proves:

| `field` of a retryable error | proves | the open breaker holds back |
|---|---|---|
| `store` | The store is unavailable, as for a refused connection or a full disk | all datasets |
| none | Nothing: a timeout may be the store's or the dataset's | the datasets that failed |
| any other, or an error of another kind | That the store as a whole did not fail | no dataset |

Failures that prove nothing count once for each dataset. There is one exception: every failure of
the dataset that was stored last counts, because that dataset may be the only one in use. Every
failure also counts as long as no dataset was stored.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
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
from fletcher.util.backoff import Backoff

log = logging.getLogger(__name__)

# Errors after which a call may be repeated. Any other error counts as an answer, which proves that
# the store is available.
RETRYABLE = (UnavailableError, DeadlineExceededError)

_FAILURES = 3
# Extra pause of the caller whose try failed last, so that another dataset tries first: the trouble
# may be limited to one dataset.
_YIELD_S = 0.05


class Breaker:
    """One store's circuit breaker. Thread-safe.

    A caller is the name of a dataset, or None for a call that concerns no single dataset.

    Args:
        name: The store's name, for the log.
        retry: Lengths of the pauses while the store is unavailable.
        jitter: Callback that returns a random number from 0 to 1, for the random part of a pause.
    """

    def __init__(
        self,
        name: str,
        retry: Backoff,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._name = name
        self._retry = retry
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._failures: deque[float] = deque(maxlen=_FAILURES)  # times of failures that count
        self._failing: set[str] = set()  # datasets that failed since the last success
        self._succeeded_last: str | None = None
        self._certain = False  # the store itself is unavailable, whichever dataset calls
        self._since = 0.0  # time of the outage's first failure
        self._reason = ""
        self._retry_at: float | None = None  # None: the breaker is closed
        self._num_tries = 0
        self._trying: str | None = None
        self._tried_last: str | None = None
        self._num_outages = 0
        self._listeners: list[Callable[[], None]] = []

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after each call to an unavailable store.

        The listener must not block.
        """
        with self._lock:
            self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.remove(listener)

    def ready_at(self, caller: str | None) -> float:
        """Time from which `caller` may call the store; infinite while one tries."""
        with self._lock:
            return self._ready_at(caller)

    def held_since(self, caller: str | None) -> float | None:
        """Start of the outage that holds `caller` back; None if nothing does."""
        with self._lock:
            return self._since if self._holds_back(caller) else None

    def require_ready(self, caller: str | None) -> None:
        """Raise the error from `error_for` if `caller` may not call the store now."""
        if self.ready_at(caller) > self._clock():
            raise self.error_for(caller)

    def error_for(self, caller: str | None) -> StoreUnavailableError:
        """Error for an unavailable store, with duration, cause and time to retry."""
        with self._lock:
            delay_s = max(0.0, self._ready_at(caller) - self._clock())
            return StoreUnavailableError(
                f"the store has been unavailable for {self._clock() - self._since:.0f} s: "
                f"{self._reason}",
                field="store",
                retry_after_ms=math.ceil(
                    1000 * (delay_s if delay_s < math.inf else self._retry.first_s)
                ),
            )

    @contextmanager
    def guard_call(self, caller: str, *, proof: bool = True) -> Iterator[None]:
        """Context for a call to the store. Notes the result and does not catch errors.

        `proof`: whether success proves that the store is available. Preparing a dataset proves
        nothing: a store with a full disk still prepares datasets, but takes no rows.
        """
        with self._lock:
            if self._holds_back(caller) and self._ready_at(caller) <= self._clock():
                self._trying = self._tried_last = caller
        try:
            yield
        except BaseException as error:
            if not isinstance(error, FletcherError):
                self._note_answer(caller, proof=False)
            elif isinstance(error, OverloadedError) or not isinstance(error, RETRYABLE):
                self._note_answer(caller, proof=proof)
            elif error.field in (None, "store"):
                self._note_failure(caller, error)
            else:
                self._note_answer(caller, proof=False)
            raise
        else:
            self._note_answer(caller, proof=proof)

    @property
    def unavailable_since(self) -> float | None:
        """Time of the outage's first failed call; None if the store is available."""
        with self._lock:
            return None if self._retry_at is None else self._since

    def unavailability(self) -> float:
        """1 while the store is unavailable, else 0."""
        return float(self.unavailable_since is not None)

    def snapshot(self) -> dict[str, Any]:
        """State for the `stats` action."""
        with self._lock:
            unavailable = self._retry_at is not None
            trying = self._trying is not None
            state = "probing" if trying else "away" if unavailable else "there"
            found = {"state": state, "outages": self._num_outages}
            if unavailable:
                found["away_s"] = round(self._clock() - self._since, 3)
                found["reason"] = self._reason
            return found

    def _holds_back(self, caller: str | None) -> bool:
        return self._retry_at is not None and (self._certain or caller in self._failing)

    def _ready_at(self, caller: str | None) -> float:
        if self._retry_at is None or not self._holds_back(caller):
            return -math.inf
        if self._trying is not None:
            return math.inf
        return self._retry_at + (_YIELD_S if caller == self._tried_last else 0.0)

    def _note_failure(self, caller: str, error: FletcherError) -> None:
        now = self._clock()
        with self._lock:
            certain = error.field == "store"
            alone = self._succeeded_last in (None, caller)
            if certain or alone or caller not in self._failing:
                self._failures.append(now)
            self._failing.add(caller)
            self._certain |= certain
            self._reason = error.message
            tried = self._trying == caller
            opened = self._retry_at is None and len(self._failures) == _FAILURES
            if opened:
                self._since = self._failures[0]
                self._num_tries = 0
                self._num_outages += 1
            # While the breaker is open, only the caller that tries counts. Other calls began before
            # it opened, so their failure is no news.
            if opened or tried:
                self._trying = None
                self._num_tries += 1
                self._retry_at = now + self._retry.delay_s(
                    self._num_tries, self._jitter(), at_least_ms=error.retry_after_ms
                )
            listeners = list(self._listeners) if tried else []
        if opened:
            log.warning("store %s is unavailable: %s", self._name, error)
        for listener in listeners:
            listener()

    def _note_answer(self, caller: str, *, proof: bool) -> None:
        now = self._clock()
        with self._lock:
            was_open = self._retry_at is not None
            outage_s = now - self._since
            if proof:
                self._failures.clear()
                self._failing.clear()
                self._succeeded_last, self._certain = caller, False
                self._retry_at = self._trying = self._tried_last = None
            elif self._trying == caller:
                self._retry_at, self._trying, self._tried_last = now, None, None
            listeners = list(self._listeners) if was_open else []
        if was_open and proof:
            log.info("store %s is available again after %.3g s", self._name, outage_s)
        for listener in listeners:
            listener()
