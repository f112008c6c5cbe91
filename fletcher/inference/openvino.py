"""OpenVINO as a backend on the CPU."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import InferenceResult, MicroBatch
from fletcher.errors import BackendError, ModelError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.graph_io import GraphIO
from fletcher.inference.late import graph_io, graphs
from fletcher.models.bundle.bundle import HANDED_ON, ModelBundle
from fletcher.models.onnx.float_indices import needs_float32

PRECISION_HINTS = {"float32": "f32", "bfloat16": "bf16"}

_DTYPES: dict[str, npt.DTypeLike] = {"i64": np.int64, "i32": np.int32, "f32": np.float32}


class OpenVinoBackend:
    """Backend with one or two compiled copies of a model, see `load`, `load_inline`.

    OpenVINO has at most one stream for each core, and a run waits while all streams are busy. So
    the second copy is for urgent runs: it has a single stream, which shares a core with the first
    copy. `streams` has the requests of the first copy, and `priority` those of the second. Both are
    lists with an item for each stream, and an item is a list with a request for each block.
    """

    def __init__(
        self,
        streams: list[list[Any]],
        priority: list[list[Any]],
        io: GraphIO,
        tensor: Callable[..., Any],
        description: dict[str, str],
    ) -> None:
        self.concurrency, self.urgent_concurrency = len(streams), len(priority)
        self._io = io
        self._tensor = tensor
        # Requests hold the tensors of a run. These lists have the requests that are idle now.
        self._streams, self._priority = streams, priority
        self._changed = threading.Condition()
        self._description = description

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embed one micro-batch. Thread-safe.

        Raises:
            BackendError: OpenVINO failed.
        """
        with self._requests() as requests:
            return self._run(requests, batch)

    def warm_up(self, batches: Iterable[MicroBatch]) -> None:
        """Run micro-batches on all requests, which compiles kernels. Raises like `run`."""
        for batch in batches:
            for requests in (*self._streams, *self._priority):
                self._run(requests, batch)

    def _run(self, requests: list[Any], batch: MicroBatch) -> InferenceResult:
        inputs, mask = self._io.feeds(batch)
        try:
            started = time.perf_counter()
            *before, last = requests[: self._io.num_blocks(batch.layers)]
            feeds: dict[str, Any] = {
                name: self._tensor(array, shared_memory=True) for name, array in inputs.items()
            }
            for request in before:
                _infer(request, feeds)
                feeds = self._io.next_feeds(feeds, request.get_tensor(HANDED_ON))
            _infer(last, feeds)
            compute_s = time.perf_counter() - started
            # The outputs are copied, because the next run overwrites the request's tensors.
            outputs = [last.get_tensor(name).data.copy() for name in self._io.outputs]
        except Exception as error:
            raise BackendError(f"OpenVINO failed on {mask.shape} tokens: {error}") from error
        return self._io.result(batch, mask, outputs, compute_s)

    @contextlib.contextmanager
    def _requests(self) -> Iterator[list[Any]]:
        """Reserve a stream's requests, one for each block, in the first copy if possible."""
        with self._changed:
            while not (self._streams or self._priority):
                self._changed.wait()
            free = self._streams or self._priority
            requests = free.pop()
        try:
            yield requests
        finally:
            with self._changed:
                free.append(requests)
                self._changed.notify()

    def describe(self) -> dict[str, str]:
        return dict(self._description)


def load(config: BackendConfig) -> OpenVinoBackend:
    """Load a bundle's graph with one stream for each core, and one for urgent runs.

    Raises:
        BackendError: OpenVINO is missing or lacks the precision on this CPU.
        ModelError: The bundle or its graph is missing or damaged, or the graph has other inputs or
            outputs than the bundle declares.
    """
    cores = config.threads or len(os.sched_getaffinity(0))
    return _load(config, streams=(cores, cores), priority=(1, 1))


def load_inline(config: BackendConfig) -> OpenVinoBackend | None:
    """Load a backend that runs one micro-batch at a time, on two cores.

    Returns None if only one core may be used.

    With one stream for each core, as in `load`, a single run would leave the second core idle. More
    than two cores for a run have not been measured.

    Raises:
        BackendError, ModelError: As `load`.
    """
    cores = config.threads or len(os.sched_getaffinity(0))
    return _load(config, streams=(1, 2)) if cores > 1 else None


