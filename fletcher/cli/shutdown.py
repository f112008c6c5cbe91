"""A bound on the exit of a process that served, even if a call still waits."""

from __future__ import annotations

import atexit
import os
import threading

_leaving = threading.Event()
_code = 0


def leave_in_time(timeout_s: float = 3.0) -> None:
    """Ends this process at most `timeout_s` after its command is done.

    At exit pyarrow shuts its servers down once more, and waits without a deadline for handlers
    whose clients may never answer. All data is saved by then.
    """
    # At exit no thread can be started.
    threading.Thread(target=_watch, args=(timeout_s,), name="leaving", daemon=True).start()
    atexit.register(_leaving.set)


def leave_with(code: int) -> int:
    """Stores the exit code for a process that must be ended, and returns it."""
    global _code  # noqa: PLW0603  (a process has one exit code)
    _code = code
    return code


def _watch(timeout_s: float) -> None:
    _leaving.wait()
    threading.Event().wait(timeout_s)
    os._exit(_code)
