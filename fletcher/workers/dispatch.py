"""Choice of the worker for the next job: a pure function of loads and rates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fletcher.config.engine import DISPATCHES

STRATEGIES = DISPATCHES


@dataclass(frozen=True, slots=True)
class DispatchCandidate:
    """A worker with room for a job.

    Attributes:
        in_flight: Total cost of the worker's unfinished jobs.
        rate: Measured cost per second; None before the first measurement.
        degraded: Whether the worker is slower than before, or fails now and then.
    """

    name: str
    in_flight: int = 0
    rate: float | None = None
    degraded: bool = False


class WorkerChooser:
    """Chooses workers by one of `STRATEGIES`. Not thread-safe.

    `throughput-weighted` takes the worker that will be free first. Idle workers share jobs by
    virtual time (https://en.wikipedia.org/wiki/Weighted_fair_queueing). For each job, a worker is
    charged the seconds that the job takes there, and the worker with the fewest seconds gets the
    next job. So each worker gets work in proportion to its rate, and slow workers are measured
    again now and then. A new worker starts even with the others. The other strategies ignore rates.
    They give degraded workers only the jobs for which no other worker has room.
    """

    def __init__(self, strategy: str, rng: random.Random | None = None) -> None:
        assert strategy in STRATEGIES
        self._strategy = strategy
        self._rng = rng or random.Random()  # noqa: S311 - no secret
        self._given_s: dict[str, float] = {}  # virtual time by worker
        self._now_s = 0.0  # virtual time of the last choice
        self._last_given: dict[str, int] = {}
        self._num_given = 0

    def choose(self, candidates: Sequence[DispatchCandidate]) -> int:
        """Returns the index of the candidate that gets the next job.

        There must be at least one candidate.
        """
        mean = mean_rate([one.rate for one in candidates]) or 1.0
        rates = [one.rate or mean for one in candidates]
        if self._strategy == "throughput-weighted":

            def order(n: int) -> tuple[float, float, int]:
                one = candidates[n]
                last_given = self._last_given.get(one.name, 0)
                return one.in_flight / rates[n], self._virtual(one), last_given

            best = min(range(len(candidates)), key=order)
            self._now_s = max(self._now_s, self._virtual(candidates[best]))
            return best
        sound = [n for n, one in enumerate(candidates) if not one.degraded]
        eligible = sound or list(range(len(candidates)))
        if self._strategy == "random":
            return self._rng.choice(eligible)
        if self._strategy == "least-loaded":
            return min(eligible, key=lambda n: candidates[n].in_flight)
        return min(eligible, key=lambda n: self._last_given.get(candidates[n].name, -1))

    def charge(self, name: str, cost: int, rate: float | None) -> None:
        """Charges a worker for a job of some cost.

        Args:
            rate: The worker's rate. Until it is measured, the mean rate of all workers; None if no
                worker is measured.
        """
        self._num_given += 1
        self._last_given[name] = self._num_given
        begun = max(self._given_s.get(name, 0.0), self._now_s)
        self._given_s[name] = begun + (cost / rate if rate else 0.0)

    def _virtual(self, one: DispatchCandidate) -> float:
        return max(self._given_s.get(one.name, 0.0), self._now_s)


def mean_rate(rates: Sequence[float | None]) -> float | None:
    """Mean of the measured rates; None if no rate is measured."""
    known = [rate for rate in rates if rate]
    return sum(known) / len(known) if known else None
