"""Captured CUDA graphs for single short texts.

With a captured graph, a run is one launch instead of one launch for each kernel. A graph always
uses the shapes and addresses that it was captured with. So there is one graph for each of a few
numbers of tokens. A second row, of padding, fills a shorter text up to the graph's number of
tokens. The vector of the padding is dropped, and the padding does not change the text's vector. All
inputs are contiguous in the device's memory, so one copy moves them. The same holds for all
outputs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import InferenceResult, Int32Array, MicroBatch
from fletcher.errors import BackendError
from fletcher.inference.backend import Backend
from fletcher.inference.packed_io import PackedIO

log = logging.getLogger(__name__)

# Number of tokens of each graph. The longest text of a graph has one token less. The numbers are
# guesses and were not measured on a GPU.
GRAPH_TOKENS = (16, 32, 48, 64)
# Lowest cosine that a vector by a graph may have to the vector without graphs, as in
# `scripts/gpu_check`.
LEAST_COSINE = 0.9995

_WORD = np.dtype(np.float32).itemsize  # all inputs are int32, all outputs float32
_ALIGNED = 64  # in words: 256 bytes, the alignment of the CUDA runtime
_CHECK_IDS = 64  # check texts have token ids below this: every vocabulary has them

Shapes = Mapping[str, tuple[int, ...]]


class _Memory:
    """Arrays of 32-bit elements, contiguous on the host and on the device."""

    def __init__(self, ort: Any, device: str, dtype: npt.DTypeLike, shapes: Shapes) -> None:
        self._kind, _, index = device.partition(":")
        self._index = int(index or 0)
        self._dtype = np.dtype(dtype)
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        rooms = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        self.flat = np.zeros(sum(rooms), self._dtype)
        starts = [sum(rooms[:place]) for place in range(len(rooms))]
        self._places = dict(zip(shapes, zip(starts, sizes, strict=True), strict=True))
        self._shapes = shapes
        self.on_device = ort.OrtValue.ortvalue_from_shape_and_type(
            [len(self.flat)], self._dtype, self._kind, self._index
        )

    def bind(self, bind: Callable[..., None]) -> None:
        """Call `bind`, an IOBinding's `bind_input` or `bind_output`, for each array."""
        address = self.on_device.data_ptr()
        for name, shape in self._shapes.items():
            at = address + self._places[name][0] * _WORD
            bind(name, self._kind, self._index, self._dtype, shape, at)

    def views(self, flat: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """The arrays as views of `flat`, which has the layout of this memory."""
        return {
            name: flat[start : start + size].reshape(self._shapes[name])
            for name, (start, size) in self._places.items()
        }


class _Graph:
    """Captured graph for one number of tokens. Only one thread may use it at a time."""

    def __init__(self, ort: Any, session: Any, io: PackedIO, device: str, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._io = io
        self._session = session
        feeds = io.filled(np.zeros(1, np.int32), num_tokens)
        inputs = {name: array.shape for name, array in feeds.items()}
        outputs = {name: (2, width) for name, width in zip(io.outputs, (io.dim, 1), strict=False)}
        self._inputs = _Memory(ort, device, np.int32, inputs)
        self._outputs = _Memory(ort, device, np.float32, outputs)
        self._binding = session.io_binding()
        self._inputs.bind(self._binding.bind_input)
        self._outputs.bind(self._binding.bind_output)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(num_tokens))

    def replay(self, input_ids: Int32Array) -> list[npt.NDArray[np.float32]]:
        """Run one text of at most `num_tokens` - 1 tokens.

        Returns the outputs, [1, width] each. The first call captures the graph. During the first
        call, nothing else in this process may use the device.
        """
        views = self._inputs.views(self._inputs.flat)
        for name, array in self._io.filled(input_ids, self.num_tokens).items():
            np.copyto(views[name], array)
        self._inputs.on_device.update_inplace(self._inputs.flat)
        self._session.run_with_iobinding(self._binding, self._options)
        read = self._outputs.views(self._outputs.on_device.numpy())
        return [array[:1].copy() for array in read.values()]


class CapturedBackend:
    """Backend that runs single short texts by captured graphs, others by `backend`.

    Only one graph runs at a time, because graphs share memory. A text that arrives while a graph
    runs goes to `backend`. `graphs` are sorted from few tokens to many.
    """

    def __init__(
        self, backend: Backend, io: PackedIO, graphs: Sequence[_Graph], about: str
    ) -> None:
        self.concurrency, self.urgent_concurrency = backend.concurrency, backend.urgent_concurrency
        self._backend = backend
        self._io = io
        self._graphs = graphs
        self._about = about
        self._free = threading.Lock()

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embed one micro-batch. Thread-safe.

        Raises:
            BackendError: The engine failed.
        """
        graph = self._graph(batch)
        if graph is None or not self._free.acquire(blocking=False):
            return self._backend.run(batch)
        started = time.perf_counter()
        try:
            outputs = graph.replay(batch.input_ids)
        except Exception as error:
            raise BackendError(f"a CUDA graph failed: {error}") from error
        finally:
            self._free.release()
        mask = np.ones((1, len(batch.input_ids)), np.bool_)
        return self._io.result(batch, mask, outputs, time.perf_counter() - started)

    def describe(self) -> dict[str, str]:
        return self._backend.describe() | {"cuda_graphs": self._about}

    def _graph(self, batch: MicroBatch) -> _Graph | None:
        fitting = (one for one in self._graphs if len(batch.input_ids) < one.num_tokens)
        return next(fitting, None) if len(batch.lengths) == 1 else None


def captured(
    backend: Backend, io: PackedIO, ort: Any, open_session: Callable[[], Any], device: str
) -> CapturedBackend:
    """Add captured graphs to a warmed-up backend; after a failure, warn and add none.

    The vectors by graphs are compared with the backend's and must agree. `open_session` loads the
    model a second time, with `enable_cuda_graph`. A second session is needed because captured runs
    keep their memory, which other runs must not share. `device` is `cuda:N`, or `cpu`, where the
    same code runs without capture.
    """
    try:
        session = open_session()
        tokens = [one for one in GRAPH_TOKENS if one <= io.max_length]
        graphs = [_Graph(ort, session, io, device, one) for one in tokens]
        for graph in graphs:
            graph.replay(np.zeros(1, np.int32))
        about = f"single texts of up to {max(tokens) - 1} tokens"
        with_graphs = CapturedBackend(backend, io, graphs, about)
        for batch in _check_batches(graphs):
            _check(backend.run(batch), with_graphs.run(batch))
    except Exception as error:  # noqa: BLE001 - the backend works without graphs
        reason = str(error).splitlines()[0]
        log.warning("`cuda_graphs` are not used on %s: %s", device, reason)
        return CapturedBackend(backend, io, [], f"none: {reason}")
    return with_graphs


def _check_batches(graphs: Sequence[_Graph]) -> Iterator[MicroBatch]:
    """Texts of several lengths for each graph, in rotation over the graphs.

    A replay must be right although other replays have overwritten the shared memory before.
    """
    rng = np.random.default_rng(7)
    for fewer in (1, 8, 15, 1):
        for graph in graphs:
            length = graph.num_tokens - fewer
            ids = rng.integers(0, _CHECK_IDS, length).astype(np.int32)
            yield MicroBatch(ids, np.array([length], np.int32))


def _check(plain: InferenceResult, replayed: InferenceResult) -> None:
    one, other = plain.embeddings[0].astype(np.float64), replayed.embeddings[0]
    with np.errstate(invalid="ignore"):
        cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    if not cosine >= LEAST_COSINE:  # rejects NaN too
        raise BackendError(
            f"replayed vectors have a cosine of {cosine:.6f} to the model's, expected at least "
            f"{LEAST_COSINE}"
        )
    if plain.norms is not None and not np.allclose(
        plain.norms, np.asarray(replayed.norms), rtol=0.01
    ):
        raise BackendError("replayed vectors have another norm than the model's")
