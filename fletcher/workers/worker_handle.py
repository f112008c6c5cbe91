"""Worker handle: starts one worker process, sends jobs and reads answers."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from fletcher.errors import BackendError, InternalError
from fletcher.util.insist import insist
from fletcher.workers.health import RESTART_BACKOFF, Health
from fletcher.workers.jobs import Job
from fletcher.workers.messages import (
    Failure,
    Ready,
    Response,
    WorkerRequest,
    WorkerSpec,
    encode,
    is_answer,
    receive,
    send,
)

log = logging.getLogger(__name__)


class Owner(Protocol):
    """A worker handle's view of its pool.

    Attributes:
        changed: Lock of the jobs and states of all handles. `review` notifies its waiting threads.
        closing: Set when the pool closes.
        probe: Payload that every sound worker can answer. None: workers are not probed.
    """

    changed: threading.Condition
    closing: threading.Event
    probe: Any

    def review(self, handle: WorkerHandle) -> None:
        """Notes that a handle's jobs or state changed. Called with `changed` held."""

    def least_slowness(self, handle: WorkerHandle) -> float | None:
        """Least slowness of the other usable workers; None if there are none."""

    def worker_died(self, handle: WorkerHandle) -> None:
        """Counts the death of a worker's process."""

    def retry_job(self, job: Job, error: Exception) -> None:
        """Queues a job to run again; fails it with `error` after too many attempts."""

    def finish_job(self, job: Job, result: Any, error: Exception | None) -> None:
        """Hands a job's result or error to its source."""

    def dispatch_urgent(self) -> None:
        """Sends waiting urgent jobs. Called when a worker may have room for them."""


