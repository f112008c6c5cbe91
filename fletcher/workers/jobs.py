"""Jobs of a worker pool, and the source that the pool gets them from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True)
class Job:
    """One unit of work for a pool.

    Attributes:
        payload: Argument of the worker's `run`.
        task: The source's own record of the job; the pool does not read it.
        cost: Amount of work, in one unit for all jobs of a pool.
        urgent: Whether the job runs before bulk jobs that have not begun.
        attempts: Number of workers that died of the job or failed at it so far.
        worker: Name of the worker that has the job, or had it last.
        probe: Whether the job only tests its worker, and so never moves to another worker.
        running_s: Seconds for which the job may have been running in its worker.
    """

    payload: Any
    task: Any = None
    cost: int = 1
    urgent: bool = False
    attempts: int = 0
    worker: str = ""
    probe: bool = False
    running_s: float = 0.0


class JobSource(Protocol):
    """Owner of the work of one pool. Called on the pool's threads."""

    def schedule(self, *, urgent: bool, timeout_s: float = 0.0) -> Job | None:
        """Returns the next job; None if there is no job within the timeout.

        Args:
            urgent: Whether to return an urgent job or a bulk job. A call for an urgent job must not
                block. Only one thread at a time makes such calls.
            timeout_s: Longest wait for a bulk job.
        """

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        """Takes a job's result or its error.

        Called once for each job, and again if it raises. Must return quickly.
        """
