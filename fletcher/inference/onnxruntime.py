"""ONNX Runtime as a backend, on the CPU and on CUDA.

On CUDA, float16 uses the graph without padding, which is written from the bundle at each load.
float32 uses the bundle's own graph and computes products in TF32.
"""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import InferenceResult, MicroBatch
from fletcher.errors import BackendError, FletcherError, ModelError
from fletcher.inference.backend import INSTALL_GPU, Backend, BackendConfig
from fletcher.inference.binding import Binding, Pin, cuda_pin
from fletcher.inference.budget import is_out_of_memory
from fletcher.inference.cuda_graphs import captured
from fletcher.inference.graph_io import GraphIO
from fletcher.inference.late import graph_io, graphs
from fletcher.inference.packed_io import PackedIO
from fletcher.models.bundle.bundle import HANDED_ON, ModelBundle
from fletcher.models.onnx.packed import write_packed

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

# Two runs at a time, so that the device computes one run while the host prepares the inputs and
# reads the outputs of the other. The number is a guess and was not measured on a GPU.
CUDA_CONCURRENCY = 2

_DTYPES: dict[str, npt.DTypeLike] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
}


class OnnxRuntimeBackend:
    """Backend with one loaded session for each block of a model; create it by `load`."""

    def __init__(
        self,
        sessions: Sequence[Any],
        io: GraphIO,
        place: _Place,
        description: dict[str, str],
        pin: Pin | None = None,
    ) -> None:
        self.concurrency, self.urgent_concurrency = place.concurrency, place.urgent_concurrency
        self._sessions = sessions
        self._io = io
        self._outputs = list(io.outputs)
        self._description = description
        # With `pin`, each thread has its own buffers, which its runs reuse.
        self._pin = pin
        self._local = threading.local()

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embed one micro-batch. Thread-safe.

        Raises:
            BackendError: ONNX Runtime failed, for instance because it is out of memory.
        """
        inputs, mask = self._io.feeds(batch)
        started = time.perf_counter()
        try:
            if self._pin is None:
                outputs = self._run(inputs, batch.layers)
            else:
                outputs = self._binding(self._pin).run_session(inputs, len(batch.lengths))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on {mask.shape} tokens: {error}") from error
        return self._io.result(batch, mask, outputs, time.perf_counter() - started)

    def _run(self, inputs: dict[str, Any], layers: int) -> list[npt.NDArray[Any]]:
        *before, last = self._sessions[: self._io.num_blocks(layers)]
        for session in before:
            (hidden,) = session.run([HANDED_ON], inputs)
            inputs = self._io.next_feeds(inputs, hidden)
        outputs: list[npt.NDArray[Any]] = last.run(self._outputs, inputs)
        return outputs

    def _binding(self, pin: Pin) -> Binding:
        if not hasattr(self._local, "binding"):
            self._local.binding = Binding(self._sessions[0], self._io.dim, self._outputs, pin)
        binding: Binding = self._local.binding
        return binding

    def describe(self) -> dict[str, str]:
        return dict(self._description)


def load(config: BackendConfig) -> Backend:
    """Load and warm up a bundle's graph.

    On the CPU each run uses one core, and as many runs are possible at a time as there are cores.
    The alternative, one run on two cores, was at best equally fast. It was several times slower
    while other processes used the cores.

    Raises:
        BackendError: ONNX Runtime or the provider is missing or lacks the precision.
        ModelError: The bundle or its graph is missing or damaged, or the graph has other inputs or
            outputs than the bundle declares.
    """
    ort = _import()
    bundle = ModelBundle.from_folder(Path(config.bundle))
    kind, _, index = config.device.partition(":")
    _check_precision(config.precision, kind)
    if kind == "cuda":
        device_id = int(index or 0)
        options = _cuda_options(ort, device_id, config.gpu_memory)
        place = _Place(CUDA_PROVIDER, options, CUDA_CONCURRENCY)
        if config.precision == "float16" and not config.late:
            # Without TF32, the few float32 operators of the graph without padding are exact.
            place = replace(place, options=options | {"use_tf32": "0"})
            return _load_packed(ort, bundle, config, place, "packed", cuda_pin(device_id))
    else:
        place = _cpu(config)
    if bundle.has_exits and kind == "cpu":
        place = replace(place, config=_one_arena())
    sessions = [_session(ort, bundle, graph, place) for graph in graphs(bundle, config)]
    first, last = sessions[0], sessions[-1]
    input_dtypes = {one.name: _DTYPES.get(one.type, np.int64) for one in first.get_inputs()}
    io = graph_io(bundle, config, input_dtypes, [one.name for one in last.get_outputs()])
    description = _describe(ort, last, config, "tf32" if kind == "cuda" else "float32")
    backend = OnnxRuntimeBackend(sessions, io, place, description)
    return _warmed_up(backend, io, bundle, config)


def load_twin(config: BackendConfig) -> Backend:
    """Load the twin of the graph without padding on the CPU, in float32.

    The twin serves to check the graph without padding and its inputs on hosts without a GPU. The
    twin is slower than the graph that `load` loads.

    Raises:
        BackendError, ModelError: As `load`.
    """
    ort = _import()
    place = _cpu(config)
    config = replace(config, device="cpu", precision="float32")
    bundle = ModelBundle.from_folder(Path(config.bundle))
    return _load_packed(ort, bundle, config, place, "standard", lambda _address, _size: None)


@dataclass(frozen=True, slots=True)
class _Place:
    """A session's provider, options and concurrency."""

    provider: str
    options: dict[str, str]
    concurrency: int
    config: Mapping[str, str] = field(default_factory=dict)
    # 0 on a GPU: its runs end soon, and an additional run would take as much memory as another.
    urgent_concurrency: int = 0