def _load(
    config: BackendConfig, *, streams: tuple[int, int], priority: tuple[int, int] | None = None
) -> OpenVinoBackend:
    """Load copies of a model, each given by a pair (streams, cores)."""
    openvino = _import()
    bundle = ModelBundle.from_folder(Path(config.bundle))
    hint = PRECISION_HINTS.get(config.precision)
    if hint is None or config.device != "cpu":
        raise BackendError(
            f"`backend` openvino has float32 and bfloat16 on the CPU, not {config.precision} on "
            f"{config.device}",
            field="precision" if hint is None else "device",
            allowed=sorted(PRECISION_HINTS) if hint is None else ["cpu"],
        )
    if config.precision == "bfloat16" and needs_float32(bundle):
        raise BackendError(
            f"`precision` is bfloat16, but an older Fletcher wrote the graph of {bundle.name}, "
            "which computes indexes in floating point: bfloat16 would give wrong vectors. Add the "
            f"model again: `fletcher model add {bundle.source} --name {bundle.name}`, or ask for "
            "float32",
            field="precision",
            allowed=["float32"],
        )
    core = openvino.Core()
    sizes = [streams] if priority is None else [streams, priority]
    copies = [_compile(core, bundle, graph, hint, sizes) for graph in graphs(bundle, config)]
    first, last = copies[0][0], copies[-1][0]
    input_dtypes = {
        one.get_any_name(): _DTYPES.get(one.get_element_type().get_type_name(), np.int64)
        for one in first.inputs
    }
    names = [name for one in last.outputs for name in one.get_names()]
    io = graph_io(bundle, config, input_dtypes, names)
    requests = [
        [[one.create_infer_request() for one in blocks] for _ in range(num_streams)]
        for blocks, (num_streams, _) in zip(zip(*copies, strict=True), sizes, strict=True)
    ]
    backend = OpenVinoBackend(
        requests[0],
        requests[1] if priority else [],
        io,
        openvino.Tensor,
        {
            "backend": "openvino",
            "version": openvino.__version__.partition("-")[0],
            "device": "cpu",
            "precision": config.precision,
            "provider": ", ".join(last.get_property("EXECUTION_DEVICES")),
        },
    )
    try:
        backend.warm_up(io.warm_up_batches(config.max_batch_tokens))
    except ValueError as error:
        raise ModelError(f"`model` {bundle.name} does not run: {error}", field="model") from error
    return backend


def devices() -> dict[str, list[str]]:
    """OpenVINO's devices, each with the precisions and other capabilities that it has.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    core = _import().Core()
    return {
        name: list(core.get_property(name, "OPTIMIZATION_CAPABILITIES"))
        for name in core.available_devices
    }


def _import() -> Any:
    # Without this entry, OpenVINO reports each import over the network.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"`backend` openvino cannot be imported ({error}); pip install 'longbow-fletcher[cpu]'",
            field="backend",
        ) from error
    return openvino


def _infer(request: Any, feeds: Mapping[str, Any]) -> None:
    """Run a request without OpenVINO's checks and copies.

    `request.infer` would check the inputs' types and copy the outputs. Both together take a tenth
    of the time that a short text takes.
    """
    for name, tensor in feeds.items():
        request.set_tensor(name, tensor)
    request.start_async()
    request.wait()


def _compile(
    core: Any, bundle: ModelBundle, graph: Path, hint: str, sizes: Sequence[tuple[int, int]]
) -> list[Any]:
    """Compile copies of a graph, one for each pair (streams, cores) in `sizes`."""
    try:
        model = core.read_model(str(graph))
    except Exception as error:
        raise ModelError(
            f"`model` {bundle.name}: OpenVINO cannot read {graph.name}, which is damaged or has "
            "operators that OpenVINO lacks; check it with `fletcher model verify "
            f"{bundle.qualified_name}`, add the model again, or ask for `backend` onnxruntime",
            field="model",
        ) from error
    options = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": hint,
        # With pinning, all of Fletcher's processes would pin their threads to the same first cores.
        "ENABLE_CPU_PINNING": False,
    }
    try:
        copies = []
        for streams, threads in sizes:
            cores = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads}
            copies.append(core.compile_model(model, "CPU", options | cores))
        actual = copies[0].get_property("INFERENCE_PRECISION_HINT").get_type_name()
    except Exception as error:
        raise BackendError(
            f"`backend` openvino cannot compile {bundle.name} for this CPU: {error}",
            field="backend",
        ) from error
    if actual != hint:
        # OpenVINO would silently use another precision.
        raise BackendError(
            f"`precision` is bfloat16, which this CPU lacks: OpenVINO would run {actual}; ask for "
            "float32",
            field="precision",
            allowed=["float32"],
        )
    return copies
