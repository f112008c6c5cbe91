"""Engines compared with plain matrix products of the model's own shapes."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import report
from benchmarks.arguments import add_common, add_max_batch_tokens, positive, seconds
from benchmarks.engines import ENGINES, configure, run_bare, save_tokens, title
from benchmarks.flops import Architecture
from benchmarks.jobs import JobError, run_job
from benchmarks.setting import Setting
from fletcher.errors import BackendError
from fletcher.inference.backend import BackendConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--texts", type=positive, default=4000, help="how many (default: 4000)")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each row")
    parser.add_argument(
        "--seconds", type=seconds, default=3.0, help="of each shape of product (default: 3)"
    )
    add_max_batch_tokens(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    setting = Setting.of(args)
    corpus, bundle = setting.corpus, setting.bundle
    architecture = Architecture.of(bundle)
    texts = corpus.sample(args.texts)
    skipped: dict[str, str] = {}
    turns: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        folder = Path(scratch)
        num_tokens = save_tokens(bundle, texts, folder / "tokens.npz")
        lengths = np.diff(np.load(folder / "tokens.npz")["offsets"])
        for turn in range(args.repeats):
            for backend, precision in ENGINES:
                name = title(backend, precision)
                try:
                    config = configure(bundle, backend, precision, args.max_batch_tokens)
                    found = _take_turn(config, architecture, lengths, args.seconds, folder)
                except BackendError as error:
                    skipped[name] = error.message
                    continue
                turns.setdefault(name, []).append(found)
                print(f"turn {turn + 1}, {name}: {found['useful'] / 1e12:.3f} TFLOP/s")
    if not turns:
        raise JobError(f"no engine runs here: {skipped}")
    rows = [_median(name, some) for name, some in turns.items()]
    result = {
        **setting.about("roofline"),
        "model": bundle.qualified_name,
        "architecture": asdict(architecture),
        "sample": {"corpus": corpus.name, "texts": len(texts), "tokens": num_tokens},
        "rows": rows,
        "skipped": skipped,
    }
    print(setting.heading())
    print(
        f"{bundle.qualified_name}, {len(texts):,} texts ({num_tokens:,} tokens) of {corpus.name}; "
        f"medians of {args.repeats} turns\n"
    )
    print(_table(rows))
    print(report.publish(args.out, result))
    return 0


def _take_turn(
    config: BackendConfig,
    architecture: Architecture,
    lengths: npt.NDArray[np.int64],
    product_seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """Operations a second of the model, then of plain products of as many rows, in one turn.

    Raises:
        BackendError: The engine cannot run here.
    """
    job = {"tokens": str(folder / "tokens.npz"), "embeddings": str(folder / "embeddings.npy")}
    model = run_bare(config, job, folder)
    if "skipped" in model:
        raise BackendError(model["skipped"])
    padded = np.array([length for rows, length in model["shapes"] for _ in range(rows)])
    num_rows = int(np.median([rows * length for rows, length in model["shapes"]]))
    shapes = architecture.shapes()
    # A chain goes there and back: the last two shapes are each other's return.
    chains = shapes[:-1]
    products = run_job(
        [sys.executable, "-m", "benchmarks.gemm"],
        {
            "config": asdict(config),
            "rows": num_rows,
            "shapes": chains,
            "depth": architecture.num_layers,
            "seconds": product_seconds,
        },
        folder,
    )
    rates = products["flops_per_s"]
    # Each shape with its share of a layer's operations; the last chain counts for two shapes.
    parts = [inner * outer for inner, outer in shapes]
    times = [part / rate for part, rate in zip(parts, [*rates, rates[-1]], strict=True)]
    return {
        "useful": architecture.forward(lengths) / model["seconds"],
        "padded": architecture.forward(padded) / model["seconds"],
        "gemm": sum(parts) / sum(times),
        "gemm_rows": num_rows,
        "gemm_by_shape": {
            f"{inner} x {outer}": rate for (inner, outer), rate in zip(chains, rates, strict=True)
        },
        "seconds": model["seconds"],
    }


def _median(name: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table; ratios are per turn, because both sides ran in the same minute."""
    return {
        "name": name,
        **{
            f"{field}_flops_per_s": statistics.median(turn[field] for turn in turns)
            for field in ("useful", "padded", "gemm")
        },
        "ratio": statistics.median(turn["useful"] / turn["gemm"] for turn in turns),
        "turns": turns,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    header = ["TFLOP/s", "useful", "with padding", "plain products", "useful to plain"]
    lines = [
        [
            row["name"],
            *(
                f"{row[f'{field}_flops_per_s'] / 1e12:.3f}"
                for field in ("useful", "padded", "gemm")
            ),
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    below = [""]
    for row in rows:
        last = row["turns"][-1]
        shapes = ", ".join(
            f"{shape} {rate / 1e12:.3f}" for shape, rate in last["gemm_by_shape"].items()
        )
        below.append(f"{row['name']}, products of {last['gemm_rows']:,} rows: {shapes}")
    return "\n".join([report.table(header, lines), *below])