class WorkerHandle:
    """Front process' end of one worker.

    The handle's thread starts the process and must live as long as the process: the kernel sends
    PR_SET_PDEATHSIG when the *thread* that started a child ends.

    Args:
        prefetch: Number of requests that the worker holds beyond those it is running.
        wanted: Whether the worker starts together with the pool. If False, it is on standby until
            the handle's event `wanted` is set.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        owner: Owner,
        *,
        prefetch: int,
        start_timeout_s: float,
        wanted: bool = True,
    ) -> None:
        self.spec = spec
        self.health = Health()
        self.alive = False
        self.failure: Exception | None = None  # of the last start
        self.settled = threading.Event()  # set once the first start succeeded or failed
        self.wanted = threading.Event()
        if wanted:
            self.wanted.set()
        self.description: dict[str, str] = {}
        self.concurrency = 1  # until the worker reports its own
        self.urgent_concurrency = 0
        self.load = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.thread = threading.Thread(target=self._run, name=f"{spec.name}-reader", daemon=True)
        self._owner = owner
        self._prefetch = prefetch
        self._start_timeout_s = start_timeout_s
        self._connection: Connection | None = None
        self._jobs: dict[int, Job] = {}
        self._next_id = 0
        self._sending = threading.Lock()
        self._restarts = 0
        self._failures = 0  # starts in a row without an answer
        self._rng = random.Random()  # noqa: S311 - for jitter

    @property
    def usable(self) -> bool:
        """Whether the worker may be given work."""
        return self.alive and self.wanted.is_set() and self.health.state != "ejected"

    @property
    def state(self) -> str:
        """`standby`, `starting`, `down` (cannot start), or the worker's health state."""
        if self.alive:
            return self.health.state
        if not self.wanted.is_set():
            return "standby"
        return "down" if self.failure is not None else "starting"

    @property
    def rate(self) -> float | None:
        """Job cost that the worker does in a second when all its runs are busy.

        None before the first measurement.
        """
        return None if self.health.rate is None else self.health.rate * self.concurrency

    def has_room(self, *, alone: bool = False, urgent: bool = False) -> bool:
        """Whether the worker has room for another job.

        Args:
            alone: Whether the job needs a worker without other jobs.
            urgent: Whether the job is urgent. Only other urgent jobs count against its room.
        """
        if alone or any(job.attempts for job in self._jobs.values()):
            return not self._jobs
        if urgent and self._sending.locked():  # the worker may be slow to read what is being sent
            return False
        # Urgent jobs are not prefetched: those that wait can then be joined into one run.
        most = self.concurrency + (self.urgent_concurrency if urgent else self._prefetch)
        return sum(job.urgent == urgent for job in self._jobs.values()) < most

    def running(self) -> Sequence[Job]:
        """Jobs that may have begun: all urgent jobs, then the first bulk jobs."""
        jobs = list(self._jobs.values())
        others = [job for job in jobs if not job.urgent]
        return [job for job in jobs if job.urgent] + others[: self.concurrency]

    @property
    def idle(self) -> bool:
        return not self._jobs

    def statistics(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "state": self.state,
            "in_flight": len(self._jobs),
            "concurrency": self.concurrency,
            "load": self.load,
            "rate": None if self.rate is None else round(self.rate, 1),
            "restarts": self._restarts,
            **self.description,
        }

    def send_job(self, job: Job) -> None:
        """Sends a job to the worker; if the worker just died, the job is retried.

        Raises:
            Exception: The job cannot be encoded, and was not sent.
        """
        with self._owner.changed:
            job_id, self._next_id = self._next_id, self._next_id + 1
        request = encode(WorkerRequest(job_id, job.payload, job.urgent))
        with self._owner.changed:
            connection = self._connection
            if connection is not None:
                self._jobs[job_id] = job
                self.load += job.cost
                job.worker, job.running_s = self.spec.name, 0.0
        if connection is None:
            self._retry(job, InternalError("the server is shutting down"))
            return
        try:
            with self._sending:
                send(connection, request)
        except BaseException as error:
            # The worker is gone, or may have got half a request. The reader thread retries jobs.
            self.kill()
            if not isinstance(error, BrokenPipeError | ConnectionResetError):
                with contextlib.suppress(BaseException):  # else the caller would retry the job, too
                    log.exception("%s: a request cannot be sent; replacing it", self.spec.name)

    def kill(self) -> None:
        process = self.process
        if process is not None and process.poll() is None:
            process.kill()

    def _run(self) -> None:
        closing = self._owner.closing
        while True:
            self.wanted.wait()
            if closing.is_set():
                return
            lived_s = 0.0
            try:
                connection = self._start()
            except Exception as error:  # noqa: BLE001 - reported by the pool, and tried again
                self._failures += 1
                with self._owner.changed:
                    self.failure = error
                    self._owner.review(self)
                self.settled.set()
            else:
                self._failures += 1  # until it answers
                started = time.monotonic()
                try:
                    self._announce(connection)
                    self._read(connection)
                except BaseException:
                    with contextlib.suppress(BaseException):
                        log.exception("%s cannot be used; replacing it", self.spec.name)
                insist(functools.partial(self._clear, connection), f"{self.spec.name}: its end")
                insist(self._retry_jobs, f"{self.spec.name}: its jobs")
                lived_s = time.monotonic() - started
            # A first death may have any cause, so the restart is immediate. Several deaths in a row
            # are a reason to wait.
            num_failures = self._failures if self.failure else self._failures - 1
            pause_s = RESTART_BACKOFF.delay_s(num_failures, self._rng.random())
            if lived_s > pause_s:  # it lived long enough, though perhaps without a request
                pause_s, self._failures = 0.0, 0
            closing.wait(pause_s)

    def _announce(self, connection: Connection) -> None:
        """Lets the pool use the started worker."""
        with self._owner.changed:
            self._connection, self.alive, self.failure = connection, True, None
            self.health.record_restart()
            self._owner.review(self)
        self.settled.set()
        insist(self._owner.dispatch_urgent, f"{self.spec.name}: urgent jobs")

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "fletcher.workers.child"]
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        connection = Connection(ours.detach())
        try:
            if self._owner.closing.is_set():  # `close` may have killed an earlier process only
                self.kill()
            send(connection, encode(self.spec))
            if not connection.poll(self._start_timeout_s):
                raise BackendError(f"{self.spec.name} was not ready in {self._start_timeout_s:g} s")
            message = receive(connection)
            if isinstance(message, Failure):
                if isinstance(message.error, InternalError):
                    log.error("%s: %s", self.spec.name, message.traceback)
                raise message.error
            if not isinstance(message, Ready):
                raise BackendError(f"{self.spec.name} sent {type(message).__name__} at its start")
        except (EOFError, OSError):
            self._reap(connection)
            raise BackendError(
                f"{self.spec.name} ended while it loaded (exit status {self.process.returncode})"
            ) from None
        except BaseException:
            self._reap(connection)
            raise
        self.description = message.description
        self.concurrency, self.urgent_concurrency = message.concurrency, message.urgent_concurrency
        return connection

    def _read(self, connection: Connection) -> None:
        """Reads answers and finishes their jobs, until the worker is gone."""
        while True:
            try:
                message = receive(connection)
            except (EOFError, OSError):
                return
            except BaseException:
                log.exception("%s sent an answer that cannot be read", self.spec.name)
                return
            with self._owner.changed:
                known = is_answer(message) and message.job_id in self._jobs
            if not known:
                log.error("%s sent an answer that belongs to no request", self.spec.name)
                return
            # Such errors are not the request's fault: another worker may succeed.
            failed = isinstance(message, Failure) and isinstance(
                message.error, (InternalError, BackendError)
            )
            with self._owner.changed:
                job = self._jobs.pop(message.job_id)
                self.load -= job.cost
                job.attempts += failed
            # The job is only here now, so none of these steps may be left out.
            name = self.spec.name
            insist(functools.partial(self._note_answer, job, message, failed), f"{name}: health")
            insist(functools.partial(self._take_answer, job, message, failed), f"{name}: a result")
            insist(self._owner.dispatch_urgent, f"{name}: urgent jobs")
            insist(self._send_probe, f"{name}: a probe")

    def _note_answer(self, job: Job, message: Response | Failure, failed: bool) -> None:
        with self._owner.changed:
            if failed:
                self.health.record_failure()
            elif isinstance(message, Response) and not job.probe:
                self._failures = 0
                others = self._owner.least_slowness(self)
                self.health.record_answer(job.cost, message.seconds, others)
            self._owner.review(self)

    def _take_answer(self, job: Job, message: Response | Failure, failed: bool) -> None:
        if isinstance(message, Response):
            self._finish(job, message.payload, None)
        elif failed:
            log.error("%s: %s", self.spec.name, message.traceback)
            self._retry(job, message.error)
        else:
            self._finish(job, None, message.error)

    def _finish(self, job: Job, result: Any, error: Exception | None) -> None:
        if not job.probe:
            self._owner.finish_job(job, result, error)
        elif error is None:
            with self._owner.changed:
                self.health.readmit()
                self._owner.review(self)
        else:
            self._retry(job, error)

    def _retry(self, job: Job, error: Exception) -> None:
        if job.probe:
            log.warning("%s fails at everything; replacing it", self.spec.name)
            self.kill()
        else:
            self._owner.retry_job(job, error)

    def _send_probe(self) -> None:
        """Sends a probe to an ejected worker.

        If the worker answers the probe it is readmitted, else replaced.
        """
        if self.health.state == "ejected" and not any(job.probe for job in self._jobs.values()):
            self.send_job(Job(self._owner.probe, probe=True))

    def _clear(self, connection: Connection) -> None:
        """Ends the worker. May be called again if it raised an error."""
        with self._owner.changed:
            self.alive, self._connection = False, None
            self._owner.review(self)
        self.settled.set()
        self._reap(connection)

    def _retry_jobs(self) -> None:
        """Retries the jobs of an ended worker. May be called again if it raised an error."""
        with self._owner.changed:
            running = self.running()
            begun = {id(job) for job in running}
            jobs = [*running, *(job for job in self._jobs.values() if id(job) not in begun)]
        if not self._owner.closing.is_set() and self.wanted.is_set():
            log.warning(
                "%s died (exit status %s) with %d jobs; restarting it",
                self.spec.name,
                self.process.returncode if self.process else None,
                len(jobs),
            )
            self._owner.worker_died(self)
            self._restarts += 1
        with self._owner.changed:
            self._jobs, self.load = {}, 0
        for job in running:
            job.attempts += 1
        # Only this method holds the jobs now.
        for job in jobs:
            reason = f"a worker died {job.attempts} times while working on this"
            what = f"{self.spec.name}: a job's retry"
            insist(functools.partial(self._retry, job, InternalError(reason)), what)

    def _reap(self, connection: Connection) -> None:
        self.kill()
        with self._sending:  # else a sender might write to a reused descriptor number
            connection.close()
        if self.process is not None:
            self.process.wait()
