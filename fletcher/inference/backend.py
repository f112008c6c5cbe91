"""Protocol of backends; one module for each engine implements the protocol."""

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
    """Configuration of a replica; it is pickled and sent to the replica's process.

    Attributes:
        backend: `onnxruntime`, `openvino` or `null`; never `auto`.
        device: `cpu` or `cuda:N`; never `auto`.
        bundle: The bundle's folder.
        precision: `float32`, `bfloat16` (OpenVINO) or `float16` (CUDA, without padding).
        threads: Number of cores for this replica; 0 for all cores that it may use. CPU only.
        max_batch_tokens: Largest number of padded tokens in one run, also in the warm-up.
        gpu_memory: GPU memory for this replica in bytes; 0 for all free memory. CUDA only.
        version: Hash of the bundle to load, which may be a replaced version. Empty for the bundle
            in `bundle`, whatever its hash is.
        dim: Width of a vector, for the backend `null`, which loads no model.
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

    Up to `concurrency` threads may call `run` at the same time. For urgent runs, another
    `urgent_concurrency` threads may call `run`, so that an urgent run need not wait until another
    run has ended.
    """

    concurrency: int
    urgent_concurrency: int

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embed one micro-batch.

        Raises:
            BackendError: The engine failed; the message has the engine's reason, for the log.
        """
        ...

    def describe(self) -> dict[str, str]:
        """Engine, version, device, precision and provider in use, for logs and stats."""
        ...
