"""Texts a second: Fletcher end to end beside its peers and the bare engines.

One run makes one table: the same texts on the same cores, in turns, one process after the other.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its own folder is on the path, not the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt

from benchmarks import contenders, report
from benchmarks.arguments import absolute, add_common, add_max_batch_tokens, positive
from benchmarks.contenders import Measure, Measurement, Skipped, Task
from benchmarks.engines import ENGINES, configure, title
from benchmarks.jobs import JobError
from benchmarks.setting import Setting
from fletcher.errors import ModelError
from fletcher.models.bundle.registry import DEFAULT_MODEL

QUICK_TEXTS = 200
FLETCHER = "Fletcher, DoPut to rows in LanceDB"
EXCHANGE = "Fletcher, DoExchange of float32 vectors"


@dataclass
class Row:
    """One contender and the results of its turns."""

    name: str
    measure: Measure | None = None
    seconds: list[float] = field(default_factory=list)
    last: Measurement | None = None
    skipped: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--texts", type=positive, default=4000, help="how many (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="which of the corpus's texts")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="turns of each row (default: 3)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_TEXTS} texts, one turn: to see that it works"
    )
    parser.add_argument("--batch-rows", type=positive, default=500, help="rows of a batch sent")
    add_max_batch_tokens(parser)
    parser.add_argument(
        "--only",
        type=_words,
        default=[""],
        metavar="WORDS",
        help="rows whose name contains one of these, between commas (default: all); shorter, but "
        "ratios and cosines are to the first of these",
    )
    parser.add_argument("--no-peers", action="store_true", help="without peers")
    parser.add_argument(
        "--peer-python",
        type=absolute,
        default=Path(sys.executable),
        help="the Python that has the peers, or some of them (default: this one)",
    )
    parser.add_argument("--checkpoint", type=absolute, help="the model's folder, for the peers")
    add_common(parser)


def _words(text: str) -> list[str]:
    return [word.strip().lower() for word in text.split(",") if word.strip()]


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    setting = Setting.of(args)
    num_texts = min(args.texts, QUICK_TEXTS) if args.quick else args.texts
    corpus, bundle = setting.corpus, setting.bundle
    texts = corpus.sample(num_texts, seed=args.seed)
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        task = Task.of(args, bundle, texts, Path(scratch), setting.machine["cores"])
        rows = _rows(task, args)
        for turn in range(1 if args.quick else args.repeats):
            for row in rows:
                _take_turn(row, turn, len(texts))
    for row in rows:
        if row.last is not None and "versions" in row.last.details:
            setting.versions.update(row.last.details["versions"])
    own = configure(bundle, "auto", "auto", args.max_batch_tokens)
    own_name = _engine_name(own.backend, own.precision)
    sample = {
        "corpus": corpus.name,
        "texts": len(texts),
        "tokens": task.num_tokens,
        "seed": args.seed,
    }
    result = {
        **setting.about("throughput"),
        "sample": sample,
        "model": bundle.qualified_name,
        **_results(rows, own_name, len(texts), task.num_tokens),
    }
    print(setting.heading())
    print(
        f"{bundle.qualified_name}, {len(texts):,} texts ({task.num_tokens:,} tokens) of "
        f"{corpus.name}; medians of {max(len(row.seconds) for row in rows)} turns\n"
    )
    print(_table(result))
    print("\n" + report.publish(args.out, result))
    return 0


def _rows(task: Task, args: argparse.Namespace) -> list[Row]:
    def wanted(name: str) -> bool:
        return any(word in name.lower() for word in args.only)

    rows = []
    # Downloaded only if a contender needs it, and once.
    checkpoints = functools.cache(lambda: _checkpoint(args))
    for one in contenders.PEERS:
        if not wanted(one.name):
            continue
        row = Row(one.name)
        checkpoint = None
        row.skipped = "--no-peers" if args.no_peers else _lacking(args.peer_python, one)
        if not row.skipped and one.checkpoint:
            checkpoint = checkpoints()
            if isinstance(checkpoint, Skipped):
                row.skipped = checkpoint.reason
        if not row.skipped:
            row.measure = contenders.peer(task, one, args.peer_python, checkpoint)
        rows.append(row)
    for backend, precision in ENGINES:
        name = _engine_name(backend, precision)
        rows.append(Row(name, contenders.engine(task, backend, precision)))
    rows += [
        Row(EXCHANGE, contenders.fletcher_exchange(task)),
        Row(FLETCHER, contenders.fletcher(task)),
    ]
    return [row for row in rows if wanted(row.name)]


def _lacking(python: Path, one: contenders.Peer) -> str:
    """The reason why a peer cannot run; empty if it can."""
    lacks = contenders.missing(python, one.needs)
    return f"{python} {lacks}; docs/lab-book.md says how to install it" if lacks else ""


def _checkpoint(args: argparse.Namespace) -> Path | Skipped:
    """The model for peers that read its checkpoint, or the reason why they cannot run."""
    if args.checkpoint is not None:
        return Path(args.checkpoint)
    if args.model != DEFAULT_MODEL:
        return Skipped(f"--checkpoint is not given, the folder of {args.model}")
    try:
        return contenders.checkpoint_folder(args.home)
    except ModelError as error:
        return Skipped(error.message)


def _take_turn(row: Row, turn: int, num_texts: int) -> None:
    if row.skipped or row.measure is None:
        return
    outcome = row.measure()
    if isinstance(outcome, Skipped):
        row.skipped = outcome.reason
        report.say(f"{row.name}: skipped, {outcome.reason}")
        return
    row.seconds.append(outcome.seconds)
    row.last = outcome
    report.say(f"turn {turn + 1}, {row.name}: {num_texts / outcome.seconds:,.0f} texts/s")


def _results(rows: list[Row], own_name: str, num_texts: int, num_tokens: int) -> dict[str, Any]:
    """Rates, ratios and cosines, compared with the first float32 row that ran."""
    reference = next((row for row in rows if row.last is not None), None)
    if reference is None or reference.last is None:
        reasons = "; ".join(f"{row.name}: {row.skipped}" for row in rows)
        raise JobError(f"nobody was measured: {reasons or '`--only` is in no name'}")
    medians = {row.name: statistics.median(row.seconds) for row in rows if row.seconds}
    entries = []
    for row in rows:
        entry: dict[str, Any] = {"name": row.name}
        if row.last is None:
            entry["skipped"] = row.skipped
        else:
            lowest, mean = cosines(row.last.embeddings, reference.last.embeddings)
            entry |= {
                "texts_per_s": num_texts / medians[row.name],
                "tokens_per_s": num_tokens / medians[row.name],
                "ratio_to_reference": medians[reference.name] / medians[row.name],
                "cosine_lowest": lowest,
                "cosine_mean": mean,
                "seconds": row.seconds,
                "note": row.last.note,
                "details": row.last.details,
            }
        entries.append(entry)
    both = own_name in medians and FLETCHER in medians
    ratio = medians[own_name] / medians[FLETCHER] if both else None
    return {
        "reference": reference.name,
        "own_engine": own_name,
        "ratio_to_own_engine": ratio,
        "rows": entries,
    }


def cosines(
    embeddings: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]
) -> tuple[float, float]:
    """Lowest and mean cosine between rows of two float32 [num_rows, dim]."""
    one, other = embeddings.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found = (one * other).sum(axis=1) / norms
    return float(found.min()), float(found.mean())


def _table(result: dict[str, Any]) -> str:
    header = ["", "texts/s", "from - to", "tokens/s", "ratio", "lowest cos", "mean cos", "note"]
    lines = []
    num_texts = result["sample"]["texts"]
    for entry in result["rows"]:
        if "skipped" in entry:
            lines.append([entry["name"], *["-"] * 6, "skipped"])
            continue
        slowest, fastest = num_texts / max(entry["seconds"]), num_texts / min(entry["seconds"])
        lines.append(
            [
                entry["name"],
                f"{entry['texts_per_s']:,.1f}",
                f"{slowest:,.1f} - {fastest:,.1f}",
                f"{entry['tokens_per_s']:,.0f}",
                f"{entry['ratio_to_reference']:.2f}",
                f"{entry['cosine_lowest']:.6f}",
                f"{entry['cosine_mean']:.6f}",
                entry["note"],
            ]
        )
    below = [f"ratio and cosine: to {result['reference']}"]
    if result["ratio_to_own_engine"] is not None:
        ratio = result["ratio_to_own_engine"]
        below.append(f"Fletcher to its own engine ({result['own_engine']}): {ratio:.3f}")
    below += [
        f"skipped: {entry['name']}: {entry['skipped']}"
        for entry in result["rows"]
        if "skipped" in entry
    ]
    return "\n".join([report.table(header, lines), "", *below])


def _engine_name(backend: str, precision: str) -> str:
    return f"bare {title(backend, precision)}, ready tokens"


if __name__ == "__main__":
    from benchmarks.__main__ import main

    sys.exit(main(["throughput", *sys.argv[1:]]))
