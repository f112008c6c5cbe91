"""`python -m benchmarks BENCHMARK`, from the repository's root."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

import pyarrow as pa

from benchmarks import (
    abandoned,
    delivery,
    exits,
    gpu,
    latency,
    neighbours,
    overhead,
    roofline,
    scaling,
    stages,
    throughput,
)
from benchmarks.jobs import JobError
from fletcher.errors import FletcherError

COMMANDS = {
    "throughput": throughput,
    "overhead": overhead,
    "delivery": delivery,
    "latency": latency,
    "abandoned": abandoned,
    "neighbours": neighbours,
    "roofline": roofline,
    "stages": stages,
    "scaling": scaling,
    "exits": exits,
    "gpu": gpu,
}


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark; returns 1 if it could not be measured."""
    # Arguments after `--` go to the server.
    own = list(argv)
    split = own.index("--") if "--" in own else len(own)
    own, serve_args = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        epilog="Arguments after -- go to fletcher-serve, such as -- --group-rows 5000",
    )
    subparsers = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").splitlines()[0]
        command = subparsers.add_parser(name, help=about, description=about)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(own)
    args.serve_args = serve_args
    # Servers and engines are child processes, and must end with this one, also on SIGTERM.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return int(args.run(args))
    except (FletcherError, JobError, pa.ArrowException, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
