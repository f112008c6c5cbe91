"""Milliseconds of one short text over an open DoExchange, idle and under bulk load."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from benchmarks import hardware, report
from benchmarks.arguments import add_common, as_options, positive
from benchmarks.corpus import ROOT, Corpus
from benchmarks.engines import configure, run_bare, save_tokens
from benchmarks.jobs import JobError, clean_environment
from benchmarks.serving import serve
from fletcher import EmbedOptions
from fletcher.models.registry import Registry

DIFFERENT_TEXTS = 64
WARM_UP_REQUESTS = 20
PERCENTILES = (50, 95, 99)
BARE, IDLE, LOADED = "bare engine, ready tokens", "Fletcher, idle", "Fletcher, under bulk load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument(
        "--requests", type=positive, default=500, help="of each kind (default: 500)"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    hardware.limit_cores(args.cores)
    machine, versions = hardware.facts(), hardware.versions()
    corpus = Corpus.load(args.corpus)
    texts = corpus.sample_titles(DIFFERENT_TEXTS)
    bundle = Registry(args.home / "models").ensure(args.model, print)
    own = configure(bundle, "auto", "auto", 0)
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        folder = Path(scratch)
        tokens = folder / "tokens.npz"
        num_tokens = save_tokens(bundle, texts, tokens)
        bare = run_bare(own, {"tokens": str(tokens), "requests": args.requests}, folder)
    if "skipped" in bare:
        raise JobError(bare["skipped"])
    times = {BARE: bare["ms"]}
    with serve(args.home, bundle.name, "--device", "cpu", arguments=args.serve_args) as served:
        times[IDLE] = exchange_times(served.address, texts, args.requests)
        with _bulk_load(served.address, args.corpus):
            times[LOADED] = exchange_times(served.address, texts, args.requests)
    rows = [{"name": name, **percentiles(some), "ms": some} for name, some in times.items()]
    result = {
        "benchmark": "latency",
        "hardware": machine,
        "versions": versions,
        "options": as_options(args),
        "model": bundle.qualified_name,
        "engine": bare["engine"],
        "rows": rows,
    }
    print(report.heading(machine, versions))
    print(
        f"{bundle.qualified_name}, {own.backend} {own.precision}; one text a request, "
        f"{num_tokens / len(texts):.0f} tokens on average, {args.requests} requests\n"
    )
    print(_table(rows))
    print("\n" + report.publish(args.out, result))
    return 0


def exchange_times(address: str, texts: list[str], num_requests: int) -> list[float]:
    """Milliseconds from writing one text to having read its vector, one after the other.

    Plain pyarrow: the Client has threads, whose switches are no part of the server's time.
    """
    batches = [pa.record_batch({"text": pa.array([text], pa.utf8())}) for text in texts]
    command = EmbedOptions(priority="interactive", dtype="float32").to_json()
    times = []
    with flight.connect(address) as client:
        descriptor = flight.FlightDescriptor.for_command(command)
        writer, reader = client.do_exchange(descriptor)
        writer.begin(batches[0].schema)
        total = WARM_UP_REQUESTS + num_requests
        for batch in itertools.islice(itertools.cycle(batches), total):
            started = time.perf_counter()
            writer.write_batch(batch)
            answer = reader.read_chunk().data
            times.append((time.perf_counter() - started) * 1000)
            if answer is None or answer.column("vector").null_count:
                raise JobError("the server answered without a vector")
        writer.done_writing()
        writer.close()
    return times[WARM_UP_REQUESTS:]


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
