"""Handling of signals that end a server, and limits on the time until its exit."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

EXIT_INTERRUPTED = 130
_leaving = threading.Event()
_code = 0


class Signals:
    """Handling of SIGTERM and SIGINT: the first stops, the second exits at once.

    SIGHUP is logged and ignored, so that a closed terminal does not end the server.

    Python runs signal handlers only between two bytecodes of the main thread. While the main thread
    waits in C code, no handler would run for the second signal. Python's C code therefore writes
    each signal to the wake-up file descriptor, and a thread reads it from there.

    Args:
        log: Log of the command.

    Attributes:
        stop: Event that tells the server to stop. Set at the first signal, but not before
            `mark_ready`.
        received: Number of the first signal; None before it.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.stop = threading.Event()
        self.received: int | None = None
        self._ready = False
        self._before: dict[int, Any] = {}

    def mark_ready(self) -> None:
        """Make a signal stop the server. Before this call, a signal aborts the start."""
        self._ready = True
        if self.received is not None:
            self.stop.set()

    def __enter__(self) -> Signals:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(self._reader, True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            signal.signal(number, before)
        os.close(self._writer)

    def _handle(self, number: int, _: object) -> None:
        if not self._ready and number != signal.SIGHUP:
            raise SystemExit(128 + number)

    def _read(self) -> None:
        seen = 0
        while byte := os.read(self._reader, 1):
            if byte[0] == signal.SIGHUP:
                self._log.info("SIGHUP ignored: there is nothing to reload")
            if byte[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            seen += 1
            if seen > 1:
                os._exit(128 + byte[0])
            self.received = byte[0]
            if self._ready:
                self.stop.set()
        os.close(self._reader)


@contextmanager
def end_within(timeout_s: float, log: logging.Logger) -> Iterator[None]:
    """End this process with status 1 if the block is longer than `timeout_s` s."""

    def give_up() -> None:
        log.error("not ended in time", extra={"timeout_s": timeout_s})
        os._exit(1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
