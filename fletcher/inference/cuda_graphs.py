"""Single short texts by captured CUDA graphs: a run is one launch, not one for each kernel.

A graph keeps the shapes and addresses it was captured with. So there is one for each of a few
numbers of tokens, and a second row fills that number up with padding: texts do not see each other,
and its vector is thrown away. All inputs lie in one piece of the device's memory and all outputs in
another, so each way is one copy.
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

# Tokens of each graph; a text has one less at most. A guess, it has not been tried on a GPU.
GRAPH_TOKENS = (16, 32, 48, 64)
# What float16 may lose, by what `scripts/gpu_check` asks of it.
LEAST_COSINE = 0.9995

_WORD = np.dtype(np.float32).itemsize  # all inputs are int32, all outputs float32
_ALIGNED = 64  # words: 256 bytes, as the CUDA runtime aligns what it gives
_PROBE_TOKENS = 64  # ids below this; every vocabulary has them

Shapes = Mapping[str, tuple[int, ...]]


class _Memory:
    """Some arrays of 32 bits in one piece, here and on the device."""

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
        """Tells an IOBinding's `bind_input` or `bind_output` where these are."""
        address = self.on_device.data_ptr()
        for name, shape in self._shapes.items():
            at = address + self._places[name][0] * _WORD
            bind(name, self._kind, self._index, self._dtype, shape, at)

    def views(self, flat: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """The arrays in a copy of the whole."""
        return {
            name: flat[start : start + size].reshape(self._shapes[name])
            for name, (start, size) in self._places.items()
        }


class _Graph:
    """The graph of one number of tokens; for one thread at a time."""

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
        """The outputs for one text of `num_tokens` - 1 tokens at most, [1, width] each.

        The first run captures the graph: nothing else may use the device from this process then.
        """
        views = self._inputs.views(self._inputs.flat)
        for name, array in self._io.filled(input_ids, self.num_tokens).items():
            np.copyto(views[name], array)
        self._inputs.on_device.update_inplace(self._inputs.flat)
        self._session.run_with_iobinding(self._binding, self._options)
        read = self._outputs.views(self._outputs.on_device.numpy())
        return [array[:1].copy() for array in read.values()]


class CapturedBackend:
    """Runs single short texts by their graphs, and all else as `backend` does.

    Args:
        backend: The same model without graphs. It also takes a text that comes while another is
            in a graph, for they share memory.
        io: The model's inputs and outputs.
        graphs: From few tokens to many.
        about: What `describe` is to say of them.
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
        """Embeds one micro-batch; safe from several threads at once.

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
        if len(batch.lengths) != 1:
            return None
        length = len(batch.input_ids)
        return next((one for one in self._graphs if length < one.num_tokens), None)


def captured(
    backend: Backend, io: PackedIO, ort: Any, open_session: Callable[[], Any], device: str
) -> CapturedBackend:
    """A backend with graphs for short texts; without them, and with a warning, where they fail.

    Args:
        backend: The model without graphs, warmed up. Their vectors must be its own.
        io: Its inputs and outputs.
        ort: ONNX Runtime.
        open_session: Loads the same graph once more, with `enable_cuda_graph`. Captured runs keep
            their memory, so others must not share it.
        device: `cuda:N`, or `cpu`, where the same is run and nothing captured.
    """
    try:
        session = open_session()
        tokens = [one for one in GRAPH_TOKENS if one <= io.max_length]
        graphs = [_Graph(ort, session, io, device, one) for one in tokens]
        for graph in graphs:
            graph.replay(np.zeros(1, np.int32))
        about = f"single texts of up to {max(tokens) - 1} tokens"
        with_graphs = CapturedBackend(backend, io, graphs, about)
        for probe in _probes(graphs):
            _check(backend.run(probe), with_graphs.run(probe))
    except Exception as error:  # noqa: BLE001 - whatever it is, there is another way
        reason = str(error).splitlines()[0]
        log.warning("`cuda_graphs` are not used on %s: %s", device, reason)
        return CapturedBackend(backend, io, [], f"none: {reason}")
    return with_graphs


def _probes(graphs: Sequence[_Graph]) -> Iterator[MicroBatch]:
    """Texts for all graphs in turn: a few of each, and each overwritten by others in between."""
    rng = np.random.default_rng(7)
    for fewer in (1, 8, 15, 1):
        for graph in graphs:
            length = graph.num_tokens - fewer
            ids = rng.integers(0, _PROBE_TOKENS, length).astype(np.int32)
            yield MicroBatch(ids, np.array([length], np.int32))


def _check(plain: InferenceResult, replayed: InferenceResult) -> None:
    one, other = plain.embeddings[0].astype(np.float64), replayed.embeddings[0]
    with np.errstate(invalid="ignore"):
        cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    if not cosine >= LEAST_COSINE:  # so that NaN is wrong
        raise BackendError(f"replayed vectors have a cosine of {cosine:.6f} to the model's")
    if plain.norms is not None and not np.allclose(
        plain.norms, np.asarray(replayed.norms), rtol=0.01
    ):
        raise BackendError("replayed vectors have another length than the model's")
