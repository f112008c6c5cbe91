"""Start of threads, which the system may refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fletcher.errors import OverloadedError

_RETRY_MS = 1000


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread, and return it.

    Change the state that says that the thread runs after this call, not before.

    Raises:
        OverloadedError: The system allows no more threads now (RLIMIT_NPROC, TasksMax, memory).
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OverloadedError(
            f"the server cannot start the thread {name!r}: {error}; try again later",
            retry_after_ms=_RETRY_MS,
        ) from error
    return thread
