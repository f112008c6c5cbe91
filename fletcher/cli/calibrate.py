"""Work of `fletcher model calibrate`: find int8 ranges in a sample of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fletcher.cli.connection import EmbedTarget
from fletcher.cli.options import ConfigFlags
from fletcher.cli.progress import Progress, Sample, Total
from fletcher.config.delivery import NO_STORE
from fletcher.core.command import EmbedCommand
from fletcher.core.quantization import Ranges
from fletcher.errors import ConfigError, ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.calibration import Calibration, Cut
from fletcher.models.bundle.registry import Registry
from fletcher.vectors.pooling import finish

if TYPE_CHECKING:
    from fletcher.client import Client
    from fletcher.core.batches import FloatArray
    from fletcher.readers import TextSource

# The range of a dimension over fewer texts would not be typical of later texts.
MIN_TEXTS = 100


def calibrate_model(
    flags: ConfigFlags,
    name: str,
    paths: Sequence[str],
    *,
    text_column: str,
    format_name: str | None,
    limit: int,
    replace: bool,
) -> ModelBundle:
    """Embed a sample of texts and store the ranges of the vectors in the bundle.

    Raises ModelError if the model's vectors are not dense, or if it has ranges already and
    `replace` is False. Raises ConfigError for standard input or fewer than MIN_TEXTS texts.
    """
    from fletcher.readers import open_source

    if "-" in paths:
        raise ConfigError("`PATH` is -, expected files, to read them several times", field="paths")
    if limit < MIN_TEXTS:
        raise ConfigError(f"`limit` is {limit}, expected at least {MIN_TEXTS} texts", field="limit")
    target = EmbedTarget(server=None, compression="none", flags=flags)
    config = target.resolve(model=name, store=NO_STORE)
    registry = Registry(config.home / "models")
    bundle = registry.get_model(name)
    if bundle.output != "dense":
        raise ModelError(
            f"model {name} gives {bundle.output} vectors, but ranges are for dense ones; int8 of "
            "others has a scale a vector",
            field="name",
        )
    if bundle.calibration.ranges and not replace:
        raise ModelError(
            f"model {name} has ranges from {bundle.calibration.num_texts:,} texts already, which "
            "datasets may use; --replace makes new ones",
            field="replace",
        )
    source = open_source(paths, text_column=text_column, format_name=format_name, limit=limit)
    with target.open_client(config) as client:
        calibration = _measured(client, source, bundle, limit)
    return registry.save_calibration(name, calibration)


def _measured(client: Client, source: TextSource, bundle: ModelBundle, limit: int) -> Calibration:
    num_texts = num_rows = 0
    # Least and greatest value of each dimension, by layers and number of dimensions.
    bounds: dict[Cut, tuple[Any, Any]] = {}
    progress = Progress(lambda: Sample(rows=num_rows), Total(rows=limit * len(bundle.layers)))
    with progress:
        for layers, vectors in _vectors(client, source, bundle):
            num_rows += len(vectors)
            num_texts += len(vectors) if layers == bundle.num_layers else 0
            for dims in bundle.dims:
                cut = Cut(layers=layers, dims=dims, normalized=bundle.normalize)
                lowest, highest = bounds.get(cut, (np.inf, -np.inf))
                finished = finish(vectors, None, dims=dims, normalized=bundle.normalize)
                bounds[cut] = (
                    np.minimum(lowest, finished.min(axis=0, initial=np.inf)),
                    np.maximum(highest, finished.max(axis=0, initial=-np.inf)),
                )
    if num_texts < MIN_TEXTS:
        raise ConfigError(
            f"`PATH` has {num_texts} texts with a vector, expected at least {MIN_TEXTS}",
            field="paths",
        )
    return Calibration(num_texts, {cut: Ranges.between(*both) for cut, both in bounds.items()})


def _vectors(
    client: Client, source: TextSource, bundle: ModelBundle
) -> Iterator[tuple[int, FloatArray]]:
    options = EmbedCommand(
        text_column=source.selection.text_column, dtype="float32", normalize=bundle.normalize
    )
    for layers in bundle.layers:
        wanted = dataclasses.replace(options, layers=layers or None)
        with client.exchange(source, wanted) as exchange:
            for batch in exchange:
                column = batch.column("vector")
                yield layers, column.flatten().to_numpy().reshape(-1, column.type.list_size)
