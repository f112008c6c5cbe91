"""Late chunking: the model reads a complete row, then spans of the row are pooled.

Late chunking uses a second graph on the same weights. So the graph without spans stays unchanged.
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

SPANS = "segments"  # name of the graph's input; it is part of the bundle format


class LateBackend:
    """Backend that loads a second backend for late chunking.

    Micro-batches without spans run by `backend`, and those with spans by the second backend.

    The second backend is loaded by `load` at its first use. It needs the memory of another model,
    and most servers never use it.
    """

    def __init__(self, backend: Backend, load: Callable[[], Backend]) -> None:
        self.concurrency, self.urgent_concurrency = backend.concurrency, backend.urgent_concurrency
        self._backend = backend
        self._load = load
        self._late: Backend | None = None
        self._loading = threading.Lock()

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embed one micro-batch. Thread-safe if both backends are.

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
    """Inputs and outputs of the graph that `models.onnx.heads.write_late` writes."""

    def feeds(self, batch: MicroBatch) -> tuple[dict[str, npt.NDArray[Any]], BoolArray]:
        """Inputs and mask as in GraphIO, with the spans as an additional input.

        That input is [num_rows, largest number of spans of a row, padded length]. It is 1 for the
        tokens of each span and 0 elsewhere. It is int32, or float32 in bundles of older versions.
        """
        arrays, mask = super().feeds(batch)
        spans = _spans(batch)
        rows = np.repeat(np.arange(len(mask)), spans.counts)
        tokens = np.arange(mask.shape[1], dtype=np.int32)
        shape = (len(mask), int(spans.counts.max()), mask.shape[1])
        arrays[SPANS] = np.zeros(shape, self.dtypes[SPANS])
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
        """Make a result with one vector for each span.

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
    """Paths of the graphs to load for a configuration, in order.

    Raises:
        ModelError: `config` asks for late chunking, but the bundle has no graph for it.
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
    """Inputs and outputs of the loaded graphs. Raises like `GraphIO.for_graph`."""
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
    """Spans of a micro-batch; without spans, as in the warm-up, one span for each row."""
    if batch.spans is not None:
        return batch.spans
    bounds = np.stack([np.zeros_like(batch.lengths), batch.lengths], axis=1)
    return Spans(np.ones_like(batch.lengths), bounds)


def _places(spans: Spans) -> npt.NDArray[np.int64]:
    """int64 [num_spans], index of each span among the spans of its row."""
    return places(np.zeros(len(spans.counts), np.int64), spans.counts)
