"""Infinity as a peer: its engines in this process, and its HTTP server with a client.

Imports nothing of Fletcher: it runs where `benchmarks.peer` does, and loads what that says. The
arguments are a job, a folder for files, and a stack that ends what was started.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

# Several of the windows of 8 batches in which Infinity sorts texts.
REQUEST_TEXTS = 128
REQUESTS_IN_FLIGHT = 8
_START_TIMEOUT_S = 120.0
_REQUEST_TIMEOUT_S = 600.0

# From texts and a batch size to their embeddings, [num_texts, dim].
Encode = Callable[[list[str], int], Any]


def torch_engine(job: dict[str, Any], folder: Path, stack: ExitStack) -> Encode:
    """PyTorch engine without BetterTransformer, which is slower on a CPU."""
    import torch

    torch.set_num_threads(job["threads"])
    options = {"engine": "torch", "dtype": job["precision"], "bettertransformer": False}
    return _engines(job, folder, stack, options)


def onnx_engine(job: dict[str, Any], folder: Path, stack: ExitStack) -> Encode:
    """ONNX engine on Optimum's graph, unchanged: Infinity's optimizer needs an old Optimum."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    model = ORTModelForFeatureExtraction.from_pretrained(job["checkpoint"], export=True)
    model.save_pretrained(folder / "exported")
    options = {
        "engine": "optimum",
        "pooling_method": job["pooling"],
        "onnx_disable_optimize": True,
    }
    return _engines(job, folder, stack, options)


def _engines(
    job: dict[str, Any], folder: Path, stack: ExitStack, options: dict[str, Any]
) -> Encode:
    """Infinity in this process, with one engine for each batch size."""
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    os.chdir(_model_folder(job, folder))  # it looks for a graph in the current folder only
    loop = asyncio.new_event_loop()

    @functools.cache
    def engine(batch_size: int) -> Any:
        one = AsyncEmbeddingEngine.from_args(
            EngineArgs(
                model_name_or_path=".",
                device="cpu",
                batch_size=batch_size,
                model_warmup=False,
                **options,
            )
        )
        loop.run_until_complete(one.astart())
        stack.callback(lambda: loop.run_until_complete(one.astop()))
        return one

    def encode(some: list[str], batch_size: int) -> Any:
        embeddings, _ = loop.run_until_complete(engine(batch_size).embed(sentences=some))
        return np.stack(embeddings)

    return encode


def server(job: dict[str, Any], folder: Path, stack: ExitStack) -> Encode:
    """Infinity's HTTP server, one for each batch size, with several requests in flight.

    Vectors travel as base64, as OpenAI's client asks for them: numbers in JSON take longer.
    """
    model = _model_folder(job, folder)
    environ = os.environ | {"DO_NOT_TRACK": "1", "OMP_NUM_THREADS": str(job["threads"])}
    clients = stack.enter_context(ThreadPoolExecutor(REQUESTS_IN_FLIGHT))

    @functools.cache
    def port(batch_size: int) -> int:
        command = [sys.executable, "-c", "from infinity_emb.cli import cli; cli()", "v2"]
        command += ["--model-id", str(model), "--served-model-name", "model"]
        command += ["--host", "127.0.0.1", "--port", "0", "--batch-size", str(batch_size)]
        command += ["--engine", "torch", "--device", "cpu", "--dtype", job["precision"]]
        command += ["--no-bettertransformer", "--no-model-warmup"]
        log = folder / f"log-{batch_size}"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        return _port(process, log)

    def encode(some: list[str], batch_size: int) -> Any:
        to = port(batch_size)
        parts = [
            some[start : start + REQUEST_TEXTS] for start in range(0, len(some), REQUEST_TEXTS)
        ]
        return np.concatenate(list(clients.map(lambda part: _request(to, part), parts)))

    return encode


def _model_folder(job: dict[str, Any], folder: Path) -> Path:
    """The checkpoint with the token limit that all have; with its ONNX graph, where that is made.

    Infinity has no option for the limit: one engine reads it in the one file, one in the other.
    """
    made, checkpoint, exported = folder / "model", Path(job["checkpoint"]), folder / "exported"
    made.mkdir()
    for path in checkpoint.iterdir():
        (made / path.name).symlink_to(path)
    limits = {"sentence_bert_config.json": "max_seq_length"}
    if exported.is_dir():
        (exported / "model.onnx").rename(made / "model.onnx")
        limits["config.json"] = "max_position_embeddings"
    for name, key in limits.items():
        path = made / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.unlink(missing_ok=True)
        path.write_text(json.dumps({**config, key: job["max_length"]}), encoding="utf-8")
    return made


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """Where the server listens, when it says so.

    Raises:
        RuntimeError: It ended, or says nothing; the message is the last line that it logged.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8"))
        if found:
            return int(found[1])
        time.sleep(0.1)
    lines = log.read_text(encoding="utf-8").split("\n")
    raise RuntimeError(next((line for line in reversed(lines) if line.strip()), "no answer"))


def _request(port: int, texts: list[str]) -> Any:
    """Embeddings of some texts, float32 [num_texts, dim]."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_REQUEST_TIMEOUT_S)
    asked = {"model": "model", "input": texts, "encoding_format": "base64"}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/embeddings", json.dumps(asked), headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status != http.client.OK:
        raise RuntimeError(f"the server answered {answer.status}: {body[:200]!r}")
    rows = [base64.b64decode(row["embedding"]) for row in json.loads(body)["data"]]
    return np.frombuffer(b"".join(rows), np.float32).reshape(len(texts), -1)
