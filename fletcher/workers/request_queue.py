"""Request queue: the order in which a worker runs its requests."""

from __future__ import annotations

import threading
from collections import deque

from fletcher.workers.messages import WorkerRequest

# After so many urgent requests in a row, a waiting bulk request runs.
_MAX_URGENT_IN_ROW = 8


class RequestQueue:
    """Requests that wait for one of a worker's threads. Thread-safe.

    Urgent requests run first, but a bulk request runs after several urgent ones in a row. At most
    `concurrency` bulk requests run at a time. If the worker has more threads than `concurrency`,
    the other threads are free for urgent requests.
    """

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._urgent: deque[WorkerRequest] = deque()
        self._others: deque[WorkerRequest] = deque()
        self._num_others = 0  # number of running bulk requests
        self._urgent_in_row = 0
        self._changed = threading.Condition()

    def add_request(self, request: WorkerRequest) -> None:
        with self._changed:
            (self._urgent if request.urgent else self._others).append(request)
            self._changed.notify()

    def take_request(self) -> WorkerRequest:
        """Returns the next request; blocks until there is one."""
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
        """Frees the room of a request that has run, so that another one can start."""
        if not request.urgent:
            with self._changed:
                self._num_others -= 1
                self._changed.notify()
