"""Progress of a long command: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from fletcher.cli.terminal import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LIVE_INTERVAL_S = 0.5
PLAIN_INTERVAL_S = 10.0
WINDOW_S = 10.0
_BAR_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class Sample:
    """Progress of a command at one moment; None means unknown.

    `rows` and `tokens` count finished work. `num_bytes` and `rows_read` count input read so far,
    which is ahead of the finished work. `queues` holds the number of waiting items by stage.
    """

    rows: int
    tokens: int | None = None
    num_bytes: int = 0
    rows_read: int | None = None
    queues: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Total:
    """Amount of work to do in all; None means unknown."""

    rows: int | None = None
    num_bytes: int | None = None


class Meter:
    """Computes rates and the time left from samples; uses no clock and no terminal.

    Rich's own estimate of the time left is not used. It restarts whenever the total changes, and
    the total here is extrapolated from the bytes read, so it changes with each sample.
    """

    def __init__(self, total: Total) -> None:
        self._total = total
        self._samples: deque[tuple[float, Sample]] = deque()

    def add_sample(self, now_s: float, sample: Sample) -> None:
        """Add a sample; samples older than WINDOW_S no longer count for rates."""
        self._samples.append((now_s, sample))
        while len(self._samples) > 2 and now_s - self._samples[1][0] >= WINDOW_S:
            self._samples.popleft()

    @property
    def done_share(self) -> float | None:
        """Finished share of all work, from 0 to 1; None if the total is unknown."""
        last = self._samples[-1][1]
        total = self._total_rows(last)
        if total:
            return min(1.0, last.rows / total)
        return last.num_bytes / self._total.num_bytes if self._total.num_bytes else None

    def line(self) -> str:
        """The progress as one line of text."""
        (start_s, first), (now_s, last) = self._samples[0], self._samples[-1]
        elapsed_s = now_s - start_s

        def rate(done: float) -> float:
            return done / elapsed_s if elapsed_s > 0 else 0.0

        rows = rate(last.rows - first.rows)
        of_rows = f" of {self._total.rows:,}" if self._total.rows is not None else ""
        parts = [f"{last.rows:,}{of_rows} rows", f"{rows:,.0f} rows/s"]
        left_s = self._left(last, rows, rate(last.num_bytes - first.num_bytes))
        if left_s is not None:
            parts.append(f"{clock(left_s)} left")
        if last.tokens is not None:
            parts.append(f"{human(rate(last.tokens - (first.tokens or 0)))} tokens/s")
        if last.num_bytes:
            of_bytes = f" of {human(self._total.num_bytes)}B" if self._total.num_bytes else ""
            parts.append(f"{human(last.num_bytes)}B{of_bytes}")
        waiting = [f"{printable(name)} {depth}" for name, depth in last.queues.items() if depth]
        if waiting:
            parts.append(f"queues: {', '.join(waiting)}")
        return "  ".join(parts)

    def _total_rows(self, last: Sample) -> float | None:
        if self._total.rows is None and last.rows_read and self._total.num_bytes and last.num_bytes:
            return last.rows_read * self._total.num_bytes / last.num_bytes
        return self._total.rows

    def _left(self, last: Sample, rows_per_s: float, bytes_per_s: float) -> float | None:
        total_rows = self._total_rows(last)
        # The time depends on the rows. Bytes stand in for rows if the number of rows is unknown.
        if total_rows is not None:
            return max(0, total_rows - last.rows) / rows_per_s if rows_per_s > 0 else None
        left = (self._total.num_bytes or 0) - last.num_bytes
        # With all bytes read, rows may still be unfinished: then the time left is unknown.
        return left / bytes_per_s if left > 0 and bytes_per_s > 0 else None


class Progress:
    """Context manager that shows a command's progress, on a terminal as a live bar.

    `sample` is called on another thread. If it raises OSError or RuntimeError, one update is
    skipped.
    """

    def __init__(
        self,
        sample: Callable[[], Sample],
        total: Total,
        stream: TextIO | None = None,
        interval_s: float | None = None,
    ) -> None:
        self._sample = sample
        self._stream = stream or sys.stderr
        self._live = _live_display(self._stream) if self._stream.isatty() else None
        self._interval_s = interval_s or (LIVE_INTERVAL_S if self._live else PLAIN_INTERVAL_S)
        self._meter = Meter(total)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._meter.add_sample(time.monotonic(), Sample(0))
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._live:
            self._live.stop()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                sample = self._sample()
            except (OSError, RuntimeError):
                continue
            self._meter.add_sample(time.monotonic(), sample)
            if self._live:
                done, line = self._meter.done_share or 0.0, self._meter.line()
                self._live.update(
                    self._live.task_ids[0],
                    description=line,
                    completed=done,
                    visible=True,
                    refresh=True,
                )
            else:
                print(self._meter.line(), file=self._stream, flush=True)


def _live_display(stream: TextIO) -> RichProgress:
    """A bar and a line of text, both erased when the display stops."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    text = Column(no_wrap=True, overflow="ellipsis")
    display = RichProgress(
        BarColumn(_BAR_COLUMNS, table_column=Column(no_wrap=True, min_width=_BAR_COLUMNS)),
        TextColumn("{task.description}", markup=False, table_column=text),
        console=Console(file=stream, highlight=False),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
    )
    display.add_task("", total=1.0, visible=False)
    return display


def human(number: float | None) -> str:
    """A number shortened to read quickly: `950`, `1.2k`, `34M`, `5.6G`."""
    number = number or 0.0
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    return f"{number:.1f}{unit}" if unit and abs(number) < 9.95 else f"{number:.0f}{unit}"


def clock(seconds: float) -> str:
    """A duration as text: `0:09`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
