"""A pool of worker processes that pulls its work from a source, one job for each free slot.

A worker has `concurrency` requests running and `prefetch` more waiting in its pipe, so that it
never idles between two; everything else stays with the source, where urgent work can still overtake
it. A worker that dies is started again and its jobs are done once more elsewhere; a job whose
worker died `max_attempts` times fails alone.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from fletcher.errors import BackendError, InternalError, OverloadedError
from fletcher.workers.messages import Failure, Ready, Request, WorkerSpec, encode, receive

log = logging.getLogger(__name__)

_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_IDLE_POLL_S = 0.5

Done = Callable[[Any, Exception | None], None]


@dataclass(slots=True)
class Job:
    """Work for a pool.

    Attributes:
        payload: What the worker's `run` gets.
        done: Called once, on a thread of the pool, with (result, None) or (None, error). Must be
            quick and must not raise.
        cost: How much work it is, in any unit that is the same for all jobs of a pool.
        attempts: Workers that died on it so far.
        worker: The name of the worker that has it, or had it last.
    """

    payload: Any
    done: Done
    cost: int = 1
    attempts: int = 0
    worker: str = ""


class JobSource(Protocol):
    """Where a pool gets its work."""

    def next_job(self, timeout_s: float) -> Job | None:
        """The job to do next; None if there is none within the time."""
        ...


class WorkerPool:
    """Worker processes for one kind of work.

    Args:
        name: For logs.
        specs: One for each worker.
        source: Asked for a job whenever a slot is free.
        prefetch: Requests a worker holds beyond those it is running.
        max_attempts: Deaths of workers after which a job is given up.
        start_timeout_s: How long a worker may take to load and warm up.
        on_restart: Called with a worker's name each time it died.
    """

    def __init__(
        self,
        name: str,
        specs: Sequence[WorkerSpec],
        source: JobSource,
        *,
        prefetch: int = 1,
        max_attempts: int = 2,
        start_timeout_s: float = 300.0,
        on_restart: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self.name = name
        self._source = source
        self._max_attempts = max_attempts
        self._on_restart = on_restart
        self._changed = threading.Condition()
        self._retries: deque[Job] = deque()
        self._closing = threading.Event()
        self._slots = [_Slot(spec, self, prefetch, start_timeout_s) for spec in specs]
        self._dispatcher = threading.Thread(target=self._dispatch, name=f"{name}-pool", daemon=True)

    def start(self) -> None:
        """Starts all workers at once and waits until each is warm.

        Raises:
            FletcherError: A worker could not load; nothing is left running.
        """
        for slot in self._slots:
            slot.thread.start()
        for slot in self._slots:
            slot.settled.wait()
        failed = [slot.failure for slot in self._slots if slot.failure is not None]
        if failed:
            self.close()
            raise failed[0]
        self._dispatcher.start()

    def close(self) -> None:
        """Ends the workers; jobs still in them fail. Idempotent."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        for slot in self._slots:
            slot.kill()
        for thread in [self._dispatcher, *(slot.thread for slot in self._slots)]:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5.0)
        for job in self._retries:
            _finish(job, None, InternalError("the server is shutting down"))
        self._retries.clear()

    def statistics(self) -> list[dict[str, Any]]:
        """A snapshot for each worker: what it runs, whether it lives, what it holds."""
        with self._changed:
            return [slot.statistics() for slot in self._slots]

    @property
    def concurrency(self) -> int:
        """Jobs that run at the same time when all workers live."""
        return sum(slot.concurrency for slot in self._slots)

    def process_ids(self) -> list[int]:
        """The live workers' process ids."""
        with self._changed:
            return [slot.process.pid for slot in self._slots if slot.alive and slot.process]

    # The dispatcher: a slot first, then the job for it, so that the choice of job is made late.

    def _dispatch(self) -> None:
        while not self._closing.is_set():
            slot, again = self._free_slot()
            if self._closing.is_set():
                return
            job = self._retries.popleft() if again else self._source.next_job(_IDLE_POLL_S)
            if job is None:
                continue
            if slot is None:
                _finish(job, None, self._gone())
                continue
            try:
                slot.give(job)
            except Exception as error:
                log.exception("%s: a job cannot be sent", self.name)
                _finish(job, None, InternalError(f"{type(error).__name__}; the log has more"))

    def _free_slot(self) -> tuple[_Slot | None, bool]:
        """The least loaded worker with room, and whether it is for a job that is done again.

        No worker where none is alive and none will be soon. A job whose worker died gets a worker
        for itself: if that dies too, the job is to blame.
        """
        with self._changed:
            while not self._closing.is_set():
                alone = bool(self._retries)
                free = [slot for slot in self._slots if slot.alive and slot.has_room(alone=alone)]
                if free:
                    return min(free, key=lambda slot: slot.load), alone
                if all(slot.failure is not None for slot in self._slots):
                    return None, alone
                self._changed.wait()
            return None, False

    def _gone(self) -> Exception:
        return OverloadedError(
            f"no {self.name} worker is running; they are being restarted", retry_after_ms=5000
        )

    def _slot_changed(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _worker_died(self, slot: _Slot, running: Sequence[Job], waiting: Sequence[Job]) -> None:
        self._on_restart(slot.spec.name)
        for job in running:
            job.attempts += 1
        for job in (*running, *waiting):
            if job.attempts >= self._max_attempts or self._closing.is_set():
                reason = f"a {self.name} worker died {job.attempts} times while working on this"
                _finish(job, None, InternalError(reason))
            else:
                self._retries.append(job)


class _Slot:
    """One worker's place in the pool: its process, restarted as often as needed, and its jobs.

    Its thread starts the process, so that the thread lives as long as the process should: the
    kernel sends PR_SET_PDEATHSIG when the *thread* that started a child ends.
    """

    def __init__(
        self, spec: WorkerSpec, pool: WorkerPool, prefetch: int, start_timeout_s: float
    ) -> None:
        self.spec = spec
        self.alive = False
        self.failure: Exception | None = None  # why the last start failed
        self.settled = threading.Event()  # the first start succeeded or failed
        self.description: dict[str, str] = {}
        self.concurrency = 1  # until the worker says otherwise
        self.load = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.thread = threading.Thread(target=self._run, name=f"{spec.name}-reader", daemon=True)
        self._pool = pool
        self._prefetch = prefetch
        self._start_timeout_s = start_timeout_s
        self._connection: Connection | None = None
        self._jobs: dict[int, Job] = {}
        self._next_id = 0
        self._sending = threading.Lock()
        self._restarts = 0

    def has_room(self, *, alone: bool) -> bool:
        """Whether another job fits; `alone`: a job that wants no company."""
        suspect = any(job.attempts for job in self._jobs.values())
        most = 1 if alone or suspect else self.concurrency + self._prefetch
        return len(self._jobs) < most

    def statistics(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "state": "ready" if self.alive else "starting",
            "in_flight": len(self._jobs),
            "restarts": self._restarts,
            **self.description,
        }

    def give(self, job: Job) -> None:
        """Sends a job to the worker; if it just died, the job goes to another.

        Raises:
            Exception: The job cannot be pickled; the worker knows nothing of it.
        """
        job_id, self._next_id = self._next_id, self._next_id + 1
        request = encode(Request(job_id, job.payload))
        with self._pool._changed:
            connection = self._connection
            if connection is None:
                self._pool._retries.append(job)
                return
            self._jobs[job_id] = job
            self.load += job.cost
            job.worker = self.spec.name
        try:
            with self._sending:
                connection.send_bytes(request)
        except OSError:
            pass  # the worker is gone: the reader notices and passes the job on

    def kill(self) -> None:
        process = self.process
        if process is not None and process.poll() is None:
            process.kill()

    def _run(self) -> None:
        failures = 0
        while not self._pool._closing.is_set():
            try:
                connection = self._start()
            except Exception as error:  # noqa: BLE001 - reported by start() or retried below
                self.failure = error
                failures += 1
                if self.settled.is_set() and not self._pool._closing.is_set():
                    log.warning("%s: cannot start: %s", self.spec.name, error)
                    self._pool._slot_changed()
                elif not self.settled.is_set():
                    self.settled.set()
                    return
            else:
                failures, self.failure = 0, None
                with self._pool._changed:
                    self._connection, self.alive = connection, True
                    self._pool._changed.notify_all()
                self.settled.set()
                started = time.monotonic()
                self._read(connection)
                self._clear(connection)
                if time.monotonic() - started < 1.0:
                    failures = 1  # a worker that dies at once must not be restarted in a tight loop
            self._pool._closing.wait(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

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
            if self._pool._closing.is_set():  # `close` may have killed what was there before
                self.kill()
            connection.send_bytes(encode(self.spec))
            if not connection.poll(self._start_timeout_s):
                raise BackendError(f"{self.spec.name} was not ready in {self._start_timeout_s:g} s")
            message = receive(connection)
            if isinstance(message, Failure):
                if isinstance(message.error, InternalError):
                    log.error("%s: %s", self.spec.name, message.traceback)
                raise message.error
        except (EOFError, OSError):
            self._reap(connection)
            raise BackendError(
                f"{self.spec.name} ended while it loaded (exit status {self.process.returncode})"
            ) from None
        except BaseException:
            self._reap(connection)
            raise
        assert isinstance(message, Ready)
        self.description = message.description
        self.concurrency = message.concurrency
        return connection

    def _read(self, connection: Connection) -> None:
        """Hands results to their jobs until the worker is gone."""
        while True:
            try:
                message = receive(connection)
            except (EOFError, OSError):
                return
            except Exception:
                log.exception("%s answered what cannot be read", self.spec.name)
                return
            with self._pool._changed:
                job = self._jobs.pop(message.job_id)
                self.load -= job.cost
                self._pool._changed.notify_all()
            if isinstance(message, Failure):
                if isinstance(message.error, InternalError):
                    log.error("%s: %s", self.spec.name, message.traceback)
                _finish(job, None, message.error)
            else:
                _finish(job, message.payload, None)

    def _clear(self, connection: Connection) -> None:
        with self._pool._changed:
            self.alive, self._connection = False, None
            jobs, self._jobs, self.load = list(self._jobs.values()), {}, 0
            self._pool._changed.notify_all()
        self._reap(connection)
        if not self._pool._closing.is_set():
            self._restarts += 1
            status = self.process.returncode if self.process else None
            log.warning(
                "%s died (exit status %s) with %d jobs; restarting it",
                *(self.spec.name, status, len(jobs)),
            )
        # A worker takes its jobs in order: what came later had not begun.
        self._pool._worker_died(self, jobs[: self.concurrency], jobs[self.concurrency :])
        self._pool._slot_changed()

    def _reap(self, connection: Connection) -> None:
        self.kill()
        with self._sending:  # a closed descriptor's number may be reused under a writer
            connection.close()
        if self.process is not None:
            self.process.wait()


def _finish(job: Job, result: Any, error: Exception | None) -> None:
    try:
        job.done(result, error)
    except Exception:
        log.exception("a completion callback failed")
