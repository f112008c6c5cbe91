"""Settings of the C library's allocator, for large blocks shared by threads."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

# Settings of `mallopt`, by their numbers in malloc.h. By default glibc requests each block of
# 128 KiB or more from the system, and returns the block when it is freed. The system provides the
# memory page by page. For arrays of some hundred rows, that took a quarter of the front process's
# time.
_SETTINGS = {
    -3: 32 << 20,  # M_MMAP_THRESHOLD: smallest block requested separately; the maximum allowed
    -1: 256 << 20,  # M_TRIM_THRESHOLD: free memory that an arena keeps
    # M_ARENA_MAX: number of arenas. gRPC and Lance have many threads, and by default nearly every
    # thread gets an arena. Threads cannot reuse memory that was freed in another arena, so the
    # process held twice the memory in use.
    -8: 4,
}
_TICK_S = 0.25
_IDLE_S = 5.0
_WORTHWHILE_BYTES = 32 << 20


def keep_large_blocks() -> None:
    """Make the process keep freed memory for reuse by its threads.

    `trim_heap` returns the memory to the system. With a C library that lacks `mallopt`, this does
    nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for setting, value in _SETTINGS.items():
            libc.mallopt(setting, value)


def trim_heap() -> None:
    """Return freed memory to the system, which takes some milliseconds."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class IdleTrimmer:
    """Thread that returns freed memory to the system once the process is idle.

    The process is idle when `used_bytes`, which gives the memory in use, has returned 0 for some
    seconds.
    """

    def __init__(
        self,
        used_bytes: Callable[[], int],
        trim: Callable[[], None] = trim_heap,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._used_bytes = used_bytes
        self._trim = trim
        self._clock = clock
        self._last_used = clock()
        self._peak_bytes = 0  # since the last trim
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start a thread that calls `trim_if_idle` every 0.25 s until `stop`."""
        threading.Thread(target=self._run, name="heap-trimmer", daemon=True).start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stopped.set()

    def trim_if_idle(self) -> None:
        """Trim if no memory was in use for 5 s, and at least 32 MiB were before that."""
        used_bytes, now = self._used_bytes(), self._clock()
        self._peak_bytes = max(self._peak_bytes, used_bytes)
        if used_bytes:
            self._last_used = now
        elif self._peak_bytes >= _WORTHWHILE_BYTES and now - self._last_used >= _IDLE_S:
            self._peak_bytes = 0
            self._trim()

    def _run(self) -> None:
        while not self._stopped.wait(_TICK_S):
            self.trim_if_idle()
