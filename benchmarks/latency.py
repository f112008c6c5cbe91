"""Milliseconds of one short text over an open DoExchange, idle and under bulk load.

Under load, requests come at random times, whether or not earlier ones were answered, and a time
counts from when its request was due. Windows with and without requests alternate, which shows what
requests cost the bulk load.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.arguments import add_common, positive, seconds
from benchmarks.bare import PAUSE_S
from benchmarks.corpus import ROOT
from benchmarks.engines import configure, run_bare, save_tokens
from benchmarks.interactive import LoadWindow, alone, beside, busy_load, one_by_one
from benchmarks.jobs import JobError, clean_environment
from benchmarks.serving import serve
from benchmarks.setting import Setting

DIFFERENT_TEXTS = 64
PERCENTILES = (50, 95, 99)
BARE, PACED = "bare engine, ready tokens", f"the same, {PAUSE_S * 1000:g} ms pause before each"
IDLE, LOADED = "Fletcher, idle", "Fletcher, under bulk load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument(
        "--requests",
        type=positive,
        default=500,
        help="of the bare engine and of the idle server (default: 500)",
    )
    parser.add_argument(
        "--rate", type=positive, default=20, help="requests/s under bulk load (default: 20)"
    )
    parser.add_argument(
        "--windows",
        type=positive,
        default=3,
        help="of bulk load with requests, and as many without (default: 3)",
    )
    parser.add_argument(
        "--window-s", type=seconds, default=15.0, help="length of a window (default: 15)"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    setting = Setting.of(args)
    corpus, bundle = setting.corpus, setting.bundle
    texts = corpus.sample_titles(DIFFERENT_TEXTS)
    own = configure(bundle, "auto", "auto", 0)
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        folder = Path(scratch)
        tokens = folder / "tokens.npz"
        num_tokens = save_tokens(bundle, texts, tokens)
        inline = own.backend == "openvino" and own.threads > 1  # the run of an idle server
        loader = "load_inline" if inline else "load"
        job = {"tokens": str(tokens), "requests": args.requests, "loader": loader}
        bare = run_bare(own, job, folder)
        if "skipped" in bare:
            raise JobError(bare["skipped"])
        with serve(args.home, bundle.name, "--device", "cpu", arguments=args.serve_args) as served:
            idle = one_by_one(served.address, texts, args.requests)
            with _bulk_load(served.address, args.corpus):
                windows = _loaded(served.address, texts, args)
                by_stats = busy_load(served.address)
    loaded = [ms for _, one in windows for ms in one.ms]
    times = {BARE: bare["ms"], PACED: bare["paced_ms"], IDLE: idle, LOADED: loaded}
    rows = [{"name": name, **percentiles(some), "ms": some} for name, some in times.items()]
    bulk = [{"alone": one.bulk_rate, "beside": two.bulk_rate} for one, two in windows]
    busy = {
        "alone": statistics.median(one.busy for one, _ in windows),
        "beside": statistics.median(two.busy for _, two in windows),
        "stats": by_stats,
    }
    result = {
        **setting.about("latency"),
        "model": bundle.qualified_name,
        "engine": bare["engine"],
        "rows": rows,
        "bulk_tokens_per_s": bulk,
        "busy": busy,
    }
    print(setting.heading())
    print(
        f"{bundle.qualified_name}, {own.backend} {own.precision}; one text a request, "
        f"{num_tokens / len(texts):.0f} tokens on average; {args.requests} requests one after the "
        f"other, {len(loaded)} under load at {args.rate}/s\n"
    )
    print(_table(rows))
    print(_loss(bulk))
    print(
        f"device busy, by its counters: {busy['alone']:.2f} of the time alone, "
        f"{busy['beside']:.2f} beside the requests; `stats` says "
        f"{busy['stats']:.2f} for all of it (aim: 0.9)"
    )
    print("\n" + report.publish(args.out, result))
    return 0


def _loaded(
    address: str, texts: list[str], args: argparse.Namespace
) -> list[tuple[LoadWindow, LoadWindow]]:
    """Windows of bulk load without and with requests, alternating."""
    rng = np.random.default_rng(0)
    return [
        (
            alone(address, args.window_s),
            beside(address, texts, args.window_s, args.rate, rng),
        )
        for _ in range(args.windows)
    ]


def percentiles(times: list[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    values = np.percentile(times, PERCENTILES).tolist()
    return {f"p{rank}": value for rank, value in zip(PERCENTILES, values, strict=True)}


@contextmanager
def _bulk_load(address: str, corpus: Path | None) -> Iterator[None]:
    """Another process uploads to the server while the body runs."""
    command = [sys.executable, "-m", "benchmarks.load", address]
    command += [str(corpus)] if corpus else []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != "loading":
            raise JobError(f"the bulk load ended with {process.wait()} before it had begun")
        yield
        if process.poll() is not None:
            raise JobError(f"the bulk load ended early, with {process.returncode}")
    finally:
        process.communicate()


def _loss(bulk: list[dict[str, float]]) -> str:
    rates = {name: statistics.median(one[name] for one in bulk) for name in ("alone", "beside")}
    return (
        f"bulk load, medians of {len(bulk)} windows: {rates['alone']:,.0f} tokens/s alone, "
        f"{rates['beside']:,.0f} beside the requests, a loss of "
        f"{1 - rates['beside'] / rates['alone']:.1%} (aim: 15% at most)"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    names = [f"p{rank}" for rank in PERCENTILES]
    header = ["", *(f"{name} ms" for name in names), "p50 to bare"]
    bare = rows[0]["p50"]
    lines = [
        [row["name"], *(f"{row[name]:.2f}" for name in names), f"{row['p50'] / bare:.2f}"]
        for row in rows
    ]
    goal = (
        f"aims: idle p50 of 1.3 x bare + 1 ms = {1.3 * bare + 1:.2f} ms; under load p99 of 100 ms"
    )
    return report.table(header, lines) + "\n\n" + goal
