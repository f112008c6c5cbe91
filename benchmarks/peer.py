"""sentence-transformers, measured: a process of its own, in whatever environment has PyTorch.

    PYTHON benchmarks/peer.py JOB

Imports nothing of Fletcher. The job (JSON) has `checkpoint`, `precision`, `threads`, `texts` (a
JSON file), `batch_size` (null: try `batch_sizes` on the first `tuning_texts`), `embeddings` (a .npy
file to write) and `result`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch

WARM_UP_TEXTS = 32


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    versions = {
        "sentence-transformers": sentence_transformers.__version__,
        "torch": torch.__version__,
    }
    answer = {**measure(job), "versions": versions}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    model = sentence_transformers.SentenceTransformer(
        job["checkpoint"], device="cpu", local_files_only=True
    )
    model.max_seq_length = job["max_length"]
    model.to(getattr(torch, job["precision"]))

    def encode(some: list[str], batch_size: int) -> Any:
        return model.encode(
            some, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )

    def timed(some: list[str], batch_size: int) -> tuple[float, Any]:
        started = time.perf_counter()
        embeddings = encode(some, batch_size)
        return time.perf_counter() - started, embeddings

    encode(texts[:WARM_UP_TEXTS], WARM_UP_TEXTS)
    batch_size, tried = job["batch_size"], {}
    if batch_size is None:
        few = texts[: job["tuning_texts"]]
        tried = {size: len(few) / timed(few, size)[0] for size in job["batch_sizes"]}
        batch_size = max(tried, key=lambda size: tried[size])
    seconds, embeddings = timed(texts, batch_size)
    np.save(job["embeddings"], embeddings.float().numpy())
    return {"seconds": seconds, "batch_size": batch_size, "tuning": tried}


if __name__ == "__main__":
    main()
