"""Rate and health of a worker, computed from its answers.

This module is pure arithmetic: it uses no clock, thread or process.
"""

from __future__ import annotations

import math
from typing import Literal

from fletcher.util.backoff import Backoff

State = Literal["healthy", "degraded", "ejected"]

# Seconds of computing over which a worker's rate is averaged.
_RATE_SPAN_S = 2.0
# Weight of one answer: in the averages of failures and slowness, and in the usual duration.
_RECENT = 1 / 8
_USUAL = 1 / 256
_MIN_ANSWERS = 8  # of one size, before slowness is measured
_OUTLIER = 8.0  # limit of one run's slowness, if it waited for a core
_FAILURES_TO_EJECT = 3
# A worker is degraded above the first value of a pair, and healthy again below the second. The gap
# prevents flapping.
_SLOW, _NOT_SLOW = 3.0, 1.5
_FAILING, _NOT_FAILING = 0.3, 0.1

# Delays before a failed worker is started again. The first restart has no delay.
RESTART_BACKOFF = Backoff(first_s=0.5, longest_s=30.0)


class Health:
    """One worker's rate and state.

    A worker is `degraded` if its answers take three times as long as usual for jobs of their size,
    relative to the least slow other worker. So a busy machine, which slows all workers, does not
    degrade them. A worker is also `degraded` if about three in ten of its answers fail. After three
    failures in a row a worker is `ejected`, and gets no work until `readmit`.

    Attributes:
        state: `healthy`, `degraded` or `ejected`.
        slowness: Duration of recent answers, divided by the usual duration; 1 on average.
    """

    def __init__(self) -> None:
        self.state: State = "healthy"
        self._work = 0.0
        self._busy_s = 0.0
        self.slowness = 1.0
        self._failing = 0.0  # share of answers
        self._failures = 0  # in a row
        # Number of answers and their mean seconds, by the power of two of the job's cost. Small
        # jobs take more time for their cost.
        self._usual_s: dict[int, tuple[int, float]] = {}

    @property
    def rate(self) -> float | None:
        """Job cost done in a second of computing; None before the first answer."""
        return self._work / self._busy_s if self._busy_s else None

    def record_answer(self, cost: int, seconds: float, others: float | None = None) -> None:
        """Records an answer; `others` is the least slowness of the other workers."""
        seconds = max(seconds, 1e-6)
        kept = math.exp(-seconds / _RATE_SPAN_S)
        self._work = self._work * kept + cost
        self._busy_s = self._busy_s * kept + seconds
        size = cost.bit_length()
        num, usual = self._usual_s.get(size, (0, seconds))
        if num >= _MIN_ANSWERS:
            self.slowness += _RECENT * (min(seconds / usual, _OUTLIER) - self.slowness)
        usual += (_USUAL if num >= _MIN_ANSWERS else 1 / (num + 1)) * (seconds - usual)
        self._usual_s[size] = (num + 1, usual)
        self._failures = 0
        self._failing -= _RECENT * self._failing
        self._judge(self.slowness / max(1.0, others) if others is not None else 1.0)

    def record_failure(self) -> None:
        """Records a job that failed for a reason other than its request."""
        self._failures += 1
        self._failing += _RECENT * (1 - self._failing)
        self._judge(1.0)

    def readmit(self) -> None:
        """Lets an ejected worker have work again, as `degraded`: it answered its probe."""
        self._failures = 0
        self.state = "degraded"

    def record_restart(self) -> None:
        """Resets the state for a new process, but keeps the device's usual durations."""
        self._failures, self._failing, self.slowness = 0, 0.0, 1.0
        self._work = self._busy_s = 0.0
        self.state = "healthy"

    def _judge(self, slowness: float) -> None:
        if self.state == "ejected" or self._failures >= _FAILURES_TO_EJECT:
            self.state = "ejected"
        elif self._failing > _FAILING or slowness > _SLOW:
            self.state = "degraded"
        elif self._failing < _NOT_FAILING and slowness < _NOT_SLOW:
            self.state = "healthy"
