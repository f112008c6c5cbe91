"""Rows a second and memory of everything but the model: the null backend into LanceDB."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from benchmarks import hardware, report
from benchmarks.arguments import add_common, as_options, positive
from benchmarks.corpus import Corpus
from benchmarks.jobs import JobError
from benchmarks.serving import Served, serve
from fletcher import EmbedOptions, connect
from fletcher.client import Ack
from fletcher.models.registry import Registry

SAMPLE_INTERVAL_S = 0.25
MAX_LINES = 12
_DATASET = "bench"


@dataclass(frozen=True)
class Moment:
    """The server at one time.

    Attributes:
        seconds: Since the first write.
        rows: Stored so far, as acknowledged.
        front_bytes: Resident set of the front process.
        worker_bytes: Resident sets of its workers together.
    """

    seconds: float
    rows: int
    front_bytes: int
    worker_bytes: int


class _Progress:
    """What the upload has sent and what is stored of it; written by the client's threads."""

    def __init__(self) -> None:
        self.rows_stored = 0
        self.text_bytes = 0

    def count(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            self.text_bytes += batch.column("text").nbytes
            yield batch

    def on_ack(self, ack: Ack) -> None:
        self.rows_stored = ack.rows_stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--rows", type=positive, default=200_000, help="how many (default: 200000)")
    parser.add_argument("--batch-rows", type=positive, default=2000, help="rows of a batch sent")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    hardware.limit_cores(args.cores)
    machine, versions = hardware.facts(), hardware.versions()
    corpus = Corpus.load(args.corpus)
    bundle = Registry(args.home / "models").ensure(args.model, print)
    with serve(args.home, bundle.name, "--backend", "null", arguments=args.serve_args) as served:
        start = served.memory()["now"]
        moments, seconds, text_bytes = _upload(served, corpus, args.rows, args.batch_rows)
        end = served.memory()
        if (stored := served.count(_DATASET)) != args.rows:
            raise JobError(f"{stored} of {args.rows} rows are in the store")
    result: dict[str, Any] = {
        "benchmark": "overhead",
        "hardware": machine,
        "versions": versions,
        "options": as_options(args),
        "model": bundle.qualified_name,
        "corpus": corpus.name,
        "rows": args.rows,
        "text_bytes": text_bytes,
        "seconds": seconds,
        "rows_per_s": args.rows / seconds,
        "front_bytes": {"start": start, "peak": end["peak"], "end": end["now"]},
        "moments": [asdict(moment) for moment in moments],
    }
    print(report.heading(machine, versions))
    print(
        f"null backend, {args.rows:,} rows ({text_bytes / 2**20:,.0f} MiB of text) recombined "
        f"from {corpus.name}, DoPut to rows in LanceDB\n"
    )
    print(_table(moments))
    print(
        f"\n{args.rows / seconds:,.0f} rows/s, {text_bytes / 2**20 / seconds:,.1f} MiB/s of text"
        f"\nfront process: {_mib(start)} MiB at the start, {_mib(end['peak'])} at its peak, "
        f"{_mib(end['now'])} at the end"
    )
    print(report.publish(args.out, result))
    return 0


def _upload(
    served: Served, corpus: Corpus, num_rows: int, batch_rows: int
) -> tuple[list[Moment], float, int]:
    """Memory over time, seconds from the first write to rows readable, bytes of text sent."""
    progress = _Progress()
    batches = corpus.recombined(num_rows, batch_rows=batch_rows)
    first = next(batches)

    def rows() -> Iterator[pa.RecordBatch]:
        yield first
        yield from batches

    with connect(served.address) as client:
        started = time.perf_counter()
        with _sampled(served, progress, started) as moments:
            client.put(
                progress.count(rows()),
                EmbedOptions(dataset=_DATASET, durability="store"),
                on_ack=progress.on_ack,
            )
            served.count(_DATASET)
        seconds = time.perf_counter() - started
    return moments, seconds, progress.text_bytes


@contextmanager
def _sampled(served: Served, progress: _Progress, started: float) -> Iterator[list[Moment]]:
    """Looks at the server from a thread while the body runs."""
    moments: list[Moment] = []
    done = threading.Event()

    def look() -> None:
        memory = served.memory()
        seconds = time.perf_counter() - started
        moments.append(Moment(seconds, progress.rows_stored, memory["now"], memory["workers"]))

    def watch() -> None:
        while not done.wait(SAMPLE_INTERVAL_S):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    look()
    thread.start()
    try:
        yield moments
    finally:
        done.set()
        thread.join()
    look()


def _table(moments: list[Moment]) -> str:
    step = max(1, -(-len(moments) // MAX_LINES))
    # The last line stands for the time since the last regular one, not for a moment after it.
    shown = [*moments[: -1 - step // 2 : step], moments[-1]]
    lines = []
    before = shown[0]
    for moment in shown:
        elapsed = moment.seconds - before.seconds
        rate = (moment.rows - before.rows) / elapsed if elapsed else 0.0
        lines.append(
            [
                f"{moment.seconds:.1f}",
                f"{moment.rows:,}",
                f"{rate:,.0f}",
                _mib(moment.front_bytes),
                _mib(moment.worker_bytes),
            ]
        )
        before = moment
    header = ["seconds", "rows stored", "rows/s since", "front MiB", "workers MiB"]
    return report.table(header, lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}"
