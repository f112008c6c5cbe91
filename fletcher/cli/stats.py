"""`fletcher stats`: print the answer of a running server to the action `stats`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fletcher.cli.command_line import command
from fletcher.cli.connection import RemoteServer, server_options
from fletcher.cli.options import json_option
from fletcher.cli.progress import human
from fletcher.cli.terminal import grouped, index_share, print_json, print_table

# Suffixes of the counters `fletcher.rows.*`, in the order of printing.
_ROWS = ("received", "stored", "failed", "deduplicated")


@command("stats", "fletcher stats --server grpc://localhost:8815")
@json_option("Print all numbers as one JSON object.")
@server_options(required=True)
def cli(server: RemoteServer, as_json: bool) -> None:
    """Show the state of a running server.

    Lists the load, stores, models and workers, and the numbers of rows and durations since the
    server started. docs/server.md explains each line.
    """
    with server.connect() as client:
        stats = client.stats()
    if as_json:
        print_json(stats)
        return
    print_table(grouped(_lines(stats)))


def _lines(stats: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(heading, text) of each line to print."""
    pressure = stats["pressure"]
    state = "draining" if stats["draining"] else "takes calls"
    yield "server", f"{state}, {stats['fletcher.streams.open']} streams open"
    yield "pressure", f"{pressure['grade']} for {pressure['for_s']:,.0f} s: {pressure['reason']}"
    used, total = (f"{human(stats['memory'][name])}B" for name in ("used_bytes", "total_bytes"))
    yield "memory", f"{used} of {total} for work in flight"
    for name, store in stats["stores"].items():
        said = f"{store['state']}, {store['outages']} outages, pace {store['pace']:.0%}"
        yield "stores", f"{name}: {said}"
        for dataset, numbers in store.get("datasets", {}).items():  # not of earlier releases
            yield "stores", f"{name}/{dataset}: {index_share(numbers['rows'], numbers['indexed'])}"
            if numbers["trouble"]:
                yield "stores", f"-> {numbers['trouble']}"
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
