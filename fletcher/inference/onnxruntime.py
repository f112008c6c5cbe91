"""ONNX Runtime as a backend, on the CPU and on CUDA; the one module that imports it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.batches import InferenceResult, MicroBatch
from fletcher.errors import BackendError, FletcherError, ModelError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.graph_io import GraphIO
from fletcher.models.bundle import ModelBundle

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

_INSTALL_GPU = (
    "pip uninstall onnxruntime, then pip install 'longbow-fletcher[gpu]' "
    "(both install the same Python module)"
)
_DTYPES: dict[str, npt.DTypeLike] = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


class OnnxRuntimeBackend:
    """A loaded session; use `load`."""

    def __init__(
        self, session: Any, io: GraphIO, *, concurrency: int, description: dict[str, str]
    ) -> None:
        self.concurrency = concurrency
        self._session = session
        self._io = io
        self._outputs = list(io.outputs)
        self._description = description

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embeds one micro-batch; safe from several threads at once.

        Raises:
            BackendError: ONNX Runtime failed, for instance for want of memory.
        """
        inputs, mask = self._io.feeds(batch)
        started = time.perf_counter()
        try:
            outputs = self._session.run(self._outputs, inputs)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on {mask.shape} tokens: {error}") from error
        compute_s = time.perf_counter() - started
        return InferenceResult(*self._io.finish(outputs, mask), compute_s)

    def describe(self) -> dict[str, str]:
        return dict(self._description)


def load(config: BackendConfig) -> OnnxRuntimeBackend:
    """Loads and warms up a bundle's graph.

    On the CPU each run has one core, and as many runs go on at once. Two cores were as fast
    together on one run at best, but several times slower when other processes wanted them.

    Raises:
        BackendError: ONNX Runtime or the provider is not there, or cannot do that precision.
        ModelError: The bundle or its graph is missing, damaged or of another shape.
    """
    ort = _import()
    bundle = ModelBundle.load(Path(config.bundle))
    kind, _, index = config.device.partition(":")
    _check_precision(config.precision, kind)
    if kind == "cuda":
        provider, options = CUDA_PROVIDER, _cuda_options(ort, int(index or 0))
        concurrency = 1  # runs on one device queue up anyway
    else:
        provider, options = CPU_PROVIDER, {}
        concurrency = config.threads or len(os.sched_getaffinity(0))
    session = _session(ort, bundle, provider, options)
    input_dtypes = {one.name: _DTYPES.get(one.type, np.int64) for one in session.get_inputs()}
    io = GraphIO.of(bundle, input_dtypes, [one.name for one in session.get_outputs()])
    backend = OnnxRuntimeBackend(
        session,
        io,
        concurrency=concurrency,
        description={
            "backend": "onnxruntime",
            "version": ort.__version__,
            "device": config.device,
            "precision": "tf32" if kind == "cuda" else "float32",
            "provider": session.get_providers()[0],
        },
    )
    try:
        for batch in io.warm_up_batches(config.max_batch_tokens):
            backend.run(batch)
    except FletcherError:
        raise
    except ValueError as error:
        raise ModelError(f"`model` {bundle.name} does not run: {error}", field="model") from error
    return backend


def providers() -> list[str]:
    """Execution providers that the installed build has.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    return list(_import().get_available_providers())


def _import() -> Any:
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
    if precision == "float32":
        return
    remedy = (
        "this bundle has no float16 graph; ask for float32, which runs as TF32 there"
        if kind == "cuda" and precision == "float16"
        else "ask for float32, or for bfloat16 with `backend` openvino"
    )
    raise BackendError(
        f"`precision` is {precision}, onnxruntime on {kind} does float32 only: {remedy}",
        field="precision",
        allowed=["float32"],
    )


def _cuda_options(ort: Any, device_id: int) -> dict[str, str]:
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise BackendError(
            "`device` cuda needs ONNX Runtime's CUDA provider, which the installed package lacks: "
            + _INSTALL_GPU,
            field="device",
        )
    # CUDA and cuDNN come as wheels; nothing else puts their libraries where the loader looks.
    ort.preload_dlls()
    return {
        "device_id": str(device_id),
        # The default doubles the arena at every step and keeps what it took.
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "1",
    }


def _session(ort: Any, bundle: ModelBundle, provider: str, options: dict[str, str]) -> Any:
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = 1
    session_options.inter_op_num_threads = 1
    # Plans are kept by shape; shapes come on a grid, but there are still hundreds.
    session_options.enable_mem_pattern = False
    session_options.log_severity_level = 3
    try:
        session = ort.InferenceSession(
            str(bundle.graph), session_options, providers=[(provider, options)]
        )
    except Exception as error:
        # Whatever is wrong, it says so in C++ exceptions of a dozen kinds.
        if provider == CUDA_PROVIDER and "CUDA" in str(error):
            raise BackendError(f"`device` cuda cannot be used: {error}", field="device") from error
        raise ModelError(
            f"`model` {bundle.name}: {bundle.graph.name} cannot be loaded, it is damaged or made "
            f"for another ONNX Runtime ({_first_line(error)}); `fletcher model verify "
            f"{bundle.name}` tells, adding the model again repairs it",
            field="model",
        ) from error
    loaded = session.get_providers()
    if provider not in loaded:
        # ONNX Runtime would go on with the CPU, an order of magnitude slower, and say nothing.
        raise BackendError(
            f"`device` asks for {provider}, ONNX Runtime loaded only {', '.join(loaded)}; its "
            "CUDA 13 and cuDNN 9 libraries or the driver are missing: " + _INSTALL_GPU,
            field="device",
        )
    return session


def _first_line(error: Exception) -> str:
    # The message names the file with its path, which does not leave the server.
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return " ".join(word for word in text.split() if "/" not in word)[:200]
