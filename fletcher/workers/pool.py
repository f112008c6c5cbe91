"""A pool of worker processes that pulls its work from a source, one job for each free slot.

A worker has `concurrency` requests running and `prefetch` more waiting in it, so that it never
idles between two; everything else stays with the source. Urgent work has room of its own in a
worker, where it overtakes what waits; it is given by the thread that brings it, or by the one that
brings the answer that made room, without a change of threads. A worker that dies is started again
and its jobs are done once more elsewhere; a job whose worker died or failed `max_attempts` times
fails alone.

A worker that fails at one job after the other is ejected: it gets a probe instead of work, and
comes back or is replaced. One that says nothing for too long is replaced. Where no worker is left,
those that stand by take over, and go when the others are back; where there are none, jobs fail with
an error that passes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fletcher.errors import InternalError, OverloadedError
from fletcher.workers.dispatch import STRATEGIES, DispatchCandidate, WorkerChooser, mean_rate
from fletcher.workers.jobs import Job, JobSource
from fletcher.workers.messages import WorkerSpec
from fletcher.workers.worker_handle import WorkerHandle

log = logging.getLogger(__name__)

_IDLE_POLL_S = 0.5
_WATCH_S = 0.5
# A worker that died is mostly back within seconds; clients would rather wait than be told.
_PATIENCE_S = 30.0
_RETRY_MS = 5000


class WorkerPool:
    """Worker processes for one kind of work.

    Args:
        name: For logs.
        specs: One for each worker.
        source: Asked for a job whenever a slot is free.
        urgent: Asked for an urgent job by `hurry`; by one thread at a time, and must not block.
        standby: Workers that are started when none of `specs` is left, and ended when one is back.
        dispatch: Which of several free workers gets a job; one of `STRATEGIES`.
        prefetch: Requests a worker holds beyond those it is running.
        max_attempts: Deaths and failures of workers after which a job is given up.
        start_timeout_s: How long a worker may take to load and warm up.
        answer_timeout_s: How long a job may run before its worker is replaced.
        probe: A payload that every sound worker answers; None: workers that fail are not ejected.
        on_restart: Called with a worker's name each time it died.
        on_state: Called with a worker's name and its new state.
    """

    def __init__(
        self,
        name: str,
        specs: Sequence[WorkerSpec],
        source: JobSource,
        *,
        urgent: Callable[[], Job | None] = lambda: None,
        standby: Sequence[WorkerSpec] = (),
        dispatch: str = STRATEGIES[0],
        prefetch: int = 1,
        max_attempts: int = 2,
        start_timeout_s: float = 300.0,
        answer_timeout_s: float = 120.0,
        probe: Any = None,
        on_restart: Callable[[str], None] = lambda _name: None,
        on_state: Callable[[str, str], None] = lambda _name, _state: None,
    ) -> None:
        self.name = name
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self.probe = probe
        self._source = source
        self._urgent = urgent
        self._inline: Callable[[Any], Any] | None = None
        self._running_inline = threading.Lock()
        self._hurrying = threading.Lock()
        self._hurried = False  # since the holder last looked
        self._chooser = WorkerChooser(dispatch)
        self._max_attempts = max_attempts
        self._answer_timeout_s = answer_timeout_s
        self._on_restart = on_restart
        self._on_state = on_state
        self._retries: deque[Job] = deque()
        limits: dict[str, Any] = {"prefetch": prefetch, "start_timeout_s": start_timeout_s}
        self._regular = [WorkerHandle(spec, self, **limits) for spec in specs]
        self._standby = [WorkerHandle(spec, self, **limits, wanted=False) for spec in standby]
        self._slots = {slot.spec.name: slot for slot in (*self._regular, *self._standby)}
        self._states = {name: slot.state for name, slot in self._slots.items()}
        self._alone_s = 0.0  # how long there has been no usable worker
        self._dispatcher = threading.Thread(target=self._dispatch, name=f"{name}-pool", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True)

    def start(self, load_inline: Callable[[], Callable[[Any], Any] | None] = lambda: None) -> None:
        """Starts all workers at once and waits until each is warm.

        Where none can start, those that stand by are started.

        Args:
            load_inline: Called meanwhile; gives what does a job's work in this process, as a worker
                would: one at a time, and only where no worker has anything to do and a thread is
                lent for it.

        Raises:
            FletcherError: A worker could not load; nothing is left running.
        """
        for slot in self._slots.values():
            slot.thread.start()
        try:
            self._inline = load_inline()
        except BaseException:
            self.close()
            raise
        failed = _failures(self._regular)
        if failed and len(failed) == len(self._regular) and self._standby:
            log.warning("%s: none can start: %s", self.name, failed[0])
            failed = _failures(self._standby)
        if failed:
            self.close()
            raise failed[0]
        self._dispatcher.start()
        self._watcher.start()

    def close(self) -> None:
        """Ends the workers; jobs still in them fail. Idempotent."""
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        for slot in self._slots.values():
            slot.wanted.set()
            slot.kill()
        for thread in [
            self._dispatcher,
            self._watcher,
            *(slot.thread for slot in self._slots.values()),
        ]:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5.0)
        for job in self._retries:
            job.finish(None, InternalError("the server is shutting down"))
        self._retries.clear()

    def statistics(self) -> list[dict[str, Any]]:
        """A snapshot for each worker: its state, its rate, what it holds."""
        with self.changed:
            return [slot.statistics() for slot in self._slots.values()]

    @property
    def concurrency(self) -> int:
        """Jobs that run at the same time when all workers live."""
        return sum(slot.concurrency for slot in self._slots.values() if slot.wanted.is_set())

    @property
    def usable(self) -> bool:
        """Whether any worker takes work."""
        return any(slot.usable for slot in self._slots.values())

    @property
    def gone(self) -> bool:
        """Whether no worker takes work and none will soon: jobs fail."""
        if self.usable:
            return False
        wanted = [slot for slot in self._slots.values() if slot.wanted.is_set()]
        return self._alone_s > _PATIENCE_S or all(slot.failure is not None for slot in wanted)

    def error(self) -> OverloadedError:
        """What a request gets while the pool is `gone`."""
        return OverloadedError(
            f"no {self.name} worker is running; they are being restarted, try again later",
            retry_after_ms=_RETRY_MS,
        )

    @property
    def names(self) -> list[str]:
        """The workers' names."""
        return list(self._slots)

    def is_usable(self, name: str) -> bool:
        """Whether a worker takes work."""
        return self._slots[name].usable

    def rate(self, name: str) -> float:
        """Cost that a worker gets done in a second when it is busy; 0 before it is measured."""
        return self._slots[name].rate or 0.0

    def concurrency_of(self, name: str) -> int:
        """Jobs that a worker runs at the same time, beside urgent ones."""
        return self._slots[name].concurrency

    def process_ids(self) -> list[int]:
        """The live workers' process ids."""
        with self.changed:
            return [
                slot.process.pid for slot in self._slots.values() if slot.alive and slot.process
            ]

    def hurry(self) -> None:
        """Gives urgent jobs to workers as long as there are some and there is room.

        To be called when there is a new one. Those that find no room are given later, from here.
        """
        self._hurried = True
        while self._hurried and self._hurrying.acquire(blocking=False):
            # Who finds it taken does not wait: the holder comes round again.
            try:
                self._hurried = False
                self._give_urgent()
            finally:
                self._hurrying.release()

    def _give_urgent(self) -> None:
        while not self.closing.is_set():
            with self.changed:
                # What is done again waits for an empty worker: nothing goes in between.
                slot = None if self._retries else self._choose(urgent=True)
                gone = slot is None and self.gone
            if slot is None and not gone:
                return
            job = self._urgent()
            if job is None:
                return
            if slot is None:
                job.finish(None, self.error())
            elif not self._lend(slot, job):
                self._give(slot, job)

    def _lend(self, slot: WorkerHandle, job: Job) -> bool:
        """Has a job done in this process, in the name of a worker; False: it goes to that one."""
        inline, lend = self._inline, job.lend
        if inline is None or lend is None or not all(one.idle for one in self._slots.values()):
            return False
        if not self._running_inline.acquire(blocking=False):
            return False

        def work() -> None:
            try:
                result = inline(job.payload)
            except Exception as error:
                log.exception("%s: a job failed in this process; a worker gets it", self.name)
                self._running_inline.release()
                job.attempts += 1
                self.again(job, error)
            else:
                self._running_inline.release()
                job.finish(result, None)

        job.worker = slot.spec.name
        if not lend(work):
            self._running_inline.release()
            return False
        return True

    # The dispatcher: a slot first, then the job for it, so that the choice of job is made late.

    def _dispatch(self) -> None:
        while not self.closing.is_set():
            slot, again = self._free_slot()
            if self.closing.is_set():
                return
            job = self._retries.popleft() if again else self._source.next_job(_IDLE_POLL_S)
            if job is None:
                continue
            # The job may have been long in coming.
            if self.gone:
                job.finish(None, self.error())
                continue
            if slot is None or not slot.usable:
                self._retries.appendleft(job)
                continue
            self._give(slot, job)
            self.hurry()  # for what was passed over while this was sent

    def _give(self, slot: WorkerHandle, job: Job) -> None:
        try:
            slot.give(job)
        except Exception as error:
            log.exception("%s: a job cannot be sent", self.name)
            job.finish(None, InternalError(f"{type(error).__name__}; the log has more"))
        with self.changed:
            rate = slot.rate or mean_rate([one.rate for one in self._slots.values()])
            self._chooser.given(slot.spec.name, job.cost, rate)

    def _free_slot(self) -> tuple[WorkerHandle | None, bool]:
        """A worker with room, and whether it is for a job that is done again.

        No worker where none is alive and none will be soon. A job whose worker died or failed gets
        another for itself: if that does too, the job is to blame.
        """
        with self.changed:
            while not self.closing.is_set():
                alone = bool(self._retries)
                slot = self._choose(again=self._retries[0] if alone else None)
                if slot is not None:
                    return slot, alone
                if self.gone:
                    return None, alone
                self.changed.wait()
            return None, False

    def _choose(self, *, again: Job | None = None, urgent: bool = False) -> WorkerHandle | None:
        """A worker with room; called with `changed` held."""
        usable = [slot for slot in self._slots.values() if slot.usable]
        if again is not None:
            usable = [slot for slot in usable if slot.spec.name != again.worker] or usable
        free = [one for one in usable if one.has_room(alone=again is not None, urgent=urgent)]
        if not free:
            return None
        return free[self._chooser.choose([_candidate(slot) for slot in free])]

    # What the slots ask of their owner.

    def review(self, slot: WorkerHandle) -> None:
        """A slot's jobs or state have changed; called with `changed` held."""
        if slot.health.state == "ejected" and self.probe is None:
            slot.health.readmit()
        self._call_standby()
        name, state = slot.spec.name, slot.state
        before, self._states[name] = self._states[name], state
        if state != before:
            self._on_state(name, state)
            if state == "down":
                log.warning("%s is down: cannot start: %s", name, slot.failure)
            elif state in ("degraded", "ejected"):
                log.warning("%s is %s, it was %s", name, state, before)
            elif state == "healthy" and slot.settled.is_set():
                log.info("%s is healthy again, it was %s", name, before)
        self.changed.notify_all()

    def least_slowness(self, slot: WorkerHandle) -> float | None:
        """Of the workers besides this one, how much slower than usual the soundest is."""
        others = [one.health for one in self._slots.values() if one.usable and one is not slot]
        return min((health.slowness for health in others), default=None)

    def died(self, slot: WorkerHandle) -> None:
        """A worker's process has ended."""
        self._on_restart(slot.spec.name)

    def again(self, job: Job, error: Exception) -> None:
        """A job comes back; it is given up with `error` if it was tried often enough."""
        if job.probe or job.attempts >= self._max_attempts or self.closing.is_set():
            job.finish(None, error)
            return
        with self.changed:
            self._retries.append(job)
            self.changed.notify_all()

    def _call_standby(self) -> None:
        """Workers that stand by are wanted while no regular one is left."""
        if any(slot.usable for slot in self._regular):
            for slot in self._standby:
                slot.wanted.clear()
                if slot.alive and slot.idle:
                    slot.kill()
        elif self._alone_s > _PATIENCE_S or all(slot.failure for slot in self._regular):
            for slot in self._standby:
                if not slot.wanted.is_set():
                    log.warning("%s takes over: no regular %s is left", slot.spec.name, self.name)
                    slot.wanted.set()

    def _watch(self) -> None:
        """Ends workers whose jobs run too long; counts how long there has been no worker."""
        last = time.monotonic()
        while not self.closing.wait(min(_WATCH_S, self._answer_timeout_s / 4)):
            now = time.monotonic()
            # After a pause of the whole machine or container, nobody has been slow.
            elapsed_s, last = min(now - last, 2 * _WATCH_S), now
            with self.changed:
                self._alone_s = 0.0 if self.usable else self._alone_s + elapsed_s
                for slot in self._slots.values():
                    self._look_after(slot, elapsed_s)
                self._call_standby()
                self.changed.notify_all()
                gone = self.gone
            if gone:  # else it might wait for a worker that it should end
                self.hurry()

    def _look_after(self, slot: WorkerHandle, elapsed_s: float) -> None:
        for job in slot.running():
            job.running_s += elapsed_s
            if job.running_s > self._answer_timeout_s:
                log.warning(
                    "%s gave no answer for %.3g s; replacing it", slot.spec.name, job.running_s
                )
                slot.kill()
                return


def _failures(slots: Sequence[WorkerHandle]) -> list[Exception]:
    """Why slots could not start, once each has started or failed."""
    for slot in slots:
        slot.settled.wait()
    return [slot.failure for slot in slots if slot.failure is not None]


def _candidate(slot: WorkerHandle) -> DispatchCandidate:
    degraded = slot.health.state == "degraded"
    return DispatchCandidate(slot.spec.name, slot.load, slot.rate, degraded)
