"""The replica processes of one candidate, and the measurement of their time."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from fletcher.core.batches import InferenceResult, MicroBatch
from fletcher.errors import BackendError
from fletcher.inference.backend import BackendConfig
from fletcher.workers.jobs import Job
from fletcher.workers.messages import WorkerSpec
from fletcher.workers.pool import WorkerPool
from fletcher.workers.roster import PoolConfig

# A round takes about a second. A group that takes this much longer is stuck.
_RUN_TIMEOUT_S = 300.0


class ReplicaGroup:
    """Warmed-up replicas in child processes, one for each of `configs`.

    Raises:
        FletcherError: A replica could not load. In this case no process is left running.
    """

    def __init__(self, configs: Sequence[BackendConfig]) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()  # jobs of one call
        specs = [
            WorkerSpec(f"tune-{n}", f"fletcher.inference.{one.backend}:load", one)
            for n, one in enumerate(configs)
        ]
        self._pool = WorkerPool(PoolConfig("tune", specs), self)
        self._pool.start()
        self.concurrency = self._pool.concurrency
        self.precision = str(self._pool.statistics()[0].get("precision", configs[0].precision))

    def close(self) -> None:
        """End the processes. Idempotent."""
        self._pool.close()

    def schedule(self, *, urgent: bool, timeout_s: float = 0.0) -> Job | None:
        """Take the next micro-batch; see `JobSource`."""
        with contextlib.suppress(queue.Empty):
            return None if urgent else self._jobs.get(timeout=timeout_s)
        return None

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        """Report a micro-batch's result or error; see `JobSource`."""
        job.task(result, error)

    def embed_batches(self, batches: Sequence[MicroBatch]) -> tuple[list[InferenceResult], float]:
        """Embed micro-batches; return their results in order, and the time in seconds.

        The time is the mean of the times at which the runners finish. It is not the time of the
        last runner, because in a server a runner that is done does not wait for the others. It
        continues with the next batch window.

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
            raise BackendError(f"the replicas did not finish within {_RUN_TIMEOUT_S:g} s")
        for result in results:
            if isinstance(result, Exception):
                raise result
        last = sorted(ends)[-self.concurrency :]
        return results, sum(last) / len(last) - started
