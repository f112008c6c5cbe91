"""The replica processes of one candidate, and how long they take."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from fletcher.core.batches import InferenceResult, MicroBatch
from fletcher.errors import BackendError
from fletcher.inference.backend import BackendConfig
from fletcher.workers.jobs import Job
from fletcher.workers.messages import WorkerSpec
from fletcher.workers.pool import WorkerPool
from fletcher.workers.roster import PoolConfig

# A turn is made to take about a second; who takes so much longer is stuck.
_RUN_TIMEOUT_S = 300.0


class ReplicaGroup(Protocol):
    """Replicas that are loaded and warm."""

    concurrency: int
    precision: str

    def run(self, batches: Sequence[MicroBatch]) -> tuple[list[InferenceResult], float]:
        """Embeds micro-batches; their results in order, and the seconds that it took.

        Raises:
            FletcherError: A replica failed or died.
        """
        ...

    def close(self) -> None:
        """Ends the processes."""
        ...


class ProcessReplicaGroup:
    """Child processes as a server starts them.

    Args:
        configs: One for each process.

    Raises:
        FletcherError: One could not load; nothing is left running.
    """

    def __init__(self, configs: Sequence[BackendConfig]) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()  # one turn's at most
        specs = [
            WorkerSpec(f"tune-{n}", f"fletcher.inference.{one.backend}:load", one)
            for n, one in enumerate(configs)
        ]
        self._pool = WorkerPool(PoolConfig("tune", specs), self)
        self._pool.start()
        self.concurrency = self._pool.concurrency
        self.precision = str(self._pool.statistics()[0].get("precision", configs[0].precision))

    def close(self) -> None:
        """Ends the processes. Idempotent."""
        self._pool.close()

    def schedule(self, *, urgent: bool, timeout_s: float = 0.0) -> Job | None:
        """See `JobSource`: the next micro-batch."""
        if urgent:
            return None
        try:
            return self._jobs.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        """See `JobSource`."""
        job.task(result, error)

    def run(self, batches: Sequence[MicroBatch]) -> tuple[list[InferenceResult], float]:
        """Embeds micro-batches; their results in order, and the seconds that it took.

        A runner that has nothing left to do waits for no other here: in a server the next window
        follows. So the time is the mean of those at which the runners ended.

        Raises:
            FletcherError: A replica failed or died.
        """
        results: list[Any] = [None] * len(batches)
        ends: list[float] = []
        all_done = threading.Event()

        def job(index: int) -> Job:
            def done(result: Any, error: Exception | None) -> None:
                results[index] = result if error is None else error
                ends.append(time.perf_counter())
                if len(ends) == len(batches):
                    all_done.set()

            return Job(batches[index], task=done)

        started = time.perf_counter()
        for index in range(len(batches)):
            self._jobs.put(job(index))
        if not all_done.wait(_RUN_TIMEOUT_S):
            raise BackendError(f"no end after {_RUN_TIMEOUT_S:g} s")
        for result in results:
            if isinstance(result, Exception):
                raise result
        last = sorted(ends)[-self.concurrency :]
        return results, sum(last) / len(last) - started
