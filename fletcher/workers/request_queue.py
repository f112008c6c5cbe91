"""In which order a worker takes the requests that it has."""

from __future__ import annotations

import threading
from collections import deque

from fletcher.workers.messages import WorkerRequest

# Other work gets every ninth turn, however much urgent work there is.
_MAX_URGENT_IN_ROW = 8


class RequestQueue:
    """Requests that wait for a thread: urgent ones first, and others now and then all the same.

    At most `concurrency` requests that are not urgent run at a time: with more threads than that,
    one is free soon for an urgent one.
    """

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._urgent: deque[WorkerRequest] = deque()
        self._others: deque[WorkerRequest] = deque()
        self._num_others = 0  # that run
        self._urgent_in_row = 0
        self._changed = threading.Condition()

    def add_request(self, request: WorkerRequest) -> None:
        """Adds a request."""
        with self._changed:
            (self._urgent if request.urgent else self._others).append(request)
            self._changed.notify()

    def take_request(self) -> WorkerRequest:
        """The next request; waits for one."""
        with self._changed:
            while True:
                other = bool(self._others) and self._num_others < self._concurrency
                if self._urgent and (not other or self._urgent_in_row < _MAX_URGENT_IN_ROW):
                    self._urgent_in_row = self._urgent_in_row + 1 if other else 0
                    return self._urgent.popleft()
                if other:
                    self._urgent_in_row = 0
                    self._num_others += 1
                    return self._others.popleft()
                self._changed.wait()

    def finish_request(self, request: WorkerRequest) -> None:
        """A request that was taken has run."""
        if not request.urgent:
            with self._changed:
                self._num_others -= 1
                self._changed.notify()
