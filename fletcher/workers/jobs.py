"""Work for a pool, and where it comes from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger(__name__)

Done = Callable[[Any, Exception | None], None]


@dataclass(slots=True)
class Job:
    """Work for a pool.

    Attributes:
        payload: What the worker's `run` gets.
        done: Called once, on a thread of the pool, with (result, None) or (None, error). Must be
            quick and must not raise.
        cost: How much work it is, in any unit that is the same for all jobs of a pool.
        urgent: It overtakes what is not, until the moment that it runs.
        lend: Has a thread that does nothing but wait for the result do what it is given; False:
            there is none. None: nobody waits for this alone.
        attempts: Workers that died of it or failed on it so far.
        worker: The name of the worker that has it, or had it last.
        probe: Sent to see whether a worker works; belongs to that worker alone.
        running_s: How long it has been running in its worker.
    """

    payload: Any
    done: Done
    cost: int = 1
    urgent: bool = False
    lend: Callable[[Callable[[], None]], bool] | None = None
    attempts: int = 0
    worker: str = ""
    probe: bool = False
    running_s: float = 0.0

    def finish(self, result: Any, error: Exception | None) -> None:
        """Calls `done`, whatever that does."""
        try:
            self.done(result, error)
        except Exception:
            log.exception("a completion callback failed")


class JobSource(Protocol):
    """Where a pool gets its work that is not urgent."""

    def next_job(self, timeout_s: float) -> Job | None:
        """The job to do next; None if there is none within the time."""
        ...
