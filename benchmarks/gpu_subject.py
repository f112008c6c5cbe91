"""Measurements of one model on one device: parity, engine, queries, a server, and PyTorch."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.corpus import ROOT, numbered
from benchmarks.engines import run_bare, save_tokens
from benchmarks.jobs import JobError, run_job
from benchmarks.latency import percentiles
from benchmarks.serving import serve
from fletcher import EmbedCommand, connect
from fletcher.inference.backend import BackendConfig
from fletcher.models.bundle.bundle import ModelBundle

GOLDEN = ROOT / "tests" / "golden" / "minilm.parquet"
BATCH_ROWS = 500
PEER_BATCH_SIZES = (64, 128, 256, 512)
# The tests' limits for each precision: lowest cosine, mean cosine.
PARITY = {"float32": (0.99999, 0.99999), "float16": (0.9995, 0.9999)}

_DEBUG = {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
_KERNEL = re.compile(r"SdpaKernel=(\w+)")
_DATASET = "gpu-check"


class NoDeviceError(Exception):
    """The engine does not run on the device; the engine's message."""


@dataclass(frozen=True)
class Subject:
    """One model on one device, and how to measure it.

    Attributes:
        bundle: The model.
        home: The FLETCHER_HOME that holds it.
        checkpoint: Its folder for the peer; None if there is none.
        device: `cpu` or `cuda:N`.
        config: Configuration of the graph without padding.
        loader: Name of the function that loads it.
        texts: Texts to measure with.
        num_tokens: Tokens of these texts.
        folder: For temporary files.
        repeats: Turns; the median counts.
        num_queries: Runs of one title each.
    """

    bundle: ModelBundle
    home: Path
    checkpoint: Path | None
    device: str
    config: BackendConfig
    loader: str
    texts: list[str]
    num_tokens: int
    folder: Path
    repeats: int
    num_queries: int


def measure_parity(subject: Subject) -> dict[str, Any]:
    """Cosines of the golden texts to the padded float32 graph on the CPU."""
    texts = pq.read_table(GOLDEN, columns=["text"])["text"].to_pylist()
    tokens, path = subject.folder / "golden.npz", subject.folder / "golden.npy"
    save_tokens(subject.bundle, texts, tokens)
    job = {"tokens": str(tokens), "embeddings": str(path)}
    reference = BackendConfig(
        backend="onnxruntime",
        device="cpu",
        bundle=str(subject.bundle.folder),
        threads=subject.config.threads,
    )
    run_bare(reference, job, subject.folder)
    expected = np.load(path)
    answer = run_bare(
        subject.config, {**job, "loader": subject.loader}, subject.folder, environ=_DEBUG
    )
    if "skipped" in answer:
        raise NoDeviceError(answer["skipped"])
    cosines = (np.load(path) * expected).sum(axis=1, dtype=np.float64)
    cosines /= np.linalg.norm(np.load(path), axis=1) * np.linalg.norm(expected, axis=1)
    lowest, mean = PARITY[subject.config.precision]
    return {
        "texts": len(texts),
        "engine": answer["engine"],
        "lowest": float(cosines.min()),
        "mean": float(cosines.mean()),
        "allowed_lowest": lowest,
        "allowed_mean": mean,
        # Written so that NaN is wrong.
        "holds": bool(cosines.min() >= lowest and cosines.mean() >= mean),
        "attention_kernels": sorted(set(_KERNEL.findall(answer["printed"]))),
    }


def measure_engine(subject: Subject) -> dict[str, Any]:
    job = {
        "tokens": str(subject.folder / "tokens.npz"),
        "embeddings": str(subject.folder / "embeddings.npy"),
        "loader": subject.loader,
    }
    answers = [_measured(subject, subject.config, job) for _ in range(subject.repeats)]
    note = f"{subject.config.max_batch_tokens} tokens a run"
    return {"seconds": [answer["seconds"] for answer in answers], "note": note}


