"""A peer, measured: a process of its own, in whatever environment has it.

    PYTHON benchmarks/peer.py JOB

Imports nothing of Fletcher. The job (JSON) has `kind` (a key of LOADERS), `max_length`, `threads`,
`texts` (a JSON file), `batch_size` (null: try `batch_sizes` on a part), `embeddings` (a .npy file
to write) and `result`; for sentence-transformers `checkpoint` and `precision`, for fastembed
`bundle`, `graph`, `dim` and `pad_token_id`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP_TEXTS = 32
NUM_BLOCKS = 4
TUNING_PASSES = 2
PACKAGES = ("sentence-transformers", "torch", "fastembed", "onnxruntime", "openvino")

# From texts and a batch size to their embeddings, [num_texts, dim].
Encode = Callable[[list[str], int], Any]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = {**measure(job), "versions": versions()}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def versions() -> dict[str, str]:
    """Of what this environment has of PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        encode = LOADERS[job["kind"]](job, Path(scratch))

    def timed(some: list[str], batch_size: int) -> tuple[float, Any]:
        started = time.perf_counter()
        embeddings = encode(some, batch_size)
        return time.perf_counter() - started, embeddings

    encode(texts[:WARM_UP_TEXTS], WARM_UP_TEXTS)
    batch_size = job["batch_size"]
    tried: dict[int, float] = {}
    if batch_size is None:
        # fastembed takes texts as they come, the others sort them by length.
        ordered = texts if job["kind"] == "fastembed" else sorted(texts, key=len)
        blocks = tuning_blocks(ordered, max(job["batch_sizes"]))
        num_texts = sum(map(len, blocks))
        for _ in range(TUNING_PASSES):
            for size in job["batch_sizes"]:
                seconds = sum(timed(block, size)[0] for block in blocks)
                tried[size] = max(tried.get(size, 0.0), num_texts / seconds)
        batch_size = max(tried, key=lambda size: tried[size])
    seconds, embeddings = timed(texts, batch_size)
    np.save(job["embeddings"], np.asarray(embeddings, dtype=np.float32))
    return {"seconds": seconds, "batch_size": batch_size, "tuning": tried}


def tuning_blocks(ordered: list[str], block_size: int) -> list[list[str]]:
    """Neighbours in the order in which they are embedded, from all over it."""
    last = max(0, len(ordered) - block_size)
    starts = [last * place // (2 * NUM_BLOCKS) for place in range(1, 2 * NUM_BLOCKS, 2)]
    return [ordered[start : start + block_size] for start in starts]


def _sentence_transformers(job: dict[str, Any], backend: str, **model_kwargs: Any) -> Any:
    import sentence_transformers
    import torch

    torch.set_num_threads(job["threads"])
    model = sentence_transformers.SentenceTransformer(
        job["checkpoint"],
        device="cpu",
        local_files_only=True,
        backend=backend,
        model_kwargs=model_kwargs,
    )
    model.max_seq_length = job["max_length"]
    return model


def _encode_with(model: Any) -> Encode:
    def encode(some: list[str], batch_size: int) -> Any:
        embeddings = model.encode(
            some, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return embeddings.float().numpy()

    return encode


def _torch(job: dict[str, Any], _: Path) -> Encode:
    import torch

    model = _sentence_transformers(job, "torch")
    model.to(getattr(torch, job["precision"]))
    return _encode_with(model)


def _onnx(job: dict[str, Any], _: Path) -> Encode:
    """With the graph that Optimum exports."""
    return _encode_with(_sentence_transformers(job, "onnx", provider="CPUExecutionProvider"))


def _openvino(job: dict[str, Any], _: Path) -> Encode:
    """With the graph that Optimum exports, in the precision that OpenVINO chooses."""
    return _encode_with(_sentence_transformers(job, "openvino"))


def _fastembed(job: dict[str, Any], folder: Path) -> Encode:
    """fastembed with Fletcher's own graph, which pools and normalises."""
    import tokenizers
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    model_folder = folder / "model"
    # A copy: ONNX Runtime takes no weights through links that lead out of the folder.
    shutil.copytree(job["bundle"], model_folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    pad_token = tokenizer.id_to_token(job["pad_token_id"])
    config = {"model_max_length": job["max_length"], "pad_token": pad_token}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    TextEmbedding.add_custom_model(
        model="fletcher/bundle",
        pooling=PoolingType.DISABLED,
        normalization=False,
        sources=ModelSource(hf="fletcher/bundle"),
        dim=job["dim"],
        model_file=job["graph"],
    )
    model = TextEmbedding(
        "fletcher/bundle",
        threads=job["threads"],
        providers=["CPUExecutionProvider"],
        specific_model_path=str(model_folder),
    )
    return lambda some, batch_size: np.stack(list(model.embed(some, batch_size=batch_size)))


LOADERS: dict[str, Callable[[dict[str, Any], Path], Encode]] = {
    "torch": _torch,
    "onnx": _onnx,
    "openvino": _openvino,
    "fastembed": _fastembed,
}

if __name__ == "__main__":
    main()
