"""Is the GPU's graph right, which attention kernel runs, and how fast is it beside PyTorch.

`scripts/gpu_check` on a machine with CUDA; nothing is downloaded. With `--device cpu` the graph's
twin with standard operators goes the same way, which shows that all of this works and nothing of a
GPU's speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import contenders, hardware, report
from benchmarks.arguments import (
    absolute,
    add_common,
    add_max_batch_tokens,
    add_random_model,
    positive,
)
from benchmarks.corpus import ROOT, Corpus, numbered
from benchmarks.engines import run_bare, save_tokens
from benchmarks.jobs import JobError, run_job
from benchmarks.latency import percentiles
from benchmarks.random_model import Shape, write_checkpoint
from benchmarks.serving import serve
from benchmarks.setting import Setting
from fletcher import EmbedCommand, connect
from fletcher.errors import FletcherError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS
from fletcher.inference.host import HostInfo, detect_host
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry

GOLDEN = ROOT / "tests" / "golden" / "minilm.parquet"
QUICK_TEXTS, TEXTS = 2000, 20_000
QUICK_S = 60
QUICK_QUERIES, QUERIES, DIFFERENT_QUERIES = 100, 200, 50
# The random model is for speed alone: an eighth of the texts keeps it to about the same time.
RANDOM_SHARE = 8
BATCH_ROWS = 500
PEER_BATCH_SIZES = (64, 128, 256, 512)
# By what the house's tests ask of a precision (lowest cosine, mean cosine).
PARITY = {"float32": (0.99999, 0.99999), "float16": (0.9995, 0.9999)}
NO_CUDA, WRONG = 2, 1

_DEBUG = {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
_KERNEL = re.compile(r"SdpaKernel=(\w+)")
_DATASET = "gpu-check"
_COLUMNS = {
    "texts/s": ("texts_per_s", "{:,.0f}"),
    "tokens/s": ("tokens_per_s", "{:,.0f}"),
    "p50 ms": ("p50", "{:.2f}"),
    "p99 ms": ("p99", "{:.2f}"),
}


class NoDeviceError(Exception):
    """The engine does not run on the device; the message is the engine's."""


