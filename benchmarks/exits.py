"""Gain of leaving a model early: speed by exit layer, and memory with and without exits.

Random weights are as fast as trained ones. Each engine runs in a separate process, alone:
`python -m benchmarks.exits JOB`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.arguments import (
    add_common,
    add_random_model,
    positive,
    seconds,
    several,
)
from benchmarks.engines import ENGINES, configure, title
from benchmarks.jobs import run_job
from benchmarks.random_model import Shape, write_checkpoint
from benchmarks.setting import Setting
from fletcher.core.batches import MicroBatch
from fletcher.errors import BackendError
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry

_ROW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--exits", type=several, default=[3, 6, 9], help="default: 3,6,9")
    parser.add_argument("--repeats", type=positive, default=5, help="turns of each exit")
    parser.add_argument(
        "--seconds", type=seconds, default=1.0, help="of each turn of each exit (default: 1)"
    )
    add_random_model(parser, Shape(384, 12, 12, 1536), "as MiniLM-L12")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    setting = Setting.of(args)
    rows, skipped = [], {}
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "checkpoint", args.random_model, setting.bundle.tokenizer)
        registry = Registry(folder / "models")
        whole, exits = (
            registry.add_model(str(folder / "checkpoint"), name=name, exits=layers, progress=print)
            for name, layers in (("whole", []), ("exits", args.exits))
        )
        for backend, precision in ENGINES:
            try:
                rows += _engine(args, backend, precision, whole, exits, folder)
            except BackendError as error:
                skipped[title(backend, precision)] = error.message
    result = {
        **setting.about("exits"),
        "rows": rows,
        "skipped": skipped,
    }
    print(setting.heading())
    print(
        f"random weights, {args.random_model}; rows of {_ROW_TOKENS} tokens; medians of "
        f"{args.repeats} turns, times as fast as all layers of the same segments in the same turn\n"
    )
    print(_table(rows))
    print(report.publish(args.out, result))
    return 0


def _engine(
    args: argparse.Namespace,
    backend: str,
    precision: str,
    whole: ModelBundle,
    exits: ModelBundle,
    folder: Path,
) -> list[dict[str, Any]]:
    """Measures one row for the model without exits, and one for each exit of the other.

    Raises:
        BackendError: The engine cannot run here.
    """
    configs = [asdict(configure(one, backend, precision, 0)) for one in (whole, exits)]
    command = [sys.executable, "-m", "benchmarks.exits"]
    memory = [
        run_job(command, {"configs": [one], "layers": [[]], "turns": 0, "seconds": 0}, folder)
        for one in configs
    ]
    # Both in one process, so that the machine's changes of speed hit both.
    layers = [[0], [*exits.layers]]
    job = {"configs": configs, "layers": layers, "turns": args.repeats, "seconds": args.seconds}
    speed = run_job(command, job, folder)["tokens_per_s"]
    full = speed[f"1 {exits.num_layers}"]
    names = {"0 0": ("no exits", 0), **{f"1 {one}": (str(one), 1) for one in exits.layers}}
    return [
        {
            "name": f"{title(backend, precision)}, {label}",
            "tokens_per_s": statistics.median(speed[key]),
            "ratio": statistics.median(a / b for a, b in zip(speed[key], full, strict=True)),
            "rss_bytes": memory[place]["rss_bytes"],
            "weights_bytes": _weights(configs[place]["bundle"]),
            "turns": speed[key],
        }
        for key, (label, place) in names.items()
    ]


def _weights(bundle: str) -> int:
    return sum(path.stat().st_size for path in Path(bundle).glob("*.weights"))


def _table(rows: list[dict[str, Any]]) -> str:
    return report.table(
        ["layers", "tokens/s", "x all layers", "RSS MB", "weights MB"],
        [
            [
                row["name"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['rss_bytes'] / 1e6:,.0f}",
                f"{row['weights_bytes'] / 1e6:,.0f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Loads the models of a job, and measures every exit in turn."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    backends = [_load(BackendConfig(**one)) for one in job["configs"]]
    answer = {"rss_bytes": _rss(), "tokens_per_s": _speeds(backends, job)}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def _load(config: BackendConfig) -> Backend:
    loaded: Backend = importlib.import_module(f"fletcher.inference.{config.backend}").load(config)
    return loaded


def _speeds(backends: list[Backend], job: dict[str, Any]) -> dict[str, list[float]]:
    num_tokens = job["configs"][0]["max_batch_tokens"]
    lengths = np.full(num_tokens // _ROW_TOKENS, _ROW_TOKENS, np.int32)
    # Every tokenizer has at least this many tokens.
    ids = np.random.default_rng(1).integers(0, 100, lengths.sum(), dtype=np.int32)
    speeds: dict[str, list[float]] = {}
    for turn in range(job["turns"] + 1):
        for place, backend in enumerate(backends):
            for layers in job["layers"][place]:
                batch = MicroBatch(ids, lengths, layers)
                rate = len(ids) * _runs_per_s(backend, batch, job["seconds"])
                if turn:  # the first warms up
                    speeds.setdefault(f"{place} {layers}", []).append(rate)
    return speeds


def _runs_per_s(backend: Backend, batch: MicroBatch, duration_s: float) -> float:
    """Runs a second, from as many threads as the backend takes."""
    started = time.perf_counter()

    def work(_: int) -> int:
        num_runs = 0
        while time.perf_counter() - started < duration_s:
            backend.run(batch)
            num_runs += 1
        return num_runs

    with ThreadPoolExecutor(backend.concurrency) as pool:
        num_runs = sum(pool.map(work, range(backend.concurrency)))
    return num_runs / (time.perf_counter() - started)


def _rss() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if "VmRSS" in line)


if __name__ == "__main__":
    main()
