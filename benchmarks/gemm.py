"""Plain matrix products in one engine, measured in a separate process.

    python -m benchmarks.gemm JOB

The job (JSON) has `config` (the fields of BackendConfig), `rows`, `shapes` (a list of [k, m], for
products of [rows, k] and [k, m]), `depth`, `seconds` (for each shape, about) and `result`. The
answer has operations a second by shape.

Conversion from and to float32, and a call from Python, cost time. A chain of products makes both
small: to width m and back to k, `depth` times, each product with different weights, as in a model.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.bare import run_all
from fletcher.inference.backend import BackendConfig
from fletcher.models.onnx.graph import GRAPH_FILE, GraphBuilder

Run = Callable[[npt.NDArray[np.float32]], None]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = BackendConfig(**job["config"])
    rates = [
        measure(config, job["rows"], inner, outer, depth=job["depth"], seconds=job["seconds"])
        for inner, outer in job["shapes"]
    ]
    Path(job["result"]).write_text(json.dumps({"flops_per_s": rates}), encoding="utf-8")


def measure(
    config: BackendConfig, num_rows: int, inner: int, outer: int, *, depth: int, seconds: float
) -> float:
    """Operations a second of chains of products, as many at once as the engine has cores."""
    rng = np.random.default_rng(0)
    state = rng.standard_normal((num_rows, inner), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        folder = Path(scratch)
        write_chain(folder, num_rows, inner, outer, depth, rng)
        run = _LOADERS[config.backend](folder / GRAPH_FILE, config)
        run(state)  # compiles
        started = time.perf_counter()
        run(state)
        one_run = time.perf_counter() - started
        num_runs = config.threads * max(2, round(seconds / one_run))
        timing = run_all(
            num_runs,
            lambda _: run(state),
            num_threads=config.threads,
            warm_up=lambda: run(state),
        )
    return num_runs * depth * 4.0 * num_rows * inner * outer / timing.seconds


def write_chain(
    folder: Path, num_rows: int, inner: int, outer: int, depth: int, rng: np.random.Generator
) -> None:
    """Writes the graph, with weights that keep values from growing or vanishing."""
    with GraphBuilder(folder, "chain") as graph:
        value = graph.input("state", np.float32, (num_rows, inner))
        for place in range(2 * depth):
            rows, columns = (outer, inner) if place % 2 else (inner, outer)
            weight = rng.standard_normal((rows, columns), dtype=np.float32) / np.sqrt(rows)
            name = graph.constant(f"weight.{place}", weight.astype(np.float32))
            value = graph.node("MatMul", (value, name), f"product.{place}")
        graph.output(value, np.float32, (num_rows, inner))
        graph.save()


def _openvino(path: Path, config: BackendConfig) -> Run:
    """Compiles like `fletcher.inference.openvino`."""
    import openvino

    from fletcher.inference.openvino import PRECISION_HINTS

    options = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[config.precision],
        "NUM_STREAMS": config.threads,
        "INFERENCE_NUM_THREADS": config.threads,
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
    local = threading.local()

    def run(state: npt.NDArray[np.float32]) -> None:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        local.request.infer([state], share_inputs=True)

    return run


def _onnxruntime(path: Path, _: BackendConfig) -> Run:
    """Loads like `fletcher.inference.onnxruntime` on the CPU: one core for each run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(state: npt.NDArray[np.float32]) -> None:
        session.run(None, {"state": state})

    return run


_LOADERS: dict[str, Callable[[Path, BackendConfig], Run]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}

if __name__ == "__main__":
    main()
