"""Check of the GPU's graph: its vectors, its attention kernel, and its speed beside PyTorch's.

Run it as `scripts/gpu_check` on a machine with CUDA; nothing is downloaded. `--device cpu` runs the
graph's twin with standard operators instead: that tests this program and says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import contenders, hardware, report
from benchmarks.arguments import (
    absolute,
    add_common,
    add_max_batch_tokens,
    add_random_model,
    positive,
)
from benchmarks.corpus import Corpus
from benchmarks.engines import save_tokens
from benchmarks.gpu_subject import (
    BATCH_ROWS,
    NoDeviceError,
    Subject,
    measure_engine,
    measure_parity,
    measure_peer,
    measure_queries,
    measure_server,
)
from benchmarks.jobs import JobError
from benchmarks.random_model import Shape, write_checkpoint
from benchmarks.setting import Setting
from fletcher.errors import FletcherError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS
from fletcher.inference.host import HostInfo, detect_host
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry

QUICK_TEXTS, TEXTS = 2000, 20_000
QUICK_S = 60
QUICK_QUERIES, QUERIES, DIFFERENT_QUERIES = 100, 200, 50
# The random model measures speed only. With an eighth of the texts it takes about as long.
RANDOM_SHARE = 8
NO_CUDA, WRONG = 2, 1

_COLUMNS = {
    "texts/s": ("texts_per_s", "{:,.0f}"),
    "tokens/s": ("tokens_per_s", "{:,.0f}"),
    "p50 ms": ("p50", "{:.2f}"),
    "p99 ms": ("p99", "{:.2f}"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument(
        "--device", default="cuda:0", choices=("cpu", *(f"cuda:{n}" for n in range(16)))
    )
    parser.add_argument(
        "--model-folder",
        type=absolute,
        help="a checkpoint's folder instead of --model, for Fletcher and the peer",
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
        help=f"{QUICK_TEXTS} texts, one turn, and nothing starts after {QUICK_S} s",
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
                report.say(f"--quick: {QUICK_S} s are over, nothing else starts")
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
    """Both models in a temporary FLETCHER_HOME, with the folders that PyTorch can load.

    The second model takes time to make, so it is made after the first one was measured.
    """
    models = folder / "home" / "models"
    registry = Registry(models)
    if args.model_folder is not None:
        checkpoint = args.model_folder
        bundle = registry.add_model(str(checkpoint), progress=report.say)
    else:
        # Servers see only this one of the machine's models.
        present = Registry(args.home / "models").get_model(args.model)
        models.mkdir(parents=True)
        (models / present.name).symlink_to(present.folder)
        bundle = registry.get_model(present.name)
        checkpoint = contenders.kept_checkpoint(args.home, args.model)
    yield bundle, checkpoint
    random = folder / "random-bert"
    write_checkpoint(random, args.random_model, bundle.tokenizer)
    yield registry.add_model(str(random), progress=report.say), random


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
    parity = measure_parity(subject)
    rows = []
    peer = f"PyTorch {'float32' if subject.device == 'cpu' else 'float16'}, SDPA, sorted"
    for name, measure in (
        ("Fletcher's engine, ready tokens", lambda: measure_engine(subject)),
        ("one title after the other", lambda: measure_queries(subject, cuda_graphs=False)),
        ("the same with CUDA graphs", lambda: measure_queries(subject, cuda_graphs=True)),
        ("Fletcher, end to end", lambda: measure_server(subject)),
        (peer, lambda: measure_peer(subject, peer_python, versions)),
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


def _text(model: dict[str, Any]) -> str:
    parity = model["parity"]
    kernels = ", ".join(parity["attention_kernels"]) or "unknown"

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
