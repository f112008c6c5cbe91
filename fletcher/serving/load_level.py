"""How hard the house is pressed, in three grades, and what each of them changes.

`normal`: nothing. `moderate`: there is plenty to do, so bulk work is planned in larger windows,
which lose less to padding and answer later. `severe`: bulk streams leave half of the common memory
free, and new ones are refused with a hint; interactive work goes on, and what was accepted stays
accepted.

Full memory alone is not severe: one fast upload fills it on every healthy server, and a second one
takes its turns beside it. Severe is what waiting does not mend: the store is away and what holds
its rows meanwhile is nearly full, the places for streams are nearly taken, or most streams have
waited very long for memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fletcher.telemetry.tracing import Telemetry

log = logging.getLogger(__name__)

# A level is left below this share of the threshold that entered it.
_LEAVE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class LoadTiming:
    """When the load level is looked at and left.

    Attributes:
        leave_after_s: How long signals must be lower before a level is left: one upload lets the
            use of memory swing with every row slice.
        interval_s: Between two looks.
    """

    leave_after_s: float = 3.0
    interval_s: float = 0.25


class LoadLevel(IntEnum):
    """From no pressure to much."""

    NORMAL = 0
    MODERATE = 1
    SEVERE = 2


@dataclass(frozen=True, slots=True)
class Signals:
    """What pressure is told by; shares are from 0 to 1.

    Attributes:
        memory: Share of the memory budget in use.
        streams: Share of the places for streams that are taken.
        starving: Share of the open streams that have waited very long for memory; 0 where only
            one has, which has but itself to wait for.
        journal: Share of the journal's bytes in use; None: there is no journal.
        store_away: A store has failed and not answered since.
        queue: Tokens that wait unplanned, in windows.
    """

    memory: float = 0.0
    streams: float = 0.0
    starving: float = 0.0
    journal: float | None = None
    store_away: bool = False
    queue: float = 0.0


def judge(signals: Signals, share: float = 1.0) -> tuple[LoadLevel, str]:
    """The grade that the signals stand for, and the reason in words.

    Args:
        signals: As they are now.
        share: Of each threshold, what is enough.
    """
    held = signals.memory if signals.journal is None else signals.journal
    where = "the memory" if signals.journal is None else "the journal"
    severe = (
        (
            signals.store_away and held >= 0.9 * share,
            f"a store is away and {where} for its rows is {held:.0%} full",
        ),
        (signals.streams >= 0.9 * share, f"{signals.streams:.0%} of the streams are open"),
        (signals.starving >= 0.5 * share, f"{signals.starving:.0%} of the streams starve"),
    )
    moderate = (
        # Two of the larger windows: one to compute, one to gather meanwhile.
        (signals.queue >= 8 * share, f"{signals.queue:.0f} windows of tokens wait"),
        (signals.memory >= 0.75 * share, f"{signals.memory:.0%} of the memory is in use"),
        (held >= 0.75 * share, f"{where} for the stores' rows is {held:.0%} full"),
    )
    for grade, reasons in ((LoadLevel.SEVERE, severe), (LoadLevel.MODERATE, moderate)):
        for holds, reason in reasons:
            if holds:
                return grade, reason
    return LoadLevel.NORMAL, "there is room"


class LoadMonitor:
    """The grade now: entered at once, left with hesitation, logged and counted. Thread-safe.

    Args:
        sample: Tells the signals; called by `observe` alone, must not block.
        telemetry: Where the grade and the seconds spent in each are shown.
        on_change: Told each new grade, in their order; must not observe.
        clock: Seconds that only grow.
        timing: Intervals.
    """

    def __init__(
        self,
        sample: Callable[[], Signals],
        telemetry: Telemetry,
        on_change: Callable[[LoadLevel], None],
        clock: Callable[[], float] = time.monotonic,
        timing: LoadTiming | None = None,
    ) -> None:
        self.timing = timing or LoadTiming()
        self.level = LoadLevel.NORMAL
        self.reason = ""
        self._sample = sample
        self._telemetry = telemetry
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._since = self._observed = clock()
        self._calm_since: float | None = None
        self._stopped = threading.Event()
        telemetry.pressure_grade.observe(lambda: self.level)

    def observe(self) -> LoadLevel:
        """Takes the signals as they are now, and tells the grade that follows."""
        signals = self._sample()
        with self._lock:
            now = self._clock()
            name = self.level.name.lower()
            self._telemetry.pressure_time.add(now - self._observed, grade=name)
            self._observed = now
            before = self.level
            grade, self.reason = self._next(signals, now)
            if grade is before:
                return grade
            self.level, self._since, self._calm_since = grade, now, None
            log.log(
                logging.WARNING if LoadLevel.SEVERE in (grade, before) else logging.INFO,
                "pressure: %s after %s: %s",
                grade.name.lower(),
                before.name.lower(),
                self.reason,
            )
            self._on_change(grade)
            return grade

    def start(self) -> None:
        """Observes from now on, in a thread of its own, until `stop`."""
        threading.Thread(target=self._watch, name="pressure", daemon=True).start()

    def close(self) -> None:
        """Ends `watch`. Idempotent."""
        self._stopped.set()

    def statistics(self) -> dict[str, Any]:
        """The grade, since when and why."""
        with self._lock:
            return {
                "grade": self.level.name.lower(),
                "for_s": round(self._clock() - self._since, 3),
                "reason": self.reason,
            }

    def _next(self, signals: Signals, now: float) -> tuple[LoadLevel, str]:
        grade, reason = judge(signals)
        if grade >= self.level:
            self._calm_since = None
            return grade, reason
        lingering, why = judge(signals, _LEAVE_SHARE)
        if lingering >= self.level:
            self._calm_since = None
            return self.level, why
        if self._calm_since is None:
            self._calm_since = now
        if now - self._calm_since < self.timing.leave_after_s:
            return self.level, self.reason
        return lingering, why

    def _watch(self) -> None:
        while not self._stopped.wait(self.timing.interval_s):
            try:
                self.observe()
            except Exception:
                log.exception("the pressure cannot be told")
