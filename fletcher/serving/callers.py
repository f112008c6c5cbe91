"""Watch over the callers of open calls, which may leave or fall silent.

The work of such callers is dropped. gRPC does not tell a handler that its caller left: it must be
asked, and a call that waits for vectors or for memory asks nothing. So one thread asks for all
calls, some 50 times a second.

A call whose caller is silent cannot be ended by gRPC either: its read blocks. Its work is dropped
and its place is given back. Then its connection is shut down, unless other calls use it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from fletcher.errors import CancelledError, FletcherError, OverloadedError
from fletcher.net.connections import Peer, ServerConnections, parse_peer

log = logging.getLogger(__name__)


class Work(Protocol):
    """Work of a call in progress: a session."""

    @property
    def idle(self) -> bool:
        """Whether the caller is owed nothing: all that it sent has been answered."""

    def abandon(self, error: FletcherError) -> None:
        """Drop all work, and give the call's place back. Thread-safe, idempotent."""


class Caller:
    """The client of one call, and since when the server waits for it.

    The handler's thread uses `reading`, one other thread `writing`, and the watch the rest.
    """

    def __init__(self, context: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._work: Work | None = None
        self.failure: FletcherError | None = None  # why the work was dropped
        self._reading_since: float | None = None
        self._writing_since: float | None = None
        self.began = self._active = clock()
        self.given_up: float | None = None  # when the work of a silent caller was dropped

    def is_cancelled(self) -> bool:
        """Whether the client left. Only while the call's handler runs."""
        return bool(self._context.is_cancelled())

    def get_middleware(self, name: str) -> Any:
        """The call's middleware of that name, if any."""
        return self._context.get_middleware(name)

    def peer_identity(self) -> bytes:
        """Name in the client's certificate; empty if it sent none."""
        return bytes(self._context.peer_identity() or b"")

    def peer(self) -> str:
        """The client's address in gRPC's form."""
        return str(self._context.peer())

    def bind(self, work: Work) -> None:
        """Set the work to drop when the client leaves; replaces earlier work."""
        self._work = work
        if self.failure is not None:  # it left a moment ago
            work.abandon(self.failure)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Note that the body waits for the client to send."""
        self._reading_since = self._clock()
        try:
            yield
        finally:
            self._reading_since = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Note that the body waits for the client to receive."""
        self._writing_since = self._clock()
        try:
            yield
        finally:
            self._writing_since = None

    def abandon(self, error: FletcherError) -> None:
        """Drop the call's work, now and whatever is bound later."""
        self.failure = error
        if self._work is not None:
            self._work.abandon(error)

    def silent_s(self) -> float:
        """Seconds for which the server has waited for nothing but the client."""
        now, reading, writing = self._clock(), self._reading_since, self._writing_since
        if writing is not None:
            return now - writing
        if reading is None or (self._work is not None and not self._work.idle):
            self._active = now
            return 0.0
        return now - max(reading, self._active)


@dataclass(frozen=True, slots=True)
class WatchTiming:
    """Intervals of the watch, in seconds."""

    poll_s: float = 0.02  # between two looks at open calls
    quiet_poll_s: float = 0.1  # the same, while no call is open
    keep_alive_s: float = 1.0  # age of a call whose connection is watched by the kernel
    last_words_s: float = 1.0  # for a silent client to get its error before its connection ends


class CallWatch:
    """Watch over all callers of a server, on a thread. Thread-safe.

    Args:
        idle_timeout_s: How long a caller may be silent; 0: without limit.
        connections: The callers' sockets.
    """

    def __init__(
        self,
        idle_timeout_s: float,
        connections: ServerConnections,
        timing: WatchTiming | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._connections = connections
        self._timing = timing or WatchTiming()
        self._clock = clock
        # Held while a context is used: it must not be used after its handler has returned.
        self._lock = threading.Lock()
        self._callers: dict[Caller, None] = {}
        self._kept_alive: set[Peer] = set()
        self._next_scan = 0.0
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="callers", daemon=True).start()

    def close(self) -> None:
        """End the thread, and the connections of all open calls. Idempotent."""
        self._closed.set()
        with self._lock:
            peers = {peer for caller in self._callers if (peer := parse_peer(caller.peer()))}
        self._connections.shut_down(peers)

    @contextmanager
    def watch(self, context: Any) -> Iterator[Caller]:
        """Watch a call's client while the body, its handler, runs."""
        caller = Caller(context, self._clock)
        with self._lock:
            self._callers[caller] = None
        try:
            yield caller
        finally:
            with self._lock:
                del self._callers[caller]

    def look(self) -> None:
        """Look at all callers once."""
        with self._lock:
            callers = list(self._callers)
        for caller in callers:
            if caller.failure is None and self._ask(caller, Caller.is_cancelled):
                caller.abandon(CancelledError("the client ended the call, or its deadline passed"))
            elif caller.failure is not None:  # again: what stopped the work from ending may be gone
                caller.abandon(caller.failure)
            elif 0 < self._idle_timeout_s <= caller.silent_s():
                self._give_up(caller)
        self._end_silent(callers)
        self._keep_alive(callers)

    def _run(self) -> None:
        timing = self._timing
        while not self._closed.wait(timing.poll_s if self._callers else timing.quiet_poll_s):
            try:
                self.look()
            except BaseException:
                with contextlib.suppress(BaseException):  # else this thread would end
                    log.exception("the callers cannot be watched")

    def _ask(self, caller: Caller, question: Callable[[Caller], Any]) -> Any:
        """Ask a caller's context; None if the call's handler has returned."""
        with self._lock:
            return question(caller) if caller in self._callers else None

    def _give_up(self, caller: Caller) -> None:
        caller.given_up = self._clock()
        log.info("a call is given up: its client was silent for %g s", self._idle_timeout_s)
        caller.abandon(
            OverloadedError(
                f"the client sent or took nothing for {self._idle_timeout_s:g} s, so its place was "
                "given to others; call again, or raise `idle_timeout`",
                retry_after_ms=0,
            )
        )

    def _end_silent(self, callers: list[Caller]) -> None:
        """Shut down connections on which all calls were given up."""
        due = self._clock() - self._timing.last_words_s
        silent = [one for one in callers if one.given_up is not None and one.given_up <= due]
        if not silent:
            return
        peers = self._peers(silent)
        in_use = self._peers([one for one in callers if one not in silent])
        self._connections.shut_down(peers - in_use)

    def _keep_alive(self, callers: list[Caller]) -> None:
        now, after_s = self._clock(), self._timing.keep_alive_s
        if now < self._next_scan:
            return
        self._next_scan = now + after_s
        old = self._peers([one for one in callers if one.began <= now - after_s])
        self._kept_alive &= old
        if new := old - self._kept_alive:
            self._connections.keep_alive(new)
            self._kept_alive |= new

    def _peers(self, callers: list[Caller]) -> set[Peer]:
        names = [self._ask(caller, Caller.peer) for caller in callers]
        return {peer for name in names if name and (peer := parse_peer(name)) is not None}
