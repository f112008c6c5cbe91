"""The end of a process that served: bounded, whatever a call may still be waiting for."""

from __future__ import annotations

import atexit
import os
import threading

TIMEOUT_S = 3.0

_leaving = threading.Event()
_code = 0


def leave_in_time() -> None:
    """Ends this process at most TIMEOUT_S after its commands are done.

    At exit pyarrow shuts its servers down once more, and waits without bound for handlers, which
    wait for clients that may never answer. By then everything that can be saved has been saved.
    """
    # Started now, for at exit no thread can be started any more.
    threading.Thread(target=_watch, name="leaving", daemon=True).start()
    atexit.register(_leaving.set)


def leave_with(code: int) -> int:
    """Notes the exit code for a process that must be ended, and gives it back."""
    global _code  # noqa: PLW0603  (a process has one exit code)
    _code = code
    return code


def _watch() -> None:
    _leaving.wait()
    threading.Event().wait(TIMEOUT_S)
    os._exit(_code)
