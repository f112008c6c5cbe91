"""How the C library's allocator is set, for processes that pass large blocks between threads."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD_BYTES = 128 << 10


def return_large_blocks() -> None:
    """Lets blocks of 128 KiB and more go back to the system when they are freed.

    That is where glibc starts, but it raises the threshold to 32 MiB as blocks are freed, and then
    keeps them in the arenas of the threads that had them, those of gRPC and Lance: the resident set
    grew from 340 to 730 MiB over 400,000 rows, with 500 MiB of it free. A C library without
    `mallopt` is left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
