"""ONNX Runtime with a CUDA provider, and captured graphs, that compute on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import numpy as np
import onnxruntime


class Binding:
    """IOBinding that uses the CPU for every device and records addresses."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.real = session.io_binding()
        self.bound: list[tuple[Any, ...]] = []

    def bind_input(self, name: str, kind: str, index: int, *rest: Any) -> None:
        self.bound.append((kind, index, name, *rest))
        self.real.bind_input(name, "cpu", 0, *rest)

    def bind_output(self, name: str, kind: str, index: int, *rest: Any) -> None:
        self.bound.append((kind, index, name, *rest))
        self.real.bind_output(name, "cpu", 0, *rest)


class PretendedSession:
    """Session that records its options and computes on the CPU.

    With `enable_cuda_graph` a run is captured when its `gpu_graph_id` is new, and replayed where
    it is not: on the addresses of then, whatever is bound now. `replay` may be replaced.
    """

    all: ClassVar[list[PretendedSession]] = []

    def __init__(self, path: str, session_options: Any, providers: Any) -> None:
        self.options = dict(providers).get("CUDAExecutionProvider", {})
        self.graphs: dict[str, Binding] = {}
        self.replayed: list[str] = []
        self.real = onnxruntime.InferenceSession(
            path, session_options, providers=["CPUExecutionProvider"]
        )
        self.all.append(self)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        return Binding(self.real)

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        if self.options.get("enable_cuda_graph") != "1":
            self.real.run_with_iobinding(binding.real)
            return
        number = options.get_run_config_entry("gpu_graph_id")
        # Nothing is copied to where a graph reads from: it must be there already.
        assert all(kind == "cuda" for kind, *_ in binding.bound)
        if number in self.graphs:
            self.replayed.append(number)
            self.replay(self.graphs[number])
        else:
            self.graphs[number] = binding
            self.real.run_with_iobinding(binding.real)

    def replay(self, binding: Binding) -> None:
        self.real.run_with_iobinding(binding.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class OrtValue:
    """Memory of a device; only copies can write or read it."""

    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self._memory = memory

    @classmethod
    def ortvalue_from_shape_and_type(
        cls, shape: list[int], dtype: Any, kind: str, index: int
    ) -> OrtValue:
        assert kind == "cuda"
        return cls(np.full(shape, 0x7F, dtype))

    def data_ptr(self) -> int:
        return self._memory.ctypes.data

    def update_inplace(self, array: np.ndarray[Any, Any]) -> None:
        assert (array.shape, array.dtype) == (self._memory.shape, self._memory.dtype)
        ctypes.memmove(self._memory.ctypes.data, array.ctypes.data, array.nbytes)

    def numpy(self) -> np.ndarray[Any, Any]:
        return self._memory.copy()


class PretendedCuda:
    """The fake module."""

    __version__ = onnxruntime.__version__
    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions
    InferenceSession = PretendedSession
    OrtValue = OrtValue

    def __init__(self) -> None:
        self.preloaded = False
        PretendedSession.all.clear()

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        self.preloaded = True
