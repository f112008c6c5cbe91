"""Admission of calls: limits on their number, and refusals under load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from fletcher.errors import DrainingError, OverloadedError
from fletcher.pipeline.embedder import Embedder
from fletcher.serving.load_level import LoadLevel, LoadMonitor
from fletcher.telemetry.tracing import Telemetry

# Most open calls per allowed stream. A call that has sent nothing takes a thread and some 90 kB.
_CALLS_PER_STREAM = 8


@dataclass(frozen=True, slots=True)
class RetryHints:
    """Delays after which refused clients should try again."""

    overloaded_ms: int = 1000  # all streams are taken
    severe_ms: int = 5000  # the load level is severe
    draining_ms: int = 5000


class Place(AbstractContextManager["Place"]):
    """Place among `max_streams`, given back when the context is left. Thread-safe."""

    def __init__(self, on_given_back: Callable[[], None]) -> None:
        self._on_given_back: Callable[[], None] | None = on_given_back
        self._lock = threading.Lock()

    def give_back(self) -> None:
        """Let another call have the place. Idempotent."""
        with self._lock:
            given_back, self._on_given_back = self._on_given_back, None
        if given_back is not None:
            given_back()

    def __exit__(self, *error: object) -> None:
        self.give_back()


class Admission:
    """Limit on new calls; refuses all while draining, and bulk work under severe load.

    Thread-safe. At most `max_streams` calls embed at the same time.

    Attributes:
        draining: Set once the server shuts down.
        num_streams: Number of streams open now.
        hints: Delays after which refused clients should try again.
    """

    def __init__(self, max_streams: int, load: LoadMonitor, telemetry: Telemetry) -> None:
        self.draining = threading.Event()
        self.hints = RetryHints()
        self._max_streams = max_streams
        self._load = load
        self.num_streams = self._num_calls = 0
        self._changed = threading.Condition()
        telemetry.streams_open.observe(lambda: self.num_streams)

    @property
    def stream_share(self) -> float:
        """Open streams as a share of `max_streams`, 0 to 1."""
        return self.num_streams / self._max_streams

    def check_draining(self) -> None:
        """Raise DrainingError while the server shuts down."""
        if self.draining.is_set():
            raise DrainingError(
                "the server is shutting down; try another, or again later",
                retry_after_ms=self.hints.draining_ms,
            )

    @contextmanager
    def begin_call(self) -> Iterator[None]:
        """Count a call while the body runs. Raises DrainingError, OverloadedError."""
        self.check_draining()
        with self._changed:
            if self._num_calls >= _CALLS_PER_STREAM * self._max_streams:
                raise OverloadedError(
                    f"{self._num_calls} calls have begun, most of which send nothing; "
                    "try again later",
                    retry_after_ms=self.hints.overloaded_ms,
                )
            self._num_calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_calls -= 1

    def admit(self, embedder: Embedder, *, bulk: bool) -> Place:
        """Count a stream as open until its place is given back.

        An admitted call may be slowed down, but is not refused later.

        Raises:
            DrainingError: The server is shutting down.
            OverloadedError: All streams are taken, the model has no workers left, or the call is
                bulk work and the load level is severe.
        """
        embedder.check_workers()
        if bulk and self._load.observe() is LoadLevel.SEVERE:
            raise OverloadedError(
                f"the server takes no new bulk work now: {self._load.reason}; try again later",
                retry_after_ms=self.hints.severe_ms,
            )
        with self._changed:
            self.check_draining()
            if self.num_streams >= self._max_streams:
                raise OverloadedError(
                    f"{self.num_streams} streams are open, as many as `max_streams` allows; "
                    "try again later",
                    retry_after_ms=self.hints.overloaded_ms,
                )
            self.num_streams += 1
        return Place(self._end_stream)

    def _end_stream(self) -> None:
        with self._changed:
            self.num_streams -= 1
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no stream is open; False after `timeout_s` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.num_streams == 0, timeout_s)
