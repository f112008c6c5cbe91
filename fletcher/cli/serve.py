"""`fletcher serve`: run a server in the foreground until a signal."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from fletcher.cli.command_line import command, option
from fletcher.cli.options import ConfigFlags, config_options
from fletcher.cli.shutdown import leave_in_time, leave_now
from fletcher.cli.terminal import say
from fletcher.config.server import OPTIONS, ServeConfig
from fletcher.telemetry.logs import set_up_logging

# Time limit for closing workers and ports after the drain; then the process is ended.
CLOSE_S = 5.0

_log = logging.getLogger("fletcher.serve")


@command(
    "serve",
    "fletcher serve --store lance:/data/vectors --port 8815",
    "fletcher serve --config fletcher.toml --print-config",
)
@option("--print-config", is_flag=True)
@config_options(*OPTIONS, warn=False)
def cli(flags: ConfigFlags, print_config: bool) -> int:
    """Serve embeddings over Arrow Flight until SIGTERM or SIGINT, then drain.

    Each option can be given as a flag, as an environment variable or as a key of the TOML file:
    --max-streams, FLETCHER_MAX_STREAMS or max_streams. A flag overrides the variable, and the
    variable overrides the file.

    Args:
        print_config: Print the value of each option as TOML, with its source, and exit.
    """
    resolved = flags.resolve()
    if print_config:
        for warning in resolved.warnings:
            say(f"fletcher serve: {warning}")
        print(resolved.to_toml(), end="")
        return 0
    telemetry = resolved.config.telemetry
    set_up_logging(telemetry.log_level, telemetry.log_format)
    for warning in resolved.warnings:
        _log.warning(warning)
    return _serve(resolved.config)


def _serve(config: ServeConfig) -> int:
    from fletcher.runtime import Runtime

    leave_in_time()
    with _Signals() as signals, Runtime(config) as runtime:
        signals.mark_ready()
        print(f"listening on {runtime.address}", flush=True)

        def watch() -> None:
            # If the server ends by itself, the process must end, so that a supervisor restarts it.
            runtime.wait()
            signals.stop.set()

        threading.Thread(target=watch, name="watch", daemon=True).start()
        signals.stop.wait()
        if signals.received is None:
            _log.error("the server ended by itself")
            return 1
        _log.info("draining", extra={"timeout_s": config.limits.drain_timeout_s})
        with _deadline(config.limits.drain_timeout_s + CLOSE_S):
            drained = runtime.drain(config.limits.drain_timeout_s)
            ended = runtime.close()
    _log.info("stopped")
    if not ended:
        _log.warning("left calls open whose clients are silent")
    return leave_now(0 if drained else 1)


class _Signals:
    """Handling of SIGTERM and SIGINT: the first stops, the second exits immediately.

    SIGHUP is logged and ignored, so that a closed terminal does not end the server.

    Python runs signal handlers only between two bytecodes of the main thread. While the main thread
    waits in C code, no handler would run for the second signal. Python's C code therefore writes
    each signal to the wake-up file descriptor, and a thread reads it from there.

    Attributes:
        stop: Event that tells the server to stop. Set at the first signal, but not before
            `mark_ready`.
        received: Number of the first signal; None before it.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.received: int | None = None
        self._ready = False
        self._before: dict[int, Any] = {}

    def mark_ready(self) -> None:
        """Make a signal stop the server. Before this call, a signal aborts the start."""
        self._ready = True
        if self.received is not None:
            self.stop.set()

    def __enter__(self) -> _Signals:
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
                _log.info("SIGHUP ignored: there is nothing to reload")
            if byte[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            seen += 1
            if seen > 1:
                os._exit(128 + byte[0])
            self.received = byte[0]
            if self._ready:
                self.stop.set()
        os.close(self._reader)


@contextlib.contextmanager
def _deadline(timeout_s: float) -> Iterator[None]:
    def give_up() -> None:
        _log.error("not drained in time", extra={"timeout_s": timeout_s})
        os._exit(1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
