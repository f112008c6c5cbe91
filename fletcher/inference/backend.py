"""Protocol of backends; each engine has one module that implements it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fletcher.core.batches import InferenceResult, MicroBatch

INSTALL_GPU = (
    "pip uninstall onnxruntime, then pip install 'longbow-fletcher[gpu]' "
    "(both install the same Python module)"
)


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Configuration of a replica; pickled and sent to its process.

    Attributes:
        backend: `onnxruntime`, `openvino` or `null`; never `auto`.
        device: `cpu` or `cuda:N`; never `auto`.
        bundle: The bundle's folder.
        precision: `float32`, `bfloat16` (OpenVINO) or `float16` (CUDA, without padding).
        threads: Cores for this replica; 0 for all that it sees. CPU only.
        max_batch_tokens: Largest number of padded tokens in one run; warm-up covers it.
        gpu_memory: GPU memory for this replica in bytes; 0 for all that is free. CUDA only.
        version: Hash that the bundle, or a replaced version of it, must have; empty for any.
        dim: Width of a vector, for `null`, which loads no model.
        cuda_graphs: Run single short texts as captured CUDA graphs. CUDA and `float16` only.
        late: Load the graph for late chunking instead of the one for whole rows.
    """

    backend: str
    device: str
    bundle: str
    precision: str = "float32"
    threads: int = 0
    max_batch_tokens: int = 1024
    gpu_memory: int = 0
    version: str = ""
    dim: int = 0
    cuda_graphs: bool = False
    late: bool = False


class Backend(Protocol):
    """A loaded model on one device.

    Up to `concurrency` threads may call `run` at once. For urgent runs, `urgent_concurrency` more
    may, so that these need not wait for the end of another run.
    """

    concurrency: int
    urgent_concurrency: int

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embed one micro-batch.

        Raises:
            BackendError: The engine failed; the message has its reason, for the log.
        """
        ...

    def describe(self) -> dict[str, str]:
        """Engine, version, device, precision and provider in use, for logs and stats."""
        ...
