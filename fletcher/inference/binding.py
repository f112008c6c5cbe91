"""Reused page-locked memory for the inputs and outputs of a session on a GPU.

A GPU copies directly from page-locked memory. With other memory, the driver first makes a copy and
waits for it. The buffers here belong to the process, are locked through the CUDA runtime, and are
reused by all runs. A buffer grows when a run needs more memory. The warm-up makes the buffers grow
before the first request.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Function that locks memory: it takes an address and a number of bytes. It returns the function
# that unlocks the memory, or None if the memory is not locked.
Pin = Callable[[int, int], Callable[[], None] | None]


class Buffer:
    """Memory that grows on demand, locked by `pin`."""

    def __init__(self, pin: Pin) -> None:
        self._pin = pin
        self._memory: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def view(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array in this memory. All views overlap: a new one overwrites earlier ones."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if num_bytes > self._memory.nbytes:
            self._grow(num_bytes)
        return self._memory[:num_bytes].view(dtype).reshape(shape)

    def _grow(self, num_bytes: int) -> None:
        # Sizes are powers of two, so that few steps lead to the largest size.
        size = max(mmap.PAGESIZE, 1 << (num_bytes - 1).bit_length())
        memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
        if unpin := self._pin(memory.ctypes.data, size):
            # Views may outlive this buffer. The memory is unlocked when the last view is gone.
            weakref.finalize(memory.base, unpin)
        self._memory = memory


class Binding:
    """Buffers bound to a session. Only one thread may use them at a time.

    Args:
        session: An ONNX Runtime InferenceSession.
        dim: Number of columns of the first output. A second output has 1 column.
        outputs: Names of the outputs. They are float32 and have one row for each row of the batch.
        pin: Function that locks the buffers' memory.
    """

    def __init__(self, session: Any, dim: int, outputs: Sequence[str], pin: Pin) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._widths = dict(zip(outputs, (dim, 1), strict=False))
        self._pin = pin
        self._buffers: dict[str, Buffer] = {}

    def run_session(
        self, feeds: Mapping[str, npt.NDArray[Any]], num_rows: int
    ) -> list[npt.NDArray[np.float32]]:
        """Run the session; return copies of its outputs, each with `num_rows` rows."""
        binding = self._binding
        for name, array in feeds.items():
            view = self._view(name, array.shape, array.dtype)
            np.copyto(view, array)
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, view.ctypes.data)
        views = []
        for name, width in self._widths.items():
            view = self._view(name, (num_rows, width), np.float32)
            binding.bind_output(name, "cpu", 0, np.float32, view.shape, view.ctypes.data)
            views.append(view)
        self._session.run_with_iobinding(binding)
        return [view.copy() for view in views]

    def _view(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        if name not in self._buffers:
            self._buffers[name] = Buffer(self._pin)
        return self._buffers[name].view(shape, dtype)


def cuda_pin(device_id: int) -> Pin:
    """Create a function that locks memory for a device, by the loaded CUDA runtime.

    Locking may fail, for instance because of a limit on locked memory. Then the memory is used
    unlocked, and runs are a little slower.
    """
    runtime = _cuda_runtime()
    if runtime is None:
        return lambda _address, _size: None

    def pin(address: int, size: int) -> Callable[[], None] | None:
        # https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
        # Without this call, the thread would open a context on device 0, some 100 MB of memory.
        runtime.cudaSetDevice(ctypes.c_int(device_id))
        if runtime.cudaHostRegister(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) != 0:
            return None
        return lambda: runtime.cudaHostUnregister(ctypes.c_void_p(address))

    return pin


def _cuda_runtime() -> Any:
    for version in (13, 12):
        # This name finds the library that ONNX Runtime's `preload_dlls` has loaded.
        with contextlib.suppress(OSError):
            return ctypes.CDLL(f"libcudart.so.{version}")
    return None
