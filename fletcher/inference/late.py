"""Late chunking: the model reads a whole row before spans of it are pooled.

It uses a second graph on the same weights, so that the graph for whole rows stays unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import BoolArray, InferenceResult, MicroBatch, Spans
from fletcher.errors import ModelError
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.inference.graph_io import GraphIO
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.vectors.ragged import places

SPANS = "segments"  # input of the graph; its name is part of the bundle format


class LateBackend:
    """Backend for whole rows, and for late chunking by a second one.

    The second one is loaded on first use: it takes the memory of a model once more, and most
    servers never need it.
    """

    def __init__(self, backend: Backend, load: Callable[[], Backend]) -> None:
        self.concurrency, self.urgent_concurrency = backend.concurrency, backend.urgent_concurrency
        self._backend = backend
        self._load = load
        self._late: Backend | None = None
        self._loading = threading.Lock()

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embed one micro-batch. Thread-safe if the backends are.

        Raises:
            FletcherError: The engine failed, or could not load the graph.
        """
        if batch.spans is None:
            return self._backend.run(batch)
        with self._loading:
            late = self._late = self._late or self._load()
        return late.run(batch)

    def describe(self) -> dict[str, str]:
        return self._backend.describe()


class LateIO(GraphIO):
    """Inputs and outputs of the graph by `models.onnx.heads.write_late`."""

    def feeds(self, batch: MicroBatch) -> tuple[dict[str, npt.NDArray[Any]], BoolArray]:
        """Inputs as in GraphIO, and the spans' tokens, float32 [num_rows, most, length]."""
        arrays, mask = super().feeds(batch)
        spans = _spans(batch)
        rows = np.repeat(np.arange(len(mask)), spans.counts)
        tokens = np.arange(mask.shape[1], dtype=np.int32)
        shape = (len(mask), int(spans.counts.max()), mask.shape[1])
        arrays[SPANS] = np.zeros(shape, np.float32)
        inside = (tokens >= spans.bounds[:, :1]) & (tokens < spans.bounds[:, 1:])
        arrays[SPANS][rows, _places(spans)] = inside
        return arrays, mask

    def result(
        self,
        batch: MicroBatch,
        mask: BoolArray,
        outputs: Sequence[npt.NDArray[Any]],
        compute_s: float,
    ) -> InferenceResult:
        """Result with a vector for each span.

        Raises:
            ModelError: The graph's output has another shape than the bundle declares.
        """
        spans = _spans(batch)
        most = int(spans.counts.max())
        vectors = np.asarray(outputs[0], np.float32)
        self._check_shape(vectors, (len(mask) * most, self.dim))
        rows = np.repeat(np.arange(len(mask)), spans.counts)
        return InferenceResult(vectors[rows * most + _places(spans)], None, compute_s)


def graphs(bundle: ModelBundle, config: BackendConfig) -> list[Path]:
    """Graphs to load for a configuration, in order.

    Raises:
        ModelError: The bundle has no graph for late chunking.
    """
    if not config.late:
        return bundle.blocks
    if bundle.late is None:
        raise ModelError(
            f"`model` {bundle.name} has no graph for late chunking; add it again with "
            "`fletcher model add`",
            field="model",
        )
    return [bundle.late]


def graph_io(
    bundle: ModelBundle,
    config: BackendConfig,
    input_dtypes: Mapping[str, npt.DTypeLike],
    output_names: Sequence[str],
) -> GraphIO:
    """Inputs and outputs of the graphs to load; raises as `GraphIO.for_graph`."""
    if not config.late:
        return GraphIO.for_graph(bundle, input_dtypes, output_names)
    return LateIO(
        inputs=bundle.inputs,
        dtypes=input_dtypes,
        outputs=("embedding",),
        pad_token_id=bundle.pad_token_id,
        max_length=bundle.max_length,
        dim=bundle.dim,
        exits=bundle.layers,
    )


def _spans(batch: MicroBatch) -> Spans:
    """Spans of a micro-batch; without any, as in the warm-up, a span for each row."""
    if batch.spans is not None:
        return batch.spans
    bounds = np.stack([np.zeros_like(batch.lengths), batch.lengths], axis=1)
    return Spans(np.ones_like(batch.lengths), bounds)


def _places(spans: Spans) -> npt.NDArray[np.int64]:
    """int64 [num_spans], which of its row's each is."""
    return places(np.zeros(len(spans.counts), np.int64), spans.counts)
