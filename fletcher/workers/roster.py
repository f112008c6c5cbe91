"""Roster: the workers of one pool, their states, and the choice among them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fletcher.workers.dispatch import STRATEGIES, DispatchCandidate, WorkerChooser, mean_rate
from fletcher.workers.jobs import Job
from fletcher.workers.messages import WorkerSpec
from fletcher.workers.worker_handle import Owner, WorkerHandle

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolTiming:
    """Durations of a pool, in seconds.

    Attributes:
        start_timeout_s: Longest time for a worker to load and warm up.
        answer_timeout_s: Longest time that a job may run. After that its worker is replaced.
        idle_poll_s: Longest wait for a bulk job before the dispatcher checks the pool again.
        watch_s: Interval at which running jobs are checked.
        patience_s: Time without any usable worker after which jobs fail. A worker that died usually
            works again within seconds, and clients would rather wait than get an error.
    """

    start_timeout_s: float = 300.0
    answer_timeout_s: float = 120.0
    idle_poll_s: float = 0.5
    watch_s: float = 0.5
    patience_s: float = 30.0


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Workers of a pool, and how jobs are given to them.

    Attributes:
        name: Name of the pool's kind of worker, for logs and errors.
        standby: Workers that start when none of `workers` is left, and end when one of `workers` is
            usable again.
        dispatch: Strategy for the choice among workers with room; one of `STRATEGIES`.
        prefetch: Number of bulk requests that a worker holds beyond those it is running.
        max_attempts: A job fails when so many workers died of it or failed at it.
        probe: Payload that every sound worker can answer. None: failing workers are not ejected.
    """

    name: str
    workers: Sequence[WorkerSpec]
    standby: Sequence[WorkerSpec] = ()
    dispatch: str = STRATEGIES[0]
    prefetch: int = 1
    max_attempts: int = 2
    probe: Any = None
    timing: PoolTiming = field(default_factory=PoolTiming)


@dataclass(frozen=True, slots=True)
class PoolEvents:
    """Callbacks of a pool, which get the name of a worker. They must not block.

    Attributes:
        on_restart: Called each time a worker died.
        on_state: Called with each new state of a worker.
    """

    on_restart: Callable[[str], None] = lambda _name: None
    on_state: Callable[[str, str], None] = lambda _name, _state: None


class Roster:
    """Handles of a pool's workers. All methods are called with `changed` held."""

    def __init__(self, config: PoolConfig, owner: Owner, events: PoolEvents) -> None:
        self._config = config
        self._changed: threading.Condition = owner.changed
        self._events = events
        self._chooser = WorkerChooser(config.dispatch)
        limits: dict[str, Any] = {
            "prefetch": config.prefetch,
            "start_timeout_s": config.timing.start_timeout_s,
        }
        self.regular = [WorkerHandle(spec, owner, **limits) for spec in config.workers]
        self.standby = [
            WorkerHandle(spec, owner, **limits, wanted=False) for spec in config.standby
        ]
        self.by_name = {one.spec.name: one for one in (*self.regular, *self.standby)}
        self._states = {name: one.state for name, one in self.by_name.items()}
        self._alone_s = 0.0  # how long there has been no usable worker

    @property
    def all(self) -> list[WorkerHandle]:
        """Regular workers, then those on standby."""
        return list(self.by_name.values())

    @property
    def concurrency(self) -> int:
        return sum(one.concurrency for one in self.by_name.values() if one.wanted.is_set())

    @property
    def usable(self) -> bool:
        return any(one.usable for one in self.by_name.values())

    @property
    def gone(self) -> bool:
        if self.usable:
            return False
        wanted = [one for one in self.by_name.values() if one.wanted.is_set()]
        is_late = self._alone_s > self._config.timing.patience_s
        return is_late or all(one.failure is not None for one in wanted)

    def choose(self, *, retried: Job | None = None, urgent: bool = False) -> WorkerHandle | None:
        """Returns a worker with room for a job, if there is one.

        Args:
            retried: A job that a worker died of or failed at. It gets a worker without other jobs,
                and not the same worker again if possible. If this worker fails too, the job is the
                likely cause.
            urgent: Whether the job is urgent.
        """
        usable = [one for one in self.by_name.values() if one.usable]
        if retried is not None:
            usable = [one for one in usable if one.spec.name != retried.worker] or usable
        free = [one for one in usable if one.has_room(alone=retried is not None, urgent=urgent)]
        if not free:
            return None
        return free[self._chooser.choose([_candidate(one) for one in free])]

    def charge(self, handle: WorkerHandle, cost: int) -> None:
        """Charges a worker for a job, which later choices take into account."""
        rate = handle.rate or mean_rate([one.rate for one in self.by_name.values()])
        self._chooser.charge(handle.spec.name, cost, rate)

    def idle_worker(self) -> str | None:
        found = None
        for name, one in self.by_name.items():
            if not one.idle:
                return None
            if found is None and one.usable:
                found = name
        return found

    def review(self, handle: WorkerHandle) -> None:
        """Reports a worker's state if it changed, and wakes waiting threads."""
        if handle.health.state == "ejected" and self._config.probe is None:
            handle.health.readmit()
        self._call_standby()
        name, state = handle.spec.name, handle.state
        before, self._states[name] = self._states[name], state
        if state != before:
            self._events.on_state(name, state)
            if state == "down":
                log.warning("%s is down: cannot start: %s", name, handle.failure)
            elif state in ("degraded", "ejected"):
                log.warning("%s is %s, it was %s", name, state, before)
            elif state == "healthy" and handle.settled.is_set():
                log.info("%s is healthy again, it was %s", name, before)
        self._changed.notify_all()

    def least_slowness(self, handle: WorkerHandle) -> float | None:
        others = [one.health for one in self.by_name.values() if one.usable and one is not handle]
        return min((health.slowness for health in others), default=None)

    def elapse(self, elapsed_s: float) -> None:
        """Adds time to all running jobs, and ends workers whose job exceeds its limit."""
        self._alone_s = 0.0 if self.usable else self._alone_s + elapsed_s
        for one in self.by_name.values():
            self._end_overdue(one, elapsed_s)
        self._call_standby()
        self._changed.notify_all()

    def _call_standby(self) -> None:
        """Starts standby workers if no regular worker is left.

        Ends idle standby workers if a regular worker is usable.
        """
        if any(one.usable for one in self.regular):
            for one in self.standby:
                one.wanted.clear()
                if one.alive and one.idle:
                    one.kill()
        elif self._alone_s > self._config.timing.patience_s or all(
            one.failure for one in self.regular
        ):
            for one in self.standby:
                if not one.wanted.is_set():
                    name = self._config.name
                    log.warning("%s takes over: no regular %s is left", one.spec.name, name)
                    one.wanted.set()

    def _end_overdue(self, handle: WorkerHandle, elapsed_s: float) -> None:
        for job in handle.running():
            job.running_s += elapsed_s
            if job.running_s > self._config.timing.answer_timeout_s:
                log.warning(
                    "%s gave no answer for %.3g s; replacing it", handle.spec.name, job.running_s
                )
                handle.kill()
                return


def start_failures(handles: Sequence[WorkerHandle]) -> list[Exception]:
    """Waits until each worker has started or failed; returns the failures."""
    for one in handles:
        one.settled.wait()
    return [one.failure for one in handles if one.failure is not None]


def _candidate(handle: WorkerHandle) -> DispatchCandidate:
    degraded = handle.health.state == "degraded"
    return DispatchCandidate(handle.spec.name, handle.load, handle.rate, degraded)