def _cpu(config: BackendConfig) -> _Place:
    # Each run has its own thread. An urgent run shares the cores with the other runs.
    cores = config.threads or len(os.sched_getaffinity(0))
    return _Place(CPU_PROVIDER, {}, cores, urgent_concurrency=1)


@functools.cache
def _one_arena() -> Mapping[str, str]:
    """Session options that make all sessions of this process share one memory arena.

    A model's blocks run one after the other. With separate arenas, each block's session would keep
    an arena as large as the arena of a complete model.
    """
    ort = _import()
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)
    return {
        "session.use_env_allocators": "1",
        # Weights need no arena: they are never freed, and the arena would round up their sizes.
        "session.use_device_allocator_for_initializers": "1",
    }


def _load_packed(
    ort: Any,
    bundle: ModelBundle,
    config: BackendConfig,
    place: _Place,
    attention: Literal["packed", "standard"],
    pin: Pin,
) -> Backend:
    precision: Literal["float16", "float32"] = (
        "float16" if config.precision == "float16" else "float32"
    )
    io = PackedIO.packed(bundle)
    # The files are temporary: sessions no longer need them after loading.
    try:
        with tempfile.TemporaryDirectory(prefix="fletcher-graph-") as folder:
            graph = write_packed(bundle, Path(folder), precision=precision, attention=attention)
            session = _session(ort, bundle, graph, place)
            description = _describe(ort, session, config, precision) | {"graph": "without padding"}
            backend = OnnxRuntimeBackend([session], io, place, description, pin)
            _warmed_up(backend, io, bundle, config)
            if not config.cuda_graphs:
                return backend
            if place.provider == CUDA_PROVIDER:
                place = replace(place, options=place.options | {"enable_cuda_graph": "1"})
            return captured(
                backend, io, ort, lambda: _session(ort, bundle, graph, place), config.device
            )
    except OSError as error:
        raise BackendError(
            f"`model` {bundle.name}: its {precision} graph cannot be written to the folder for "
            f"temporary files ({error.strerror}); free space there, or set TMPDIR"
        ) from error


def _describe(ort: Any, session: Any, config: BackendConfig, precision: str) -> dict[str, str]:
    return {
        "backend": "onnxruntime",
        "version": ort.__version__,
        "device": config.device,
        "precision": precision,
        "provider": session.get_providers()[0],
    }


