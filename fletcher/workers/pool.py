"""Pool of worker processes that pulls its work from a source.

Why no library: pools of `concurrent.futures` and `multiprocessing` do not replace a dead process
and run its jobs again. They also do not let urgent work overtake jobs that are queued in a process.

A worker runs `concurrency` requests and holds `prefetch` more, so that it never idles between two
requests. All other work stays with the source, which decides as late as possible what runs next. A
worker has separate room for urgent work. An urgent job is sent by the thread that adds it. If no
worker has room, it is sent later by the thread that reads the next answer, because that answer
makes room. So no thread change delays urgent work.

Failures are handled as follows:

- A worker that dies is started again, and its jobs run elsewhere.
- A job fails once `max_attempts` workers died of it or failed at it. Other jobs are not affected.
- A worker that fails at several jobs in a row is ejected: it gets a probe job instead of work. If
  it answers the probe it gets work again, else it is replaced.
- A worker that does not answer in time is replaced.
- If no regular worker is left, workers on standby take over. If there are none, jobs fail with a
  retryable error.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fletcher.errors import InternalError, OverloadedError
from fletcher.util.insist import insist
from fletcher.workers.jobs import Job, JobSource
from fletcher.workers.roster import PoolConfig, PoolEvents, Roster, start_failures
from fletcher.workers.worker_handle import WorkerHandle

log = logging.getLogger(__name__)

_RETRY_MS = 5000


class WorkerPool:
    """Worker processes for one kind of work. Thread-safe."""

    def __init__(
        self, config: PoolConfig, source: JobSource, events: PoolEvents | None = None
    ) -> None:
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self.probe = config.probe
        self._config = config
        self._source = source
        self._events = events or PoolEvents()
        self._roster = Roster(config, self, self._events)
        self._retries: deque[Job] = deque()
        self._urgent_jobs: deque[Job] = deque()  # taken from the source, and not sent yet
        self._dispatching_urgent = threading.Lock()
        self._urgent_asked = False  # since the holder of the lock last looked
        self._dispatcher = threading.Thread(
            target=self._dispatch_bulk, name=f"{config.name}-pool", daemon=True
        )
        self._watcher = threading.Thread(
            target=self._watch, name=f"{config.name}-watch", daemon=True
        )

    def start(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Starts all workers in parallel and waits until each is warm.

        If no regular worker can start, those on standby are started.

        Args:
            meanwhile: Called on this thread while the workers load.

        Raises:
            FletcherError: A worker could not load, or `meanwhile` failed. All workers are ended.
        """
        for handle in self._roster.all:
            handle.thread.start()
        try:
            meanwhile()
        except BaseException:
            self.close()
            raise
        regular, standby = self._roster.regular, self._roster.standby
        failed = start_failures(regular)
        if failed and len(failed) == len(regular) and standby:
            log.warning("%s: none can start: %s", self._config.name, failed[0])
            failed = start_failures(standby)
        if failed:
            self.close()
            raise failed[0]
        self._dispatcher.start()
        self._watcher.start()

    def close(self) -> None:
        """Ends the workers and fails the jobs that they still have. Idempotent."""
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        handles = self._roster.all
        for handle in handles:
            handle.wanted.set()
            handle.kill()
        for thread in [self._dispatcher, self._watcher, *(handle.thread for handle in handles)]:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5.0)
        for jobs in (self._retries, self._urgent_jobs):
            for job in jobs:
                self.finish_job(job, None, InternalError("the server is shutting down"))
            jobs.clear()

    def statistics(self) -> list[dict[str, Any]]:
        """State, rate and number of jobs of each worker now."""
        with self.changed:
            return [handle.statistics() for handle in self._roster.all]

    @property
    def concurrency(self) -> int:
        """Number of bulk jobs that run at the same time when all workers are alive."""
        return self._roster.concurrency

    @property
    def usable(self) -> bool:
        """Whether at least one worker takes work."""
        return self._roster.usable

    @property
    def gone(self) -> bool:
        """Whether no worker takes work, now or soon. If so, all jobs fail."""
        return self._roster.gone

    def error(self) -> OverloadedError:
        """Error with which jobs fail while the pool is `gone`."""
        return OverloadedError(
            f"no {self._config.name} worker is running; they are being restarted, try again later",
            retry_after_ms=_RETRY_MS,
        )

    @property
    def names(self) -> list[str]:
        return list(self._roster.by_name)

    def is_usable(self, name: str) -> bool:
        return self._roster.by_name[name].usable

    def rate(self, name: str) -> float:
        """Job cost that a worker does in a second when busy; 0 before it is measured."""
        return self._roster.by_name[name].rate or 0.0

    def concurrency_of(self, name: str) -> int:
        """Number of bulk jobs that a worker runs at the same time."""
        return self._roster.by_name[name].concurrency

    def process_ids(self) -> list[int]:
        with self.changed:
            handles = self._roster.all
            return [one.process.pid for one in handles if one.alive and one.process]

    def idle_worker(self) -> str | None:
        """Name of a usable worker if the whole pool is idle, else None.

        The pool is idle if no worker has a job and no job waits to be retried.
        """
        with self.changed:
            if self._retries or self.closing.is_set():
                return None
            return self._roster.idle_worker()

    # Dispatch

    def dispatch_urgent(self) -> None:
        """Sends urgent jobs to workers while there are such jobs and workers with room.

        Call this method when a new urgent job was added. Jobs for which no worker has room are sent
        later, by the thread that reads a worker's next answer.
        """
        self._urgent_asked = True
        # If another thread holds the lock, this thread does not wait: that thread looks again.
        while self._urgent_asked and self._dispatching_urgent.acquire(blocking=False):
            try:
                self._urgent_asked = False
                insist(self._send_urgent_jobs, f"{self._config.name}: sending urgent jobs")
            finally:
                self._dispatching_urgent.release()

    def _send_urgent_jobs(self) -> None:
        while not self.closing.is_set():
            with self.changed:
                # A retried job waits for a worker without jobs, so no other job may overtake it.
                handle = None if self._retries else self._roster.choose(urgent=True)
                gone = handle is None and self.gone
            if handle is None and not gone:
                return
            if not self._urgent_jobs:
                job = self._source.schedule(urgent=True)
                if job is None:
                    return
                self._urgent_jobs.append(job)  # so that no failure below loses it
            self._send_first(self._urgent_jobs, handle)

    def _dispatch_bulk(self) -> None:
        """Sends bulk jobs: waits for a worker with room, then asks the source for a job."""
        while not self.closing.is_set():
            insist(self._dispatch_one, f"{self._config.name}: sending jobs")

    def _dispatch_one(self) -> None:
        handle, retry = self._free_worker()
        if self.closing.is_set():
            return
        if retry:
            job: Job | None = self._retries[0]
        else:
            timeout_s = self._config.timing.idle_poll_s
            job = self._source.schedule(urgent=False, timeout_s=timeout_s)
        if job is None:
            return
        if not retry:
            self._retries.appendleft(job)  # so that no failure below loses it
        # The wait for the job may have been long, so the worker is checked again.
        gone = self.gone
        if not gone and (handle is None or not handle.usable):
            return
        self._send_first(self._retries, None if gone else handle)
        if not gone:
            self.dispatch_urgent()  # for jobs that found no room while this one was sent

    def _free_worker(self) -> tuple[WorkerHandle | None, bool]:
        """Waits for a worker with room.

        Returns:
            The worker, and whether it is for a retried job. The worker is None if the pool is
            closing, or if no worker takes work, now or soon.
        """
        with self.changed:
            while not self.closing.is_set():
                retry = bool(self._retries)
                handle = self._roster.choose(retried=self._retries[0] if retry else None)
                if handle is not None:
                    return handle, retry
                if self.gone:
                    return None, retry
                self.changed.wait()
            return None, False

    def _send_first(self, jobs: deque[Job], handle: WorkerHandle | None) -> None:
        """Sends the first job to a worker, or fails it if there is no worker.

        The job stays in `jobs` until nothing can lose it.
        """
        if handle is None:
            self.finish_job(jobs[0], None, self.error())
            jobs.popleft()
            return
        job = jobs.popleft()
        try:
            handle.send_job(job)
        except BaseException as error:
            reason = f"{type(error).__name__} while sending to a worker; the log has more"
            job.attempts += 1
            self.retry_job(job, InternalError(reason))
            log.exception("%s: a job cannot be sent", self._config.name)
            return
        try:
            with self.changed:
                self._roster.charge(handle, job.cost)
        except BaseException:
            log.exception("%s: a job is not charged", self._config.name)

    # Methods that worker handles call, see `Owner`

    def review(self, handle: WorkerHandle) -> None:
        self._roster.review(handle)

    def least_slowness(self, handle: WorkerHandle) -> float | None:
        return self._roster.least_slowness(handle)

    def worker_died(self, handle: WorkerHandle) -> None:
        self._events.on_restart(handle.spec.name)

    def retry_job(self, job: Job, error: Exception) -> None:
        if job.attempts >= self._config.max_attempts or self.closing.is_set():
            self.finish_job(job, None, error)
            return
        with self.changed:
            self._retries.append(job)
            self.changed.notify_all()

    def finish_job(self, job: Job, result: Any, error: Exception | None) -> None:
        insist(
            functools.partial(self._source.update, job, result, error),
            f"{self._config.name}: taking a job's result",
        )

    def _watch(self) -> None:
        """Ends workers whose jobs run too long; counts the time without usable workers."""
        insist(self._watch_workers, f"{self._config.name}: watching workers")

    def _watch_workers(self) -> None:
        timing = self._config.timing
        last = time.monotonic()
        while not self.closing.wait(min(timing.watch_s, timing.answer_timeout_s / 4)):
            now = time.monotonic()
            # A pause of the whole machine or container must not count as running time of a job.
            elapsed_s, last = min(now - last, 2 * timing.watch_s), now
            with self.changed:
                self._roster.elapse(elapsed_s)
                gone = self.gone
            if gone:  # only then: sending might block on a worker that this thread has to end
                self.dispatch_urgent()