def _measured(subject: Subject, config: BackendConfig, job: dict[str, Any]) -> dict[str, Any]:
    answer = run_bare(config, job, subject.folder)
    if "skipped" in answer:
        raise JobError(answer["skipped"])
    return answer


def measure_queries(subject: Subject, *, cuda_graphs: bool) -> dict[str, Any]:
    """The engine's time for one title after a pause, as on an idle server."""
    job = {
        "tokens": str(subject.folder / "titles.npz"),
        "requests": subject.num_queries,
        "loader": subject.loader,
    }
    config = replace(subject.config, cuda_graphs=cuda_graphs)
    answer = _measured(subject, config, job)
    note = answer["engine"].get("cuda_graphs", "a launch for each kernel")
    return {**percentiles(answer["paced_ms"]), "ms": answer["paced_ms"], "note": note}


def measure_server(subject: Subject) -> dict[str, Any]:
    """A server: into LanceDB if that is installed, else vectors sent back."""
    with_store = importlib.util.find_spec("lancedb") is not None
    options = ("--device", subject.device, "--backend", "onnxruntime")
    options += ("--max-batch-tokens", str(subject.config.max_batch_tokens))
    batches = numbered(subject.texts, batch_rows=BATCH_ROWS)
    seconds = []
    with (
        serve(subject.home, subject.bundle.name, *options, with_store=with_store) as served,
        connect(served.address) as client,
    ):
        for turn in range(subject.repeats + 1):  # the first warms up
            started = time.perf_counter()
            if with_store:
                dataset = f"{_DATASET}-{turn}"
                client.put(batches, EmbedCommand(dataset=dataset, durability="store"))
                num_rows = served.count(dataset)
            else:
                exchange = client.exchange(batches, EmbedCommand(dtype="float16"))
                num_rows = sum(batch.num_rows for batch in exchange)
            seconds.append(time.perf_counter() - started)
            if num_rows != len(subject.texts):
                raise JobError(f"{num_rows} of {len(subject.texts)} rows came through")
    note = "DoPut to rows in LanceDB" if with_store else "DoExchange, no store"
    return {"seconds": seconds[1:], "note": note}


def measure_peer(subject: Subject, python: Path, versions: dict[str, str]) -> dict[str, Any]:
    """sentence-transformers, else transformers, on the same device."""
    if subject.checkpoint is None:
        return {"absent": "its checkpoint is not here; give it with --model-folder"}
    has = _importable(python)
    name = next((one for one in ("sentence_transformers", "transformers") if one in has), None)
    if name is None or "torch" not in has:
        return {"absent": f"{python.name} has neither sentence-transformers nor transformers"}
    on_cpu = subject.device == "cpu"
    job = {
        "kind": "torch" if name == "sentence_transformers" else name,
        "checkpoint": str(subject.checkpoint),
        "max_length": subject.bundle.max_length,
        "precision": "float32" if on_cpu else "float16",
        "device": subject.device,
        "threads": subject.config.threads,
        "texts": str(subject.folder / "texts.json"),
        "batch_size": None,
        "batch_sizes": PEER_BATCH_SIZES,
        "embeddings": str(subject.folder / "peer.npy"),
    }
    command, seconds = [str(python), str(ROOT / "benchmarks" / "peer.py")], []
    for _ in range(subject.repeats):
        answer = run_job(command, job, subject.folder)
        job["batch_size"] = answer["batch_size"]
        seconds.append(answer["seconds"])
        versions |= answer["versions"]
    return {"seconds": seconds, "note": f"{name}, batch size {job['batch_size']}"}


def _importable(python: Path) -> list[str]:
    code = (
        "import importlib.util as u\n"
        "names = 'torch', 'sentence_transformers', 'transformers'\n"
        "print(*(name for name in names if u.find_spec(name)))"
    )
    try:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, check=False
        )
    except OSError:
        return []
    return done.stdout.split()
