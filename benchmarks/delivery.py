"""Rows a second by durability and store: the cost of each promise."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.arguments import add_common, positive
from benchmarks.corpus import Corpus
from benchmarks.jobs import JobError
from benchmarks.serving import Served, serve
from benchmarks.setting import Setting
from fletcher import EmbedCommand, connect

_DATASET = "bench"
_STORED_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Arrangement:
    """One durability with one store.

    Attributes:
        name: Name in the table.
        durability: Durability of the upload.
        store_process: The store runs in a separate process, reached over Flight.
    """

    name: str
    durability: str
    store_process: bool = False


ARRANGEMENTS = (
    Arrangement("memory, LanceDB in process", "memory"),
    Arrangement("store, LanceDB in process", "store"),
    Arrangement("journal, LanceDB in process", "journal"),
    Arrangement("journal, fletcher store over Flight", "journal", store_process=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--rows", type=positive, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--batch-rows", type=positive, default=2000, help="rows of a batch sent")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each row")
    parser.add_argument(
        "--backend",
        choices=("null", "auto"),
        default="null",
        help="null leaves the model out, which makes the store's share largest (default: null)",
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    setting = Setting.of(args)
    corpus, bundle = setting.corpus, setting.bundle
    seconds: dict[str, list[float]] = {arrangement.name: [] for arrangement in ARRANGEMENTS}
    peaks: dict[str, int] = dict.fromkeys(seconds, 0)
    for turn in range(args.repeats):
        for arrangement in ARRANGEMENTS:
            with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
                home = Path(scratch)
                (home / "models").symlink_to(args.home / "models")
                with serve(
                    home,
                    bundle.name,
                    "--backend",
                    args.backend,
                    arguments=args.serve_args,
                    store_process=arrangement.store_process,
                ) as served:
                    took = _upload(served, corpus, arrangement, args.rows, args.batch_rows)
                    peaks[arrangement.name] = max(peaks[arrangement.name], served.memory()["peak"])
            seconds[arrangement.name].append(took)
            print(f"turn {turn + 1}, {arrangement.name}: {args.rows / took:,.0f} rows/s")
    rows = [
        {
            "name": name,
            "rows_per_s": args.rows / statistics.median(some),
            "seconds": some,
            "front_peak_bytes": peaks[name],
        }
        for name, some in seconds.items()
    ]
    result = {
        **setting.about("delivery"),
        "model": bundle.qualified_name,
        "corpus": corpus.name,
        "rows": rows,
    }
    print(setting.heading())
    print(
        f"{args.backend} backend, {args.rows:,} rows recombined from {corpus.name}, from the first "
        f"write until the store's folder has every row; medians of {args.repeats} turns\n"
    )
    print(_table(rows))
    print(report.publish(args.out, result))
    return 0


def _upload(
    served: Served, corpus: Corpus, arrangement: Arrangement, num_rows: int, batch_rows: int
) -> float:
    """Seconds from the first write until all rows are in the store."""
    batches = list(corpus.recombined(num_rows, batch_rows=batch_rows))
    with connect(served.address) as client:
        started = time.perf_counter()
        client.put(iter(batches), EmbedCommand(dataset=_DATASET, durability=arrangement.durability))
        while (stored := served.count(_DATASET)) < num_rows:
            if time.perf_counter() - started > _STORED_TIMEOUT_S:
                raise JobError(f"{arrangement.name}: {stored} of {num_rows} rows are in the store")
            time.sleep(0.05)
        took = time.perf_counter() - started
    if stored != num_rows:
        raise JobError(f"{arrangement.name}: {stored} rows are in the store, {num_rows} were sent")
    return took


def _table(rows: list[dict[str, Any]]) -> str:
    header = ["", "rows/s", "slowest - fastest", "ratio", "front peak MiB"]
    base = rows[0]["rows_per_s"]
    lines = []
    for row in rows:
        num_rows = row["rows_per_s"] * statistics.median(row["seconds"])
        slowest, fastest = num_rows / max(row["seconds"]), num_rows / min(row["seconds"])
        lines.append(
            [
                row["name"],
                f"{row['rows_per_s']:,.0f}",
                f"{slowest:,.0f} - {fastest:,.0f}",
                f"{row['rows_per_s'] / base:.2f}",
                f"{row['front_peak_bytes'] / 2**20:,.0f}",
            ]
        )
    return report.table(header, lines)
