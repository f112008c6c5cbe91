"""Milliseconds of a short query right after callers gave up their calls of long texts.

The bound is the longest micro-batch, by the server's `stats`, plus 1.5 of the query's p50 on the
idle server: a run that has begun cannot be stopped, and nothing else may be left of the calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyarrow import flight

from benchmarks import report
from benchmarks.arguments import add_common, positive, seconds
from benchmarks.jobs import JobError
from benchmarks.serving import serve
from benchmarks.setting import Setting

TEXTS_PER_CALL = 32
IDLE_QUERIES = 50
_LONG = "words that make a text as long as the model reads it, and longer still. " * 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument(
        "--calls", type=positive, default=40, help="that are given up (default: 40)"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="turns (default: 5)")
    parser.add_argument(
        "--patience-s", type=seconds, default=1.0, help="deadline of each call (default: 1)"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON; returns 1 if the bound was missed."""
    setting = Setting.of(args)
    model = setting.bundle.name
    rows: list[dict[str, Any]] = []
    with (
        serve(args.home, model, arguments=args.serve_args, with_store=False) as served,
        flight.connect(served.address) as client,
    ):
        idle_ms = statistics.median(_query_ms(client) for _ in range(IDLE_QUERIES))
        for _ in range(args.repeats):
            given_up = _give_up_calls(client, args.calls, args.patience_s)
            query_ms = _query_ms(client)
            stages = _action(client, "stats")["fletcher.stage.duration"]
            longest_ms = 1000 * stages["inference"]["p99"]
            rows.append(
                {
                    "given_up": given_up,
                    "query_ms": query_ms,
                    "bound_ms": longest_ms + 1.5 * idle_ms,
                    "left": _left(client),
                }
            )
    print(setting.heading())
    print(f"{model}; a query takes {idle_ms:.1f} ms on the idle server\n")
    print(_table(rows))
    result = {**setting.about("abandoned"), "model": model, "idle_ms": idle_ms, "rows": rows}
    print("\n" + report.publish(args.out, result))
    return int(any(one["query_ms"] > one["bound_ms"] for one in rows))


def _give_up_calls(client: flight.FlightClient, number: int, patience_s: float) -> int:
    """Makes calls at the same time that pass their deadline; returns how many did."""
    body = json.dumps({"texts": [f"{n} {_LONG}" for n in range(TEXTS_PER_CALL)]}).encode()

    def give_up(_: int) -> bool:
        try:
            list(
                client.do_action(
                    flight.Action("embed", body), flight.FlightCallOptions(timeout=patience_s)
                )
            )
        except flight.FlightTimedOutError:
            return True
        return False

    with ThreadPoolExecutor(number) as threads:
        given_up = sum(threads.map(give_up, range(number)))
    if not given_up:
        raise JobError("every call was answered in time; give a smaller --patience-s")
    return given_up


def _query_ms(client: flight.FlightClient) -> float:
    started = time.perf_counter()
    _action(client, "embed", {"texts": ["a short query"]})
    return (time.perf_counter() - started) * 1000


def _left(client: flight.FlightClient) -> int:
    """Texts, tokens and micro-batches that still wait."""
    depths = _action(client, "stats")["fletcher.queue.depth"]
    return int(sum(depths[stage] for stage in ("texts", "tokens", "micro_batches")))


def _action(client: flight.FlightClient, name: str, body: Any = None) -> Any:
    raw = b"" if body is None else json.dumps(body).encode()
    (result,) = client.do_action(flight.Action(name, raw), flight.FlightCallOptions(timeout=300))
    return json.loads(result.body.to_pybytes())


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return report.table(
        ("calls given up", "next query, ms", "bound, ms", "left in queues"),
        [
            (
                str(one["given_up"]),
                f"{one['query_ms']:.0f}",
                f"{one['bound_ms']:.0f}",
                str(one["left"]),
            )
            for one in rows
        ],
    )
