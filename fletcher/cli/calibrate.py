"""`fletcher model calibrate`: ranges for int8 from a sample of texts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fletcher.cli.connection import LOCAL_FLAGS, local_config, open_client
from fletcher.cli.parser import add_options
from fletcher.cli.progress import Progress, Sample, Total
from fletcher.config.delivery import NO_STORE
from fletcher.core.command import EmbedCommand
from fletcher.core.quantization import Ranges
from fletcher.errors import ConfigError, ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.calibration import Calibration, Cut
from fletcher.models.bundle.registry import Registry
from fletcher.vectors.finish import finish

if TYPE_CHECKING:
    from fletcher.client import Client
    from fletcher.core.batches import FloatArray
    from fletcher.readers import TextSource

# Below this the least and the greatest value of a dimension say little of those to come.
MIN_TEXTS = 100
DEFAULT_LIMIT = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `calibrate`."""
    parser.add_argument("name", help="the model")
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="files of texts like those to be embedded"
    )
    parser.add_argument(
        "--text", default="text", metavar="COLUMN", help="column of texts (default: text)"
    )
    parser.add_argument("--format", metavar="NAME", help="of the files (default: by name)")
    parser.add_argument(
        "--limit",
        type=int,
        default=DEFAULT_LIMIT,
        metavar="N",
        help=f"texts to read at most (default: {DEFAULT_LIMIT}); more: fewer values will be "
        "clipped, coarser steps",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace ranges that are there: datasets that were written with them refuse new rows",
    )
    add_options(parser, LOCAL_FLAGS)
    parser.set_defaults(server=None)


def calibrate(args: argparse.Namespace) -> ModelBundle:
    """Embeds the sample and freezes its ranges in the bundle.

    Raises:
        ModelError: The model has ranges already.
        ConfigError: There are too few texts.
    """
    from fletcher.readers import open_source

    if "-" in args.paths:
        raise ConfigError("`PATH` is -, expected files: they may be read again", field="paths")
    if args.limit < MIN_TEXTS:
        raise ConfigError(
            f"`limit` is {args.limit}, expected at least {MIN_TEXTS} texts", field="limit"
        )
    config = local_config(args, model=args.name, store=NO_STORE)
    registry = Registry(config.home / "models")
    bundle = registry.get_model(args.name)
    if bundle.output != "dense":
        raise ModelError(
            f"model {args.name} gives {bundle.output} vectors, and ranges are for dense ones; int8 "
            "of others has a scale a vector",
            field="name",
        )
    if bundle.calibration.ranges and not args.replace:
        raise ModelError(
            f"model {args.name} has ranges from {bundle.calibration.num_texts:,} texts, which "
            "datasets may have been written with; --replace makes new ones",
            field="replace",
        )
    source = open_source(
        args.paths, text_column=args.text, format_name=args.format, limit=args.limit
    )
    with open_client(args, config) as client:
        calibration = _measured(client, source, bundle, args.limit)
    return registry.save_calibration(args.name, calibration)


def _measured(client: Client, source: TextSource, bundle: ModelBundle, limit: int) -> Calibration:
    num_texts = num_rows = 0
    bounds: dict[Cut, _Bounds] = {}
    progress = Progress(lambda: Sample(rows=num_rows), Total(rows=limit * len(bundle.layers)))
    with progress:
        for layers, vectors in _vectors(client, source, bundle):
            num_rows += len(vectors)
            num_texts += len(vectors) if layers == bundle.num_layers else 0
            for dims in bundle.dims:
                cut = Cut(layers=layers, dims=dims, normalized=bundle.normalize)
                bounds.setdefault(cut, _Bounds()).add(
                    finish(vectors, None, dims=dims, normalized=bundle.normalize)
                )
    if num_texts < MIN_TEXTS:
        raise ConfigError(
            f"`PATH` has {num_texts} texts with a vector, expected at least {MIN_TEXTS}",
            field="paths",
        )
    return Calibration(
        num_texts, {cut: Ranges.between(one.lowest, one.highest) for cut, one in bounds.items()}
    )


def _vectors(
    client: Client, source: TextSource, bundle: ModelBundle
) -> Iterator[tuple[int, FloatArray]]:
    """The texts' vectors after each exit layer, and which that is."""
    options = EmbedCommand(
        text_column=source.selection.text, dtype="float32", normalize=bundle.normalize
    )
    for layers in bundle.layers:
        wanted = dataclasses.replace(options, layers=layers or None)
        with client.exchange(source, wanted) as exchange:
            for batch in exchange:
                column = batch.column("vector")
                yield layers, column.flatten().to_numpy().reshape(-1, column.type.list_size)


class _Bounds:
    """The least and the greatest value of each dimension."""

    def __init__(self) -> None:
        self.lowest: Any = np.inf
        self.highest: Any = -np.inf

    def add(self, vectors: FloatArray) -> None:
        if len(vectors):
            self.lowest = np.minimum(self.lowest, vectors.min(axis=0))
            self.highest = np.maximum(self.highest, vectors.max(axis=0))
