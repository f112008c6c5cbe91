"""Units of work for a worker pool, and the source that they come from."""

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
        urgent: Runs before jobs that are not urgent, unless those have begun.
        attempts: Workers that died of the job or failed at it so far.
        worker: Name of the worker that has the job, or had it last.
        probe: The job tests one worker, and never moves to another.
        running_s: Seconds since it began in its worker.
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
        """Returns the next job of a kind; None if there is none within the time.

        Args:
            urgent: Whether an urgent job is wanted. Such calls never block, and come from one
                thread at a time.
            timeout_s: Longest wait for a job that is not urgent.
        """

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        """Takes a job's result, or its error; called once for each job. Must be quick."""
