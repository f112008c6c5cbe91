"""Planned micro-batches that wait for a device; their batch windows take turns."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from fletcher.core.batches import Int64Array
from fletcher.pipeline.batch_window import BatchWindow
from fletcher.pipeline.fair_queue import FairQueue
from fletcher.pipeline.stream import end_calls


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """A micro-batch of a window: the indices of its rows.

    Attributes:
        queued: Time at which the window was planned (`time.monotonic`).
    """

    window: BatchWindow
    rows: Int64Array
    queued: float


class ReadyWindows:
    """Micro-batches of planned windows. Thread-safe.

    Each window in turn gives one micro-batch. So a small window, planned later than a large one,
    does not wait for all of it.

    Attributes:
        planned_at: Time of the last planning (`time.monotonic`).
    """

    def __init__(self) -> None:
        self.planned_at = 0.0
        self._batches: FairQueue[PlannedBatch] = FairQueue()
        self._num_left: dict[BatchWindow, int] = {}
        self._streams: Counter[Hashable] = Counter()  # number of windows of each stream
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._batches.weight

    def add_windows(self, windows: Iterable[BatchWindow]) -> None:
        """Adds windows that have at least one micro-batch each."""
        self.planned_at = now = time.monotonic()
        with self._lock:
            for window in windows:
                self._num_left[window] = len(window.row_sets)
                self._streams.update(window.streams)
                for rows in window.row_sets:
                    self._batches.add_item(window, PlannedBatch(window, rows, now))

    def drop_closed(self) -> None:
        """Drops the windows whose streams are all closed."""
        with self._lock:
            for window in list(self._num_left):
                if all(stream.closed for stream in window.streams):
                    self._batches.remove_owner(window)
                    self._forget(window)

    def next_batch(self) -> PlannedBatch | None:
        """Takes the next micro-batch, without rows of closed streams, if any is left.

        If taking a micro-batch raises an error, the calls of its window end with an error.
        """
        while self._batches:
            planned = None
            try:
                with self._lock:
                    if not self._batches:
                        return None
                    planned = self._batches.next_item()
                    self._num_left[planned.window] -= 1
                    if not self._num_left[planned.window]:
                        self._forget(planned.window)
                rows = planned.window.wanted_rows(planned.rows)
                if rows is not None:
                    return PlannedBatch(planned.window, rows, planned.queued)
            except BaseException as failure:
                if planned is None:
                    raise
                end_calls(planned.window.tickets, failure, "a micro-batch cannot be taken")
        return None

    def has_stream(self, stream: Hashable) -> bool:
        """Whether micro-batches of a window with rows of this stream wait here."""
        return stream in self._streams

    def _forget(self, window: BatchWindow) -> None:
        del self._num_left[window]
        for stream in window.streams:
            self._streams[stream] -= 1
            if not self._streams[stream]:
                del self._streams[stream]
