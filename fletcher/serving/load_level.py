"""Load level of the server: `normal`, `moderate` or `severe`.

| level | meaning | effect |
|---|---|---|
| `normal` | resources are free | none |
| `moderate` | much work waits | larger batch windows for bulk work, which need less padding and delay answers |
| `severe` | waiting does not reduce the load | bulk streams leave half of the shared memory free, and new bulk streams are refused |

Interactive work and accepted uploads continue under `severe`.

Full memory alone does not make the level `severe`: one fast upload fills the memory of every
healthy server, and a second upload shares it. The level is `severe` if a store does not answer
while the space for its rows is nearly full. It is also `severe` if nearly all allowed streams are
open, or if at least half of the open streams have waited very long for memory.
"""  # noqa: E501 - a table

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fletcher.telemetry.tracing import Telemetry

log = logging.getLogger(__name__)

# The level drops when the signals are below this share of the thresholds at which it rose.
_LEAVE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class LoadTiming:
    """Intervals of sampling and leaving a load level."""

    interval_s: float = 0.25  # between two samples
    # How long signals must stay lower before the level drops. One upload makes the memory in use
    # rise and fall with every row slice.
    leave_after_s: float = 3.0


class LoadLevel(IntEnum):
    """Load of the server, lowest first."""

    NORMAL = 0
    MODERATE = 1
    SEVERE = 2


@dataclass(frozen=True, slots=True)
class LoadSignals:
    """Inputs of the load level; shares are from 0 to 1."""

    memory: float = 0.0  # share of the shared memory in use
    streams: float = 0.0  # open streams, as a share of the allowed ones
    # Share of the open streams that have waited very long for memory. 0 if only one stream waits,
    # because it waits for memory that it holds itself.
    starving: float = 0.0
    journal: float | None = None  # share of the journal's bytes in use; None without a journal
    store_unavailable: bool = False  # a store has failed and not answered since
    queue: float = 0.0  # tokens that wait to be planned, counted in batch windows


def classify_load(signals: LoadSignals, share: float = 1.0) -> tuple[LoadLevel, str]:
    """Load level for signals, and its reason; `share` scales the thresholds."""
    held = signals.memory if signals.journal is None else signals.journal
    where = "the memory" if signals.journal is None else "the journal"
    severe = (
        (
            signals.store_unavailable and held >= 0.9 * share,
            f"a store is unavailable and {where} for its rows is {held:.0%} full",
        ),
        (signals.streams >= 0.9 * share, f"{signals.streams:.0%} of the streams are open"),
        (signals.starving >= 0.5 * share, f"{signals.starving:.0%} of the streams starve"),
    )
    moderate = (
        # This is two of the larger windows: one is computed while the other one fills.
        (signals.queue >= 8 * share, f"{signals.queue:.0f} windows of tokens wait"),
        (signals.memory >= 0.75 * share, f"{signals.memory:.0%} of the memory is in use"),
        (held >= 0.75 * share, f"{where} for the stores' rows is {held:.0%} full"),
    )
    for level, reasons in ((LoadLevel.SEVERE, severe), (LoadLevel.MODERATE, moderate)):
        for holds, reason in reasons:
            if holds:
                return level, reason
    return LoadLevel.NORMAL, "there is room"


class LoadMonitor:
    """Current load level: rises immediately, drops after a delay. Thread-safe.

    Args:
        sample: Returns the current signals. Must not block.
        telemetry: Records the level, and the seconds spent in each level.
        on_change: Called with each new level, in the order of the changes. Must not call `observe`.
        clock: Monotonic clock, in seconds.
    """

    def __init__(
        self,
        sample: Callable[[], LoadSignals],
        telemetry: Telemetry,
        on_change: Callable[[LoadLevel], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timing = LoadTiming()
        self.level = LoadLevel.NORMAL
        self.reason = ""
        self._sample = sample
        self._telemetry = telemetry
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._since = self._observed = clock()
        self._lower_since: float | None = None
        self._closed = threading.Event()
        telemetry.pressure_grade.observe(lambda: self.level)

    def start(self) -> None:
        """Start a thread that calls `observe` regularly until `close`."""
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closed.set()

    def observe(self) -> LoadLevel:
        """Take a sample of the signals, and return the resulting level."""
        signals = self._sample()
        with self._lock:
            now, before = self._clock(), self.level
            old = before.name.lower()
            self._telemetry.pressure_time.add(now - self._observed, grade=old)
            self._observed = now
            level, self.reason = self._next_level(signals, now)
            if level is before:
                return level
            self.level, self._since, self._lower_since = level, now, None
            severity = logging.WARNING if LoadLevel.SEVERE in (level, before) else logging.INFO
            new = level.name.lower()
            log.log(severity, "load level: %s after %s: %s", new, old, self.reason)
            self._on_change(level)
            return level

    def statistics(self) -> dict[str, Any]:
        """The level (`grade` on the wire), its age in seconds, and its reason."""
        with self._lock:
            return {
                "grade": self.level.name.lower(),
                "for_s": round(self._clock() - self._since, 3),
                "reason": self.reason,
            }

    def _next_level(self, signals: LoadSignals, now: float) -> tuple[LoadLevel, str]:
        level, reason = classify_load(signals)
        if level >= self.level:
            self._lower_since = None
            return level, reason
        lowered, why = classify_load(signals, _LEAVE_SHARE)
        if lowered >= self.level:
            self._lower_since = None
            return self.level, why
        if self._lower_since is None:
            self._lower_since = now
        if now - self._lower_since < self.timing.leave_after_s:
            return self.level, self.reason
        return lowered, why

    def _run(self) -> None:
        while not self._closed.wait(self.timing.interval_s):
            try:
                self.observe()
            except BaseException:
                with contextlib.suppress(BaseException):  # else this thread would end
                    log.exception("the load level cannot be determined")