@dataclass(frozen=True)
class Subject:
    """One model and where it runs.

    Attributes:
        bundle: The model.
        home: A FLETCHER_HOME that holds it.
        checkpoint: Its folder for the peer; None where there is none.
        device: `cpu` or `cuda:N`.
        config: How its graph without padding is loaded.
        loader: What loads it.
        texts: To measure with; `num_queries` runs of one title each are measured, too.
        num_tokens: Of these texts.
        folder: For files on the way.
        repeats: Turns; the median counts.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument(
        "--device", default="cuda:0", choices=("cpu", *(f"cuda:{n}" for n in range(16)))
    )
    parser.add_argument(
        "--model-folder",
        type=absolute,
        help="a checkpoint's folder to take in place of --model; the peer takes it, too",
    )
    parser.add_argument("--texts", type=positive, help=f"how many (default: {TEXTS})")
    parser.add_argument("--repeats", type=positive, default=3, help="turns (default: 3)")
    add_random_model(parser, Shape(768, 12, 12, 3072), "as bge-base")
    parser.add_argument(
        "--peer-python",
        type=absolute,
        default=Path(sys.executable),
        help="the Python that has PyTorch (default: this one)",
    )
    add_max_batch_tokens(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_TEXTS} texts, one turn, and nothing begins after {QUICK_S} s",
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Checks and measures, prints the table, writes the JSON; 1: wrong vectors, 2: no CUDA."""
    setting = Setting.of(args)
    host = detect_host()
    if args.device != "cpu" and (missing := _missing(host)):
        print(f"gpu_check: no CUDA provider: {missing}", file=sys.stderr)
        return NO_CUDA
    deadline = time.monotonic() + QUICK_S if args.quick else math.inf
    num_texts = args.texts or (QUICK_TEXTS if args.quick else TEXTS)
    result: dict[str, Any] = {
        **setting.about("gpu-check"),
        "hardware": setting.machine | {"gpus": hardware.gpus()},
        "models": [],
    }
    with tempfile.TemporaryDirectory(prefix="fletcher-gpu-check-") as scratch:
        folder = Path(scratch)
        for bundle, checkpoint in _models(args, folder):
            share = 1 if not result["models"] else RANDOM_SHARE
            texts = _texts(setting.corpus, max(1, num_texts // share))
            subject = _subject(args, host, bundle, checkpoint, texts, folder)
            titles = setting.corpus.sample_titles(DIFFERENT_QUERIES)
            save_tokens(bundle, titles, subject.folder / "titles.npz")
            try:
                model = _examine(subject, args.peer_python, setting.versions, deadline)
            except NoDeviceError as error:
                print(f"gpu_check: no CUDA provider: {error}", file=sys.stderr)
                return NO_CUDA
            result["models"].append(model)
            if time.monotonic() > deadline:
                report.say(f"--quick: {QUICK_S} s are over, nothing else begins")
                break
    print(setting.heading())
    twin = args.device == "cpu"
    print("a twin on the CPU" if twin else "\n".join(result["hardware"]["gpus"]) or args.device)
    for model in result["models"]:
        print("\n" + _text(model))
    print("\n" + report.publish(args.out, result))
    return 0 if all(model["parity"]["holds"] for model in result["models"]) else WRONG


def _missing(host: HostInfo) -> str:
    if not host.cuda_provider:
        return (
            "ONNX Runtime's CUDA build is not installed; pip uninstall onnxruntime, then pip "
            "install 'longbow-fletcher[gpu]'; --device cpu checks the twin"
        )
    if not host.num_cuda_devices:
        return "no NVIDIA device is visible here (nvidia-smi must list one)"
    return ""


def _models(args: argparse.Namespace, folder: Path) -> Iterator[tuple[ModelBundle, Path | None]]:
    """Both models, in a FLETCHER_HOME of their own, with the folders that PyTorch can load.

    The second one, which takes time to make, is made when the first one has been measured.
    """
    models = folder / "home" / "models"
    registry = Registry(models)
    if args.model_folder is not None:
        checkpoint = args.model_folder
        bundle = registry.add(str(checkpoint), progress=report.say)
    else:
        # Of the machine's own models only this one is shown to servers, and only to read.
        present = Registry(args.home / "models").get(args.model)
        models.mkdir(parents=True)
        (models / present.name).symlink_to(present.folder)
        bundle = registry.get(present.name)
        checkpoint = contenders.kept_checkpoint(args.home, args.model)
    yield bundle, checkpoint
    random = folder / "random-bert"
    write_checkpoint(random, args.random_model, bundle.tokenizer)
    yield registry.add(str(random), progress=report.say), random


def _texts(corpus: Corpus, num_texts: int) -> list[str]:
    batches = corpus.recombined(num_texts, batch_rows=BATCH_ROWS)
    return list(pa.Table.from_batches(batches)["text"].to_pylist())


def _subject(
    args: argparse.Namespace,
    host: HostInfo,
    bundle: ModelBundle,
    checkpoint: Path | None,
    texts: list[str],
    folder: Path,
) -> Subject:
    on_cpu = args.device == "cpu"
    place = folder / "work" / bundle.name
    place.mkdir(parents=True)
    contenders.write_texts(texts, place / "texts.json")
    return Subject(
        bundle=bundle,
        home=folder / "home",
        checkpoint=checkpoint,
        device=args.device,
        config=BackendConfig(
            backend="onnxruntime",
            device=args.device,
            bundle=str(bundle.folder),
            precision="float32" if on_cpu else "float16",
            threads=host.cores,
            max_batch_tokens=args.max_batch_tokens
            or (CPU_BATCH_TOKENS if on_cpu else CUDA_BATCH_TOKENS),
        ),
        loader="load_twin" if on_cpu else "load",
        texts=texts,
        num_tokens=save_tokens(bundle, texts, place / "tokens.npz"),
        folder=place,
        repeats=1 if args.quick else args.repeats,
        num_queries=QUICK_QUERIES if args.quick else QUERIES,
    )


def _examine(
    subject: Subject, peer_python: Path, versions: dict[str, str], deadline: float
) -> dict[str, Any]:
    amount = f"{len(subject.texts):,} texts, {subject.num_tokens:,} tokens"
    report.say(f"{subject.bundle.name}: {amount}")
    parity = _parity(subject)
    rows = []
    peer = f"PyTorch {'float32' if subject.device == 'cpu' else 'float16'}, SDPA, sorted"
    for name, measure in (
        ("Fletcher's engine, ready tokens", lambda: _engine(subject)),
        ("one title after the other", lambda: _queries(subject, cuda_graphs=False)),
        ("the same with CUDA graphs", lambda: _queries(subject, cuda_graphs=True)),
        ("Fletcher, end to end", lambda: _end_to_end(subject)),
        (peer, lambda: _peer(subject, peer_python, versions)),
    ):
        report.say(f"{subject.bundle.name}: {name}")
        if time.monotonic() > deadline:
            rows.append({"name": name, "absent": f"--quick: {QUICK_S} s were over"})
            continue
        try:
            row = measure()
        except (JobError, FletcherError) as error:
            row = {"absent": f"failed: {str(error).strip().splitlines()[-1]}", "failed": str(error)}
        if "seconds" in row:
            seconds = statistics.median(row["seconds"])
            row["texts_per_s"] = len(subject.texts) / seconds
            row["tokens_per_s"] = subject.num_tokens / seconds
        rows.append({"name": name, **row})
    return {
        "model": subject.bundle.qualified_name,
        "texts": len(subject.texts),
        "tokens": subject.num_tokens,
        "parity": parity,
        "rows": rows,
    }


def _parity(subject: Subject) -> dict[str, Any]:
    """The golden texts by this graph beside the padded float32 graph on the CPU."""
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


def _engine(subject: Subject) -> dict[str, Any]:
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


def _queries(subject: Subject, *, cuda_graphs: bool) -> dict[str, Any]:
    """The engine's own time for a title, as a query to an idle server has it: after a pause."""
    job = {
        "tokens": str(subject.folder / "titles.npz"),
        "requests": subject.num_queries,
        "loader": subject.loader,
    }
    config = replace(subject.config, cuda_graphs=cuda_graphs)
    answer = _measured(subject, config, job)
    note = answer["engine"].get("cuda_graphs", "a launch for each kernel")
    return {**percentiles(answer["paced_ms"]), "ms": answer["paced_ms"], "note": note}


def _end_to_end(subject: Subject) -> dict[str, Any]:
    """A server: into LanceDB where that is installed, else vectors sent back."""
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


def _peer(subject: Subject, python: Path, versions: dict[str, str]) -> dict[str, Any]:
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


def _text(model: dict[str, Any]) -> str:
    parity = model["parity"]
    kernels = ", ".join(parity["attention_kernels"]) or "not told"

    def figure(name: str) -> str:
        return f"{parity[name]:.6f} (at least {parity[f'allowed_{name}']})"

    lines = [
        f"{model['model']}: {model['texts']:,} texts, {model['tokens']:,} tokens",
        f"parity {'holds' if parity['holds'] else 'FAILED'} on {parity['texts']} golden texts",
        f"cosine to float32 on the CPU: lowest {figure('lowest')}, mean {figure('mean')}",
        f"attention kernel: {kernels}",
        "",
    ]
    cells = [
        [
            row["name"],
            *(form.format(row[key]) if key in row else "-" for key, form in _COLUMNS.values()),
            f"absent: {row['absent']}" if "absent" in row else row["note"],
        ]
        for row in model["rows"]
    ]
    return "\n".join(lines) + report.table(["", *_COLUMNS, "note"], cells)
