"""Fletcher's engines alone: the one that the server would choose, and the others."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.jobs import run_job
from fletcher.config.engine import EngineConfig
from fletcher.core.batches import TextBatch
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import resolve_replicas
from fletcher.inference.host import detect_host
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tokenization.tokenizer import Tokenizer

# Backends and precisions to measure, if they can run.
ENGINES = (("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))
_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def title(backend: str, precision: str) -> str:
    """Name of an engine in tables."""
    return f"{_TITLES[backend]} {precision}"


def configure(
    bundle: ModelBundle, backend: str, precision: str, max_batch_tokens: int
) -> BackendConfig:
    """An engine on all cores of this process, in one process.

    The server starts several processes on machines with many cores.

    Raises:
        BackendError: It is not installed, or this processor lacks the precision.
    """
    host = detect_host()
    asked = EngineConfig(
        device="cpu",
        backend=backend,
        precision=precision,
        threads=host.cores,
        max_batch_tokens=max_batch_tokens,
    )
    resolution = resolve_replicas(asked, host, bundle)
    first = resolution.configs[0]
    return BackendConfig(**{**asdict(first), "threads": host.cores})


def save_tokens(bundle: ModelBundle, texts: list[str], path: Path) -> int:
    """Tokenizes for `benchmarks.bare`; returns the number of tokens, with special ones."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    tokens = Tokenizer.from_bundle(bundle.folder).encode(TextBatch(b"".join(encoded), offsets))
    np.savez(path, input_ids=tokens.input_ids, offsets=tokens.offsets)
    return len(tokens.input_ids)


def run_bare(
    config: BackendConfig,
    job: dict[str, Any],
    folder: Path,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measures an engine by `benchmarks.bare`; `environ` as in `run_job`."""
    command = [sys.executable, "-m", "benchmarks.bare"]
    return run_job(command, {**job, "config": asdict(config)}, folder, environ)
