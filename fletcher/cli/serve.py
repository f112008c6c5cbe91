"""`fletcher serve`: run a server in the foreground until a signal."""

from __future__ import annotations

import logging
import threading

from fletcher.cli.command_line import command, option
from fletcher.cli.options import ConfigFlags, config_options
from fletcher.cli.shutdown import Signals, end_within, leave_in_time, leave_now
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
    with Signals(_log) as signals, Runtime(config) as runtime:
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
        with end_within(config.limits.drain_timeout_s + CLOSE_S, _log):
            drained = runtime.drain(config.limits.drain_timeout_s)
            ended = runtime.close()
    _log.info("stopped")
    if not ended:
        _log.warning("left calls open whose clients are silent")
    return leave_now(0 if drained else 1)
