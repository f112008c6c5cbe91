"""Each stage of the server alone on the same texts, and all of them together."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import alone, contenders, report
from benchmarks.alone import Load
from benchmarks.arguments import add_common, add_max_batch_tokens, doublings, positive
from benchmarks.bare import Timing
from benchmarks.contenders import Task
from benchmarks.corpus import numbered
from benchmarks.engines import configure, run_bare, title
from benchmarks.jobs import JobError
from benchmarks.setting import Setting
from fletcher.inference.backend import BackendConfig

TOGETHER = "end to end, DoPut to rows in LanceDB"


@dataclass
class Stage:
    """One stage and its turns.

    Attributes:
        name: Name in the table.
        measure: Measures one turn.
        in_sum: All rows pass this stage in a server with default options.
        turns: Measurements.
    """

    name: str
    measure: Callable[[], Timing]
    in_sum: bool = False
    turns: list[Timing] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--texts", type=positive, default=4000, help="how many (default: 4000)")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of every stage")
    parser.add_argument("--batch-rows", type=positive, default=500, help="rows of a batch sent")
    add_max_batch_tokens(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    setting = Setting.of(args)
    corpus, bundle = setting.corpus, setting.bundle
    config = configure(bundle, "auto", "auto", args.max_batch_tokens)
    texts = corpus.sample(args.texts)
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        task = Task.of(args, bundle, texts, Path(scratch), setting.machine["cores"])
        lengths = np.diff(np.load(task.tokens_path)["offsets"])
        load = Load.of(bundle, numbered(texts, batch_rows=args.batch_rows), lengths)
        stages = _stages(load, task, config)
        for turn in range(args.repeats):
            for stage in stages:
                timing = stage.measure()
                stage.turns.append(timing)
                rate = len(texts) / timing.seconds
                print(f"turn {turn + 1}, {stage.name}: {rate:,.0f} rows/s", file=sys.stderr)
    rows = [_row(stage, len(texts), task.num_tokens) for stage in stages]
    result = {
        **setting.about("stages"),
        "model": bundle.qualified_name,
        "engine": title(config.backend, config.precision),
        "sample": {"corpus": corpus.name, "texts": len(texts), "tokens": task.num_tokens},
        "rows": rows,
        "sum": _sum(rows, setting.machine["cores"]),
    }
    print(setting.heading())
    print(
        f"{bundle.qualified_name}, {len(texts):,} texts ({task.num_tokens:,} tokens) of "
        f"{corpus.name}; medians of {args.repeats} turns\n"
    )
    print(_table(result))
    print(report.publish(args.out, result))
    return 0


def _stages(load: Load, task: Task, config: BackendConfig) -> list[Stage]:
    stages = [Stage("Flight and intake", partial(alone.receive, load), in_sum=True)]
    for num_workers in doublings(task.cores):
        for transfer in (False, True):
            how = "with" if transfer else "without"
            stages.append(
                Stage(
                    f"tokenization, {num_workers} processes, {how} transfer",
                    partial(alone.tokenize, load, num_workers, transfer=transfer),
                    in_sum=transfer and num_workers == 1,
                )
            )
    planning = partial(alone.plan_windows, load, config.max_batch_tokens, config.threads)
    stages.append(Stage("planning", planning, in_sum=True))
    engine = f"inference, {title(config.backend, config.precision)}, ready tokens"
    stages.append(Stage(engine, partial(_infer, config, task), in_sum=True))
    stages.append(
        Stage("assembly and delivery into LanceDB", partial(alone.deliver, load), in_sum=True)
    )
    together = contenders.fletcher(task)
    return [*stages, Stage(TOGETHER, lambda: _together(together))]


def _infer(config: BackendConfig, task: Task) -> Timing:
    job = {
        "tokens": str(task.tokens_path),
        "embeddings": str(task.folder / "embeddings.npy"),
    }
    answer = run_bare(config, job, task.folder)
    if "skipped" in answer:
        raise JobError(answer["skipped"])
    return Timing(answer["seconds"], answer["cpu_seconds"])


def _together(measure: contenders.Measure) -> Timing:
    outcome = measure()
    if isinstance(outcome, contenders.Skipped):
        raise JobError(outcome.reason)
    return Timing(outcome.seconds, outcome.details["cpu_seconds"])


def _row(stage: Stage, num_rows: int, num_tokens: int) -> dict[str, Any]:
    seconds = statistics.median(turn.seconds for turn in stage.turns)
    cpu = statistics.median(turn.cpu_seconds for turn in stage.turns)
    return {
        "name": stage.name,
        "in_sum": stage.in_sum,
        "rows_per_s": num_rows / seconds,
        "tokens_per_s": num_tokens / seconds,
        "cpu_ms_per_row": 1000 * cpu / num_rows,
        "turns": [asdict(turn) for turn in stage.turns],
    }


def _sum(rows: list[dict[str, Any]], cores: int) -> dict[str, float]:
    """Sum of the stages' costs, and the rate that the cores could reach at that cost."""
    cpu = sum(row["cpu_ms_per_row"] for row in rows if row["in_sum"])
    together = rows[-1]
    return {
        "cpu_ms_per_row": cpu,
        "rows_per_s": cores * 1000 / cpu,
        "share_of_cpu": cpu / together["cpu_ms_per_row"],
        "cores_busy": together["cpu_ms_per_row"] * together["rows_per_s"] / 1000,
    }


def _table(result: dict[str, Any]) -> str:
    header = ["", "rows/s", "tokens/s", "CPU ms a row", "of end to end"]
    *rows, together = result["rows"]
    whole, total = together["cpu_ms_per_row"], result["sum"]

    def line(row: dict[str, Any]) -> list[str]:
        counts = row["in_sum"] or row is together
        return [
            row["name"],
            f"{row['rows_per_s']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['cpu_ms_per_row']:.3f}",
            f"{100 * row['cpu_ms_per_row'] / whole:.0f}%" if counts else "",
        ]

    summed = [
        "sum of those with a share, on all cores",
        f"{total['rows_per_s']:,.0f}",
        "",
        f"{total['cpu_ms_per_row']:.3f}",
        f"{100 * total['share_of_cpu']:.0f}%",
    ]
    below = (
        f"end to end kept {total['cores_busy']:.2f} of {result['hardware']['cores']} cores busy, "
        "the client's part among that"
    )
    lines = [*map(line, rows), summed, line(together)]
    return report.table(header, lines) + "\n\n" + below
