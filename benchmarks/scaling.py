"""Rows a second over tokenizer processes, replicas and the tokens of a micro-batch."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contenders, report
from benchmarks.arguments import add_common, doublings, positive, several
from benchmarks.bare import planned
from benchmarks.contenders import Task
from benchmarks.engines import configure
from benchmarks.jobs import JobError
from benchmarks.pools import through_pool
from benchmarks.setting import Setting
from fletcher.inference.backend import BackendConfig
from fletcher.workers.messages import WorkerSpec

BUDGETS = (256, 512, 1024, 2048, 4096)


@dataclass
class Point:
    """One value of a varied quantity.

    Attributes:
        value: The value.
        measure: Returns seconds for all texts.
        seconds: Seconds of each turn.
    """

    value: int
    measure: Callable[[], float]
    seconds: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--texts", type=positive, default=4000, help="how many (default: 4000)")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of every value")
    parser.add_argument("--batch-rows", type=positive, default=500, help="rows of a batch sent")
    parser.add_argument(
        "--backend",
        choices=("auto", "null"),
        default="auto",
        help="null leaves the model out, so that tokenizers are the limit (default: auto)",
    )
    parser.add_argument(
        "--tokenizer-workers", type=several, help="such as 1,2,4 (default: up to the cores)"
    )
    parser.add_argument("--replicas", type=several, help="such as 1,2 (default: up to the cores)")
    parser.add_argument(
        "--budgets",
        type=several,
        default=list(BUDGETS),
        help=f"of --max-batch-tokens (default: {','.join(map(str, BUDGETS))})",
    )
    add_common(parser)
    parser.set_defaults(max_batch_tokens=0)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON."""
    setting = Setting.of(args)
    corpus, bundle = setting.corpus, setting.bundle
    texts = corpus.sample(args.texts)
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        task = Task.of(args, bundle, texts, Path(scratch), setting.machine["cores"])
        task = replace(task, serve_args=["--backend", args.backend, *args.serve_args])
        curves = _curves(task, args)
        for turn in range(args.repeats):
            for name, points in curves.items():
                for point in points:
                    point.seconds.append(point.measure())
                    rate = len(texts) / point.seconds[-1]
                    line = f"turn {turn + 1}, {name}, {point.value}: {rate:,.0f} rows/s"
                    print(line, file=sys.stderr)
    result = {
        **setting.about("scaling"),
        "model": bundle.qualified_name,
        "sample": {"corpus": corpus.name, "texts": len(texts), "tokens": task.num_tokens},
        "curves": [
            {"name": name, "points": [_point(point, len(texts)) for point in points]}
            for name, points in curves.items()
        ],
    }
    print(setting.heading())
    print(
        f"{bundle.qualified_name}, {args.backend} backend, {len(texts):,} texts "
        f"({task.num_tokens:,} tokens) of {corpus.name}; medians of {args.repeats} turns\n"
    )
    for curve in result["curves"]:
        print(_table(curve) + "\n")
    print(report.publish(args.out, result))
    return 0


def _curves(task: Task, args: argparse.Namespace) -> dict[str, list[Point]]:
    cores = task.cores
    config = configure(task.bundle, args.backend, "auto", 0)
    return {
        "tokenizer processes, end to end": [
            Point(value, partial(_serve, _with(task, "--tokenizer-workers", value)))
            for value in args.tokenizer_workers or doublings(cores)
        ],
        "replicas sharing the cores, ready tokens": [
            Point(value, partial(_replicas, task, config, value))
            for value in args.replicas or doublings(cores)
        ],
        "max_batch_tokens, end to end": [
            Point(value, partial(_serve, replace(task, max_batch_tokens=value)))
            for value in args.budgets
        ],
    }


def _with(task: Task, flag: str, value: int) -> Task:
    return replace(task, serve_args=[flag, str(value), *task.serve_args])


def _serve(task: Task) -> float:
    outcome = contenders.fletcher(task)()
    if isinstance(outcome, contenders.Skipped):
        raise JobError(outcome.reason)
    return outcome.seconds


def _replicas(task: Task, config: BackendConfig, num_replicas: int) -> float:
    """Seconds for all micro-batches, by a number of processes that share the cores."""
    tokens = np.load(task.tokens_path)
    _, batches = planned(
        tokens["input_ids"],
        tokens["offsets"],
        max_batch_tokens=config.max_batch_tokens,
        num_runners=task.cores,
    )
    threads = [len(share) for share in np.array_split(np.arange(task.cores), num_replicas)]
    specs = [
        # More replicas than cores: one core each, and they compete.
        WorkerSpec(
            f"cpu-{n}",
            f"fletcher.inference.{config.backend}:load",
            replace(config, threads=max(1, share)),
        )
        for n, share in enumerate(threads)
    ]
    return through_pool(specs, batches).seconds


def _point(point: Point, num_rows: int) -> dict[str, Any]:
    median = statistics.median(point.seconds)
    return {"value": point.value, "rows_per_s": num_rows / median, "seconds": point.seconds}


def _table(curve: dict[str, Any]) -> str:
    points = curve["points"]
    first = points[0]["rows_per_s"]
    lines = []
    for point in points:
        num_rows = point["rows_per_s"] * statistics.median(point["seconds"])
        slowest, fastest = num_rows / max(point["seconds"]), num_rows / min(point["seconds"])
        lines.append(
            [
                f"{point['value']:,}",
                f"{point['rows_per_s']:,.0f}",
                f"{slowest:,.0f} - {fastest:,.0f}",
                f"{point['rows_per_s'] / first:.2f}",
            ]
        )
    return report.table([curve["name"], "rows/s", "slowest - fastest", "to the first"], lines)
