"""Options of the engines that run a model, and of their processes."""

from __future__ import annotations

from dataclasses import dataclass

from fletcher.config.option import MILLISECONDS, SIZE, OptionGroup, option

DISPATCHES = ("throughput-weighted", "least-loaded", "round-robin", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(OptionGroup):
    """Device and engine of a model, and the size of its runs.

    With `auto` or 0 the tune record decides, or rules if there is no record. The fields are part of
    a tune record's key. So a new field makes existing records useless.

    Attributes:
        device: auto, cpu, cuda, or cuda:0,1 for some GPUs. auto uses GPUs if they work.
        backend: Engine that runs the model. auto uses the fastest engine that `fletcher tune`
            measured, or the usual best for the device.
        precision: Number type of the model's arithmetic. float32 is exact. The other types are
            faster on hardware that supports them.
        threads: CPU cores for the model, 0: all. A lower number leaves cores to other programs.
        max_batch_tokens: Maximum number of tokens in one run of the model, 0: the engine's best. A
            higher number can raise throughput, but each run takes longer.
        replicas_per_device: Copies of the model on each GPU, 0: as `fletcher tune` found, or 1.
            More copies keep a GPU busier with short texts. Each copy takes memory.
        gpu_memory: GPU memory for one copy of the model, 0: all. A lower limit leaves memory to
            other programs, but runs that need more fail.
        cuda_graphs: Run a single text of up to 63 tokens as one CUDA graph, on GPUs in float16.
            Vectors are returned sooner. The start takes longer, and the model needs its memory
            twice. Experimental.
    """

    device: str = option(
        "auto", pattern=r"auto|cpu|cuda(:\d+(,\d+)*)?", expected="auto, cpu, cuda or cuda:N,..."
    )
    backend: str = option("auto", choices=("auto", "onnxruntime", "openvino"), hidden=("null",))
    precision: str = option("auto", choices=("auto", "float32", "bfloat16", "float16"))
    threads: int = option(0)
    max_batch_tokens: int = option(0)
    replicas_per_device: int = option(0, maximum=64)
    gpu_memory: int = option(0, SIZE)
    cuda_graphs: bool = option(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(OptionGroup):
    """Processes around the engine, and how work is divided among them.

    Attributes:
        device_fallback: Replacement when no GPU works. cpu: the CPU takes over; it is slower, and
            vectors differ in their last digits. none: callers get a retryable error.
        tokenizer_workers: Number of tokenizer processes, 0: chosen from the number of cores. More
            processes can feed a faster GPU. Each process takes memory.
        tokenizer: The model's own tokenizer, the one choice outside of measurements.
        dispatch: Rule that chooses the device for the next run. throughput-weighted suits devices
            that differ or slow down. The other rules measure nothing, and suit equal devices.
        worker_timeout_s: Longest run of the model. A process that takes longer is replaced, and its
            work is retried. A lower limit ends hangs sooner, but may replace a process that is only
            slow.
        isolate_engine: Run engines and tokenizers in worker processes only. Single short texts then
            take longer, but a crash of an engine or tokenizer cannot end the server.
        max_queue_delay_ms: Longest wait for texts to fill a run. A higher value makes runs fuller,
            but vectors are returned later.
    """

    device_fallback: str = option("none", choices=("none", "cpu"))
    tokenizer_workers: int = option(0, maximum=1024)
    tokenizer: str = option("model", choices=("model",), hidden=("null",))
    dispatch: str = option(DISPATCHES[0], choices=DISPATCHES)
    worker_timeout_s: float = option(120, minimum=1)
    isolate_engine: bool = option(False)
    max_queue_delay_ms: float = option(5, MILLISECONDS)
