"""Options of the engines that run a model, and of their processes."""

from __future__ import annotations

from dataclasses import dataclass

from fletcher.config.option import (
    MILLISECONDS,
    SECONDS,
    SIZE,
    SWITCH,
    TEXT,
    WHOLE,
    OptionGroup,
    option,
)

DISPATCHES = ("throughput-weighted", "least-loaded", "round-robin", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(OptionGroup):
    """Device, engine and size of runs.

    `auto` and 0 leave a choice to the tune record or to rules. The fields are part of a tune
    record's key: a new field makes old records useless.
    """

    device: str = option(
        "auto",
        TEXT,
        "Device: auto, cpu, cuda, or cuda:0,1 for some GPUs. auto prefers GPUs.",
        pattern=r"auto|cpu|cuda(:\d+(,\d+)*)?",
        expected="auto, cpu, cuda or cuda:N,...",
    )
    backend: str = option(
        "auto",
        TEXT,
        "Engine. auto takes the fastest that `fletcher tune` measured here, else the usual best of "
        "the device. null returns vectors without a model, for measurements.",
        choices=("auto", "onnxruntime", "openvino", "null"),
    )
    precision: str = option(
        "auto",
        TEXT,
        "Arithmetic. float32 is exact; the others are faster where the hardware has them.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    threads: int = option(
        0, WHOLE, "CPU cores for the model, 0: all. Fewer leave room for other programs."
    )
    max_batch_tokens: int = option(
        0,
        WHOLE,
        "Tokens in one run, 0: the engine's best. More may raise throughput, and raise latency.",
    )
    replicas_per_device: int = option(
        0,
        WHOLE,
        "Copies of the model on each GPU, 0: as `fletcher tune` found, else 1. More keep a GPU "
        "busier with short texts; each takes its memory.",
        maximum=64,
    )
    gpu_memory: int = option(
        0,
        SIZE,
        "GPU memory for one copy of the model, 0: all. Less leaves room for other programs; runs "
        "that need more fail.",
    )
    cuda_graphs: bool = option(
        False,
        SWITCH,
        "Run a single text of up to 63 tokens as one CUDA graph, on GPUs in float16: sooner "
        "answers, for the model's memory once more beside --gpu-memory and a longer start. "
        "Experimental.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(OptionGroup):
    """Processes around the engine, and how work is divided among them."""

    device_fallback: str = option(
        "none",
        TEXT,
        "cpu: the CPU takes over while no GPU works; it is slower, and vectors differ in their "
        "last digits. none: callers get a retryable error.",
        choices=("none", "cpu"),
    )
    tokenizer_workers: int = option(
        0,
        WHOLE,
        "Tokenizer processes, 0: derived from the cores. More serve a fast GPU; each takes memory.",
        maximum=1024,
    )
    tokenizer: str = option(
        "model",
        TEXT,
        "model: the model's own. null: one token a byte, to measure the rest of the server; needs "
        "--backend null.",
        choices=("model", "null"),
    )
    dispatch: str = option(
        DISPATCHES[0],
        TEXT,
        "Choice of the device for the next run. throughput-weighted suits devices that differ or "
        "slow down; the others measure nothing and suit equal devices.",
        choices=DISPATCHES,
    )
    worker_timeout_s: float = option(
        120,
        SECONDS,
        "Longest run; a process that takes longer is replaced and its work retried. Less ends "
        "hangs sooner, but may take a slow device for a hung one.",
        minimum=1,
    )
    isolate_engine: bool = option(
        False,
        SWITCH,
        "Run engines and tokenizers in worker processes only. Single short texts then take longer, "
        "but a crash in one cannot end the server.",
    )
    max_queue_delay_ms: float = option(
        5, MILLISECONDS, "Longest wait to fill a run. More makes fuller runs and later answers."
    )