def _warmed_up(
    backend: OnnxRuntimeBackend, io: GraphIO, bundle: ModelBundle, config: BackendConfig
) -> OnnxRuntimeBackend:
    try:
        for batch in io.warm_up_batches(config.max_batch_tokens):
            backend.run(batch)
    except FletcherError:
        raise
    except ValueError as error:
        raise ModelError(f"`model` {bundle.name} does not run: {error}", field="model") from error
    return backend


def providers() -> list[str]:
    """Execution providers of the installed build.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    return list(_import().get_available_providers())


def _import() -> Any:
    # ONNX Runtime reads this variable at import. Without the variable, it reports its use over the
    # network.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"`backend` onnxruntime cannot be imported ({error}); pip install "
            "'longbow-fletcher[cpu]', or 'longbow-fletcher[gpu]' where there is an NVIDIA GPU",
            field="backend",
        ) from error
    return onnxruntime


def _check_precision(precision: str, kind: str) -> None:
    allowed = ["float32", "float16"] if kind == "cuda" else ["float32"]
    if precision not in allowed:
        raise BackendError(
            f"`precision` is {precision}, but onnxruntime on {kind} has only "
            f"{' and '.join(allowed)}; ask for {allowed[-1]}, or for bfloat16 with `backend` "
            "openvino on a CPU",
            field="precision",
            allowed=allowed,
        )


def _cuda_options(ort: Any, device_id: int, max_bytes: int) -> dict[str, str]:
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise BackendError(
            "`device` cuda needs ONNX Runtime's CUDA provider, which the installed package lacks: "
            + INSTALL_GPU,
            field="device",
        )
    # CUDA and cuDNN are installed as wheels, whose libraries the loader does not find by itself.
    ort.preload_dlls()
    options = {
        "device_id": str(device_id),
        # By default, the arena doubles at every step and never shrinks.
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "1",
    }
    return options | ({"gpu_mem_limit": str(max_bytes)} if max_bytes else {})


def _session(ort: Any, bundle: ModelBundle, graph: Path, place: _Place) -> Any:
    provider, options = place.provider, place.options
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = 1
    session_options.inter_op_num_threads = 1
    # ONNX Runtime keeps a memory plan for each shape. Even with lengths on LENGTH_GRID, there are
    # hundreds of shapes.
    session_options.enable_mem_pattern = False
    session_options.log_severity_level = 3
    for name, value in place.config.items():
        session_options.add_session_config_entry(name, value)
    try:
        session = ort.InferenceSession(str(graph), session_options, providers=[(provider, options)])
    except Exception as error:
        # ONNX Runtime raises C++ exceptions of a dozen kinds.
        if is_out_of_memory(error):
            raise BackendError(
                f"`model` {bundle.name} does not fit into the device's memory; raise `gpu_memory` "
                "or lower `replicas_per_device` if they are set, else free memory there "
                f"({_first_line(error)})",
                field="model",
            ) from error
        if provider == CUDA_PROVIDER and "CUDA" in str(error):
            raise BackendError(f"`device` cuda cannot be used: {error}", field="device") from error
        raise ModelError(
            f"`model` {bundle.name}: {graph.name} cannot be loaded, it is damaged or made "
            f"for another ONNX Runtime ({_first_line(error)}); check it with `fletcher model "
            f"verify {bundle.qualified_name}`, or add the model again",
            field="model",
        ) from error
    loaded = session.get_providers()
    if provider not in loaded:
        # ONNX Runtime would silently use the CPU, which is slower by an order of magnitude.
        raise BackendError(
            f"`device` needs {provider}, but ONNX Runtime loaded only {', '.join(loaded)}: its "
            "CUDA 13 and cuDNN 9 libraries or the driver are missing; " + INSTALL_GPU,
            field="device",
        )
    return session


def _first_line(error: Exception) -> str:
    # Drop words with a `/`, such as the file's path, which must not leave the server.
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return " ".join(word for word in text.split() if "/" not in word)[:200]
