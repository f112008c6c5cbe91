"""How the C library's allocator is set, for processes that pass large blocks between threads."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

# By malloc.h's numbers. As glibc starts, a block of 128 KiB or more comes from the system, page by
# page as it is touched, and goes back when it is freed: with arrays of some hundred rows each, that
# took a quarter of the front process's time.
_SETTINGS = {
    -3: 32 << 20,  # M_MMAP_THRESHOLD, as large as it can be
    -1: 256 << 20,  # M_TRIM_THRESHOLD: what is free at an arena's end before that goes back
    # M_ARENA_MAX: with an arena for nearly every thread (gRPC and Lance have many), what one frees
    # is of no use to the next, and the resident set grew to twice what was in use.
    -8: 4,
}
_TICK_S = 0.25
_IDLE_S = 5.0
_WORTHWHILE_BYTES = 32 << 20


def keep_large_blocks() -> None:
    """Lets what is freed be used again, by any thread, rather than go back to the system at once.

    `give_back` does that later. A C library without `mallopt` is left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for setting, value in _SETTINGS.items():
            libc.mallopt(setting, value)


def give_back() -> None:
    """Gives freed memory back to the system; takes milliseconds."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class Returning:
    """Gives memory back some seconds after work has ended.

    Args:
        used_bytes: What is in use now.
        give_back: Gives back what is free.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        used_bytes: Callable[[], int],
        give_back: Callable[[], None] = give_back,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._used_bytes = used_bytes
        self._give_back = give_back
        self._clock = clock
        self._busy = clock()
        self._most_bytes = 0  # in use at a time since memory was given back
        self._stopped = threading.Event()

    def watch(self) -> None:
        """Looks from now on, in a thread of its own, until `stop`."""
        threading.Thread(target=self._watch, name="returning", daemon=True).start()

    def stop(self) -> None:
        """Ends `watch`. Idempotent."""
        self._stopped.set()

    def look(self) -> None:
        """Sees what is in use, and gives back what was, where that is worth it."""
        used_bytes, now = self._used_bytes(), self._clock()
        self._most_bytes = max(self._most_bytes, used_bytes)
        if used_bytes:
            self._busy = now
        elif self._most_bytes >= _WORTHWHILE_BYTES and now - self._busy >= _IDLE_S:
            self._most_bytes = 0
            self._give_back()

    def _watch(self) -> None:
        while not self._stopped.wait(_TICK_S):
            self.look()
