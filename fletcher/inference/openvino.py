"""OpenVINO as a backend on the CPU; the one module that imports it."""

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
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.onnx.graph import HANDED_ON

PRECISION_HINTS = {"float32": "f32", "bfloat16": "bf16"}

_DTYPES: dict[str, npt.DTypeLike] = {"i64": np.int64, "i32": np.int32}


class OpenVinoBackend:
    """A compiled model, or two copies of it; use `load` or `load_inline`.

    OpenVINO has as many streams as cores at most, and a run that comes when they are taken waits
    for one to end. So a second copy of the model, of a single stream, takes such runs, and shares
    the cores with the others.

    Args:
        streams: A request for each stream and each of the model's blocks.
        priority: The same of the second copy.
        io: The graph's inputs and outputs.
        tensor: OpenVINO's class.
        description: For `describe`.
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
        # A request holds one run's tensors: these are free.
        self._streams, self._priority = streams, priority
        self._changed = threading.Condition()
        self._description = description

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embeds one micro-batch; safe from several threads at once.

        Raises:
            BackendError: OpenVINO failed.
        """
        with self._requests() as requests:
            return self._run(requests, batch)

    def warm_up(self, batches: Iterable[MicroBatch]) -> None:
        """Compiles what these batches need, in all copies.

        Raises:
            BackendError: OpenVINO failed.
        """
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
            # Copied: the request's own tensors are written again by the next run.
            outputs = [last.get_tensor(name).data.copy() for name in self._io.outputs]
        except Exception as error:
            raise BackendError(f"OpenVINO failed on {mask.shape} tokens: {error}") from error
        return self._io.result(batch, mask, outputs, compute_s)

    @contextlib.contextmanager
    def _requests(self) -> Iterator[list[Any]]:
        """A request of each segment that nobody else has, of a stream if one is free."""
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
    """Compiles and warms up a bundle's graph, one stream a core and another for urgent runs.

    Raises:
        BackendError: OpenVINO is not there, or cannot do that precision here.
        ModelError: The bundle or its graph is missing, damaged or of another shape.
    """
    cores = config.threads or len(os.sched_getaffinity(0))
    return _load(config, streams=(cores, cores), priority=(1, 1))


def load_inline(config: BackendConfig) -> OpenVinoBackend | None:
    """The same for runs that come one at a time when there is no other: they have two cores each.

    None where there is one core. Streams of a core each would leave the second one idle. More than
    two have not been measured.

    Raises:
        BackendError, ModelError: As `load`.
    """
    cores = config.threads or len(os.sched_getaffinity(0))
    return _load(config, streams=(1, 2)) if cores > 1 else None


def _load(
    config: BackendConfig, *, streams: tuple[int, int], priority: tuple[int, int] | None = None
) -> OpenVinoBackend:
    """Copies of a model, each of so many streams on so many cores."""
    openvino = _import()
    bundle = ModelBundle.from_folder(Path(config.bundle))
    hint = PRECISION_HINTS.get(config.precision)
    if hint is None or config.device != "cpu":
        raise BackendError(
            f"`backend` openvino does float32 and bfloat16 on the CPU, not {config.precision} on "
            f"{config.device}",
            field="precision" if hint is None else "device",
            allowed=sorted(PRECISION_HINTS) if hint is None else ["cpu"],
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
    """OpenVINO's devices, and the precisions and abilities that each claims.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    core = _import().Core()
    return {
        name: list(core.get_property(name, "OPTIMIZATION_CAPABILITIES"))
        for name in core.available_devices
    }


def _import() -> Any:
    # It tells its maker of each import over the network, unless the module that does is missing.
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
    """As `request.infer`, which looks at all that inputs might be, and copies outputs.

    That takes a tenth of a short text's time.
    """
    for name, tensor in feeds.items():
        request.set_tensor(name, tensor)
    request.start_async()
    request.wait()


def _compile(
    core: Any, bundle: ModelBundle, graph: Path, hint: str, sizes: Sequence[tuple[int, int]]
) -> list[Any]:
    """Copies of a graph, each for so many runs at a time on so many cores."""
    try:
        model = core.read_model(str(graph))
    except Exception as error:
        raise ModelError(
            f"`model` {bundle.name}: {graph.name} cannot be read by OpenVINO, it is damaged "
            "or uses what OpenVINO lacks; `fletcher model verify "
            f"{bundle.qualified_name}` tells, adding the model again repairs it, `backend` "
            "onnxruntime may run it",
            field="model",
        ) from error
    options = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": hint,
        # Every process would pin to the same first cores, and Fletcher runs several.
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
        # It would go on in float32 and say nothing.
        raise BackendError(
            f"`precision` bfloat16 is not there on this CPU, OpenVINO would run {actual}; "
            "ask for float32",
            field="precision",
            allowed=["float32"],
        )
    return copies
