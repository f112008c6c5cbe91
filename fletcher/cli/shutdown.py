"""Limit on the time that a server's process takes to exit."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from typing import NoReturn

EXIT_INTERRUPTED = 130
_leaving = threading.Event()
_code = 0


def leave_in_time(timeout_s: float = 3.0) -> None:
    """End this process at most `timeout_s` seconds after its command is done.

    At exit, pyarrow shuts its servers down again. It then waits without a time limit for call
    handlers whose clients may never answer. All data is saved before that.
    """
    # The thread is started now because none can be started at exit.
    threading.Thread(target=_watch, args=(timeout_s,), name="leaving", daemon=True).start()
    atexit.register(_leaving.set)


def leave_soon(code: int) -> None:
    """End this process as after its command, even if that does not end.

    A store that does not answer would hold up the end of the command.
    """
    leave_with(code)
    _leaving.set()


def leave_now(code: int) -> NoReturn:
    """End this process without the interpreter's exit. All data must be saved before.

    The interpreter's exit would destroy the Flight servers. That waits for their calls without a
    time limit, and for threads of gRPC that could not start. It holds the interpreter's lock
    meanwhile, so that no other thread could end the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_with(code: int) -> int:
    """Store the exit code for `leave_in_time`, which may end the process; return it."""
    global _code  # noqa: PLW0603  (a process has one exit code)
    _code = code
    return code


def _watch(timeout_s: float) -> None:
    _leaving.wait()
    threading.Event().wait(timeout_s)
    os._exit(_code)
