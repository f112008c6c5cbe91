"""How a worker is doing: its rate, whether it fails or slows down, when to start it again.

All of it is arithmetic on what it is told, without a clock, a thread or a process.
"""

from __future__ import annotations

import math
from typing import Literal

from fletcher.util.backoff import Backoff

State = Literal["healthy", "degraded", "ejected"]

# Seconds of a worker's own computing over which its rate is averaged.
_RATE_SPAN_S = 2.0
# Answers over which failures and slowness are averaged, and over which what is usual is.
_RECENT = 1 / 8
_USUAL = 1 / 256
_MIN_ANSWERS = 8  # of a size, before one can be called slow
_OUTLIER = 8.0  # a single run that waited for a core is no drift
_FAILURES_TO_EJECT = 3
# Degraded beyond the first, healthy again below the second: no flapping between them.
_SLOW, _NOT_SLOW = 3.0, 1.5
_FAILING, _NOT_FAILING = 0.3, 0.1

# Before a worker that failed is started again; the first time at once.
RESTART_BACKOFF = Backoff(first_s=0.5, longest_s=30.0)


class Health:
    """One worker's rate and state.

    `degraded`: its answers take three times as long as they used to for jobs of their size, and
    those of another worker do not (a busy machine slows all); or some three in ten fail.
    `ejected`: three failed in a row; it gets no work until `readmit`.

    Attributes:
        state: As above.
        slowness: Seconds of its last answers against what is usual for it, 1 on average.
    """

    def __init__(self) -> None:
        self.state: State = "healthy"
        self._work = 0.0
        self._busy_s = 0.0
        self.slowness = 1.0
        self._failing = 0.0  # share of answers
        self._failures = 0  # in a row
        # Answers and their mean seconds by the size's power of two: small jobs cost more.
        self._usual_s: dict[int, tuple[int, float]] = {}

    @property
    def rate(self) -> float | None:
        """Cost done in a second of computing; None before the first answer."""
        return self._work / self._busy_s if self._busy_s else None

    def answered(self, cost: int, seconds: float, others: float | None = None) -> None:
        """A job of this cost took so long in the worker.

        Args:
            cost: The job's.
            seconds: In the worker.
            others: The least slowness of the other workers; None: there are none.
        """
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

    def failed(self) -> None:
        """The worker could not do a job, for a reason that is not the request's."""
        self._failures += 1
        self._failing += _RECENT * (1 - self._failing)
        self._judge(1.0)

    def readmit(self) -> None:
        """An ejected worker did what it was probed with: it has to prove itself further."""
        self._failures = 0
        self.state = "degraded"

    def restarted(self) -> None:
        """A new process in its place; the device, and what is usual on it, are the same."""
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
