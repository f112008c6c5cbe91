"""`fletcher stats`: how a running server is doing, by its action `stats`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fletcher.cli.connection import add_server, open_server
from fletcher.cli.parser import check_server
from fletcher.cli.progress import human
from fletcher.cli.terminal import printable

# Of `fletcher.rows.*`, in the order in which a row meets them.
_ROWS = ("received", "stored", "failed", "deduplicated")


def add_parser(subparsers: Any) -> None:
    """Adds `stats`."""
    parser = subparsers.add_parser(
        "stats",
        usage="fletcher stats --server URI [options]",
        help="show how a running server is doing",
        description="Shows a server's pressure, stores, models, workers, rows and times since it "
        "started; docs/operations.md says what they mean, and --json has all numbers.",
        example="fletcher stats --server grpc://localhost:8815",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_server(parser, required=True)


def run(args: argparse.Namespace) -> int:
    """Asks and prints."""
    check_server(args)
    with open_server(args) as client:
        stats = client.stats()
    if args.json:
        print(json.dumps(stats, ensure_ascii=False))
        return 0
    part = ""
    for name, line in _lines(stats):
        print(f"{'' if name == part else name:<8}  {printable(line)}")
        part = name
    return 0


def _lines(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What to show: the part that it belongs to, and a line of it."""
    pressure = stats["pressure"]
    state = "draining" if stats["draining"] else "takes calls"
    yield "server", f"{state}, {stats['fletcher.streams.open']} streams open"
    yield "pressure", f"{pressure['grade']} for {pressure['for_s']:,.0f} s: {pressure['reason']}"
    used, total = (f"{human(stats['memory'][name])}B" for name in ("used_bytes", "total_bytes"))
    yield "memory", f"{used} of {total} for work in flight"
    for name, store in stats["stores"].items():
        said = f"{store['state']}, {store['outages']} outages, pace {store['pace']:.0%}"
        yield "stores", f"{name}: {said}"
    for model in stats["models"]:
        said = f"{model['state']}, {model['calls']} calls, {human(model['memory_bytes'])}B"
        yield "models", f"{model['name']}@{model['hash']}: {said}"
    for worker in (*stats["replicas"], *stats["tokenizers"]):
        said = f"{worker['state']}, {worker['in_flight']} in flight, {worker['restarts']} restarts"
        if "busy" in worker:
            said += f", busy {worker['busy']:.0%}, {worker['backend']} {worker['precision']}"
        yield "workers", f"{worker['name']} of {worker['model']}: {said}"
    yield "rows", ", ".join(f"{stats[f'fletcher.rows.{name}']:,} {name}" for name in _ROWS)
    yield "queues", _counts(stats["fletcher.queue.depth"])
    yield "errors", _counts(stats["fletcher.errors"]) or "none"
    for stage, times in stats["fletcher.stage.duration"].items():
        shown = ", ".join(f"{name} {1000 * times[name]:,.1f} ms" for name in ("p50", "p95", "p99"))
        yield "times", f"{stage}, {times['count']:,} times: {shown}"


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counted.items())
