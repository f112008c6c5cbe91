"""Rows a second and memory of everything but the model: the null backend into LanceDB."""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import alone, hardware, report
from benchmarks.arguments import add_common, positive
from benchmarks.corpus import Corpus
from benchmarks.jobs import JobError
from benchmarks.serving import Served, serve
from benchmarks.setting import Setting
from fletcher import EmbedCommand, connect
from fletcher.client import Ack

SAMPLE_INTERVAL_S = 0.25
MAX_LINES = 12
# Texts of each turn for a tokenizer alone.
MAX_BARE_ROWS = 40_000
_DATASET = "bench"


@dataclass(frozen=True)
class Moment:
    """Rows and memory of the server at one time.

    Attributes:
        seconds: Time since the first write.
        rows: Rows stored so far, as acknowledged.
        front_bytes: Resident set of the front process.
        worker_bytes: Resident sets of its workers together.
    """

    seconds: float
    rows: int
    front_bytes: int
    worker_bytes: int


@dataclass(frozen=True)
class UploadRun:
    """One upload.

    Attributes:
        seconds: From the first write to rows readable.
        text_bytes: Bytes of text sent.
        cpu_seconds: For `client` (which also makes the texts), `front` and `workers`.
        front_bytes: Resident set of the front process: `start`, `peak`, `end`.
        moments: Samples during the upload.
    """

    seconds: float
    text_bytes: int
    cpu_seconds: dict[str, float]
    front_bytes: dict[str, int]
    moments: list[Moment]


