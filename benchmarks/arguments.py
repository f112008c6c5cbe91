"""Flags common to all benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.corpus import ROOT
from benchmarks.random_model import Shape
from fletcher.config.server import fletcher_home
from fletcher.models.bundle.registry import DEFAULT_MODEL


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the common flags."""
    parser.add_argument(
        "--corpus",
        type=absolute,
        help="Parquet file with `title` and `body` (default: ../shared/corpus/debian.parquet, "
        "where that is absent the shipped sample)",
    )
    parser.add_argument("--cores", type=positive, help="number of cores to use (default: all)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    parser.add_argument("--home", type=absolute, default=fletcher_home(), help="FLETCHER_HOME")
    parser.add_argument(
        "--out", type=absolute, default=ROOT / "results", help="folder for the JSON"
    )


def add_max_batch_tokens(parser: argparse.ArgumentParser) -> None:
    """Adds `--max-batch-tokens`."""
    parser.add_argument(
        "--max-batch-tokens",
        type=int,
        default=0,
        help="tokens in one run, of Fletcher and of bare engines (default: 0, the engine's best)",
    )


def add_random_model(parser: argparse.ArgumentParser, default: Shape, like: str) -> None:
    """Adds `--random-model`; `like` names a model with the default's shape."""
    parser.add_argument(
        "--random-model",
        type=Shape.parse,
        default=default,
        metavar="HIDDEN,LAYERS,HEADS,INTERMEDIATE",
        help="a model of random weights to measure "
        f"(default: {','.join(map(str, vars(default).values()))}, {like})",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def several(text: str) -> list[int]:
    """Whole numbers of at least 1, between commas; without repeats, ascending."""
    return sorted({positive(part) for part in text.split(",")})


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({most, *(1 << power for power in range(most.bit_length()))})


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def as_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags' values for a result's JSON."""
    return {name: _plain(value) for name, value in vars(args).items() if name != "run"}


def _plain(value: Any) -> Any:
    if isinstance(value, Shape):
        return vars(value)
    return str(value) if isinstance(value, Path) else value


def absolute(text: str) -> Path:
    """An absolute path. Links stay, because a virtual environment's Python is one."""
    return Path(text).expanduser().absolute()
