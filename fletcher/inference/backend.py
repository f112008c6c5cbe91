"""What an engine must offer to be a backend: one small protocol, one module per engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fletcher.core.batches import InferenceResult, MicroBatch


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """How a replica loads its model; picklable, it travels to the replica's process.

    Attributes:
        backend: `onnxruntime`, `openvino` or `null`: resolved, never `auto`.
        device: `cpu` or `cuda:N`: resolved, never `auto`.
        bundle: The bundle's folder.
        precision: `float32`, `bfloat16` (OpenVINO) or `float16` (CUDA, without padding).
        threads: Cores this replica may use; 0: all it sees. CPU only.
        max_batch_tokens: Padded tokens in one run at most; warm-up covers it.
        gpu_memory: Bytes of the GPU that this replica may take; 0: all that is free. CUDA only.
        version: The bundle's hash: what the folder must hold, or the one kept beside it; empty:
            whatever is there.
        dim: Width of a vector, for `null`, which loads nothing.
        cuda_graphs: Single short texts run by captured CUDA graphs. CUDA and `float16` only.
        late: The graph for late chunking, not that of whole rows.
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
        """Embeds one micro-batch.

        Raises:
            BackendError: The engine failed; the message says how, for the log.
        """
        ...

    def describe(self) -> dict[str, str]:
        """Engine, version, device, precision and provider that really run, for logs and stats."""
        ...
