"""Stories of random runs: what happened before a promise was broken."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ScheduleError(AssertionError):
    """A broken promise, with the seed and the events before it."""


class Story:
    """Events of a run, with their times."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return time.monotonic() - self._began

    def tell(self, what: str) -> None:
        """Add an event."""
        self._lines.append(f"{self.seconds:.3f} s: {what}")

    def __str__(self) -> str:
        return "\n".join(f"  {line}" for line in self._lines)


@contextmanager
def told(seed: int, plan: object, again: str, folder: Path) -> Iterator[Story]:
    """Context of a run: its story is part of every error, and its folder is deleted if none comes.

    Args:
        seed: The plan's seed.
        plan: The plan.
        again: Arguments with which `scripts/soak` runs it again.
        folder: The run's files.

    Raises:
        ScheduleError: Any other error was raised.
    """
    story = Story()
    try:
        yield story
    except Exception as error:
        raise ScheduleError(
            f"seed {seed}: {type(error).__name__}: {error}\nagain by: scripts/soak {again}\n"
            f"{plan}\nwhat happened:\n{story}\nfiles: {folder}"
        ) from error
    shutil.rmtree(folder)
