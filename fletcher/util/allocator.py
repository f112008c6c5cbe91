"""Settings of the C library's allocator, for large blocks shared by threads."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

# Option numbers of malloc.h. By default glibc takes a block of 128 KiB or more from the system,
# page by page as it is touched, and returns it when it is freed. With arrays of some hundred rows
# each, that took a quarter of the front process's time.
_SETTINGS = {
    -3: 32 << 20,  # M_MMAP_THRESHOLD: the largest value allowed
    -1: 256 << 20,  # M_TRIM_THRESHOLD: free memory that an arena keeps
    # M_ARENA_MAX: gRPC and Lance have many threads. With an arena for nearly each of them, memory
    # that one frees is useless to the next, and the resident set grew to twice what was in use.
    -8: 4,
}
_TICK_S = 0.25
_IDLE_S = 5.0
_WORTHWHILE_BYTES = 32 << 20


def keep_large_blocks() -> None:
    """Keep freed memory for reuse by any thread, not returning it to the system.

    `trim_heap` returns it later. A C library without `mallopt` is left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for setting, value in _SETTINGS.items():
            libc.mallopt(setting, value)


def trim_heap() -> None:
    """Return freed memory to the system; takes milliseconds."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class IdleTrimmer:
    """Trims the heap some seconds after `used_bytes`, the memory in use, is 0."""

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
        """Check on a thread every 0.25 s, until `stop`."""
        threading.Thread(target=self._run, name="heap-trimmer", daemon=True).start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stopped.set()

    def trim_if_idle(self) -> None:
        """Trim if nothing was in use for 5 s, and at least 32 MiB were in use before."""
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