class _Progress:
    """Bytes sent and rows stored of the upload; written by the client's threads."""

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
    """Adds the flags of this benchmark."""
    parser.add_argument("--rows", type=positive, default=200_000, help="how many (default: 200000)")
    parser.add_argument("--batch-rows", type=positive, default=2000, help="rows of a batch sent")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each row")
    parser.add_argument(
        "--without-tokenizer", action="store_true", help="only the row without model and tokenizer"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON."""
    setting = Setting.of(args)
    corpus, bundle = setting.corpus, setting.bundle
    cores = setting.machine["cores"]
    bare_rows = min(args.rows, MAX_BARE_ROWS)
    null = partial(_serve, args, corpus, bundle.name, "--tokenizer", "null")
    served = {"no model, no tokenizer": null}
    bare = {}
    if not args.without_tokenizer:
        texts = list(corpus.recombined(bare_rows, batch_rows=args.batch_rows))
        load = alone.Load.of(bundle, texts, np.zeros(0, np.int64))
        served["no model"] = partial(_serve, args, corpus, bundle.name)
        bare = {
            f"tokenizers library alone, {cores} processes": partial(alone.library, load, cores),
            f"Fletcher's tokenizer alone, {cores} processes": partial(
                alone.tokenize, load, cores, transfer=False
            ),
        }
    turns: dict[str, list[UploadRun]] = {name: [] for name in served}
    bare_rates: dict[str, list[float]] = {name: [] for name in bare}
    for _ in range(args.repeats):
        _take_turns(served, turns, lambda turn: args.rows / turn.seconds)
        _take_turns(
            {name: partial(_bare_rate, measure, bare_rows) for name, measure in bare.items()},
            bare_rates,
            lambda rate: rate,
        )
    rows = [_row(name, args.rows, turns[name]) for name in turns]
    rows += [
        {"name": name, "rows_per_s": statistics.median(rates), "turns": rates}
        for name, rates in bare_rates.items()
    ]
    result: dict[str, Any] = {
        **setting.about("overhead"),
        "model": bundle.qualified_name,
        "corpus": corpus.name,
        "num_rows": args.rows,
        "text_bytes": turns["no model, no tokenizer"][0].text_bytes,
        "rows": rows,
        "uploads": [
            {"name": name, "moments": [asdict(moment) for moment in ones[0].moments]}
            for name, ones in turns.items()
        ],
    }
    print(setting.heading())
    print(
        f"null backend, {args.rows:,} rows ({result['text_bytes'] / 2**20:,.0f} MiB of text) "
        f"recombined from {corpus.name}, DoPut to rows in LanceDB; "
        f"medians of {args.repeats} turns\n"
    )
    print(_table(rows) + "\n")
    for name, ones in turns.items():
        print(_over_time(name, ones[0]) + "\n")
    print(report.publish(args.out, result))
    return 0


def _take_turns(
    measures: dict[str, Callable[[], Any]], done: dict[str, list[Any]], rate: Callable[[Any], float]
) -> None:
    for name, measure in measures.items():
        done[name].append(measure())
        print(f"{name}: {rate(done[name][-1]):,.0f} rows/s", file=sys.stderr)


def _bare_rate(measure: Callable[[], alone.Timing], num_rows: int) -> float:
    return num_rows / measure().seconds


def _serve(args: argparse.Namespace, corpus: Corpus, model: str, *options: str) -> UploadRun:
    """Measures one upload to a new server."""
    arguments = ("--backend", "null", *options)
    with serve(args.home, model, *arguments, arguments=args.serve_args) as served:
        start = served.memory()["now"]
        batches = corpus.recombined(args.rows, batch_rows=args.batch_rows)
        batches = chain([next(batches)], batches)  # the first takes longer
        before = _cpu_seconds(served)
        moments, seconds, text_bytes = _upload(served, batches)
        spent = {who: cpu - before[who] for who, cpu in _cpu_seconds(served).items()}
        end = served.memory()
        if (stored := served.count(_DATASET)) != args.rows:
            raise JobError(f"{stored} of {args.rows} rows are in the store")
    front_bytes = {"start": start, "peak": end["peak"], "end": end["now"]}
    return UploadRun(seconds, text_bytes, spent, front_bytes, moments)


def _cpu_seconds(served: Served) -> dict[str, float]:
    front = hardware.cpu_seconds([served.pid])
    workers = served.cpu_seconds() - front
    return {"client": time.process_time(), "front": front, "workers": workers}


def _upload(served: Served, batches: Iterator[pa.RecordBatch]) -> tuple[list[Moment], float, int]:
    """Memory over time, seconds from the first write to rows readable, bytes of text sent."""
    progress = _Progress()
    with connect(served.address) as client:
        started = time.perf_counter()
        with _sampled(served, progress, started) as moments:
            client.put(
                progress.count(batches),
                EmbedCommand(dataset=_DATASET, durability="store"),
                on_ack=progress.on_ack,
            )
            served.count(_DATASET)
        seconds = time.perf_counter() - started
    return moments, seconds, progress.text_bytes


@contextmanager
def _sampled(served: Served, progress: _Progress, started: float) -> Iterator[list[Moment]]:
    """Samples the server from a thread while the body runs."""
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


def _row(name: str, num_rows: int, turns: list[UploadRun]) -> dict[str, Any]:
    """Table row of the medians of an upload's turns."""
    cpu = {
        who: statistics.median(1e6 * turn.cpu_seconds[who] / num_rows for turn in turns)
        for who in turns[0].cpu_seconds
    }
    return {
        "name": name,
        "rows_per_s": num_rows / statistics.median(turn.seconds for turn in turns),
        "cpu_us_per_row": cpu,
        "front_bytes": [turn.front_bytes for turn in turns],
        "turns": [num_rows / turn.seconds for turn in turns],
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        rate = row["rows_per_s"]
        # The last two are tokenizers alone; the first has no tokenizer.
        with_tokenizer = row is not rows[0]
        of_bare = [f"{rate / one['rows_per_s']:.2f}" for one in rows[-2:]]
        cpu = [f"{one:.1f}" for one in row.get("cpu_us_per_row", {}).values()]
        lines.append(
            [
                row["name"],
                f"{rate:,.0f}",
                f"{min(row['turns']):,.0f} - {max(row['turns']):,.0f}",
                *(of_bare if with_tokenizer else ["", ""]),
                *(cpu or ["", "", ""]),
            ]
        )
    header = ["", "rows/s", "slowest - fastest", "of the library", "of our tokenizer"]
    cpu_header = ["client", "front", "workers: CPU us a row"]
    return report.table([*header, *cpu_header], lines)


def _over_time(name: str, turn: UploadRun) -> str:
    """Table of memory during an upload."""
    moments = turn.moments
    step = max(1, -(-len(moments) // MAX_LINES))
    # The last line covers the time since the last regular one.
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
    header = [f"{name}: seconds", "rows stored", "rows/s since", "front MiB", "workers MiB"]
    front = turn.front_bytes
    return (
        f"{report.table(header, lines)}\n"
        f"front process: {_mib(front['start'])} MiB at the start, {_mib(front['peak'])} at its "
        f"peak, {_mib(front['end'])} at the end"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}"
