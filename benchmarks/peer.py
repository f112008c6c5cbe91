"""sentence-transformers, measured: a process of its own, in whatever environment has PyTorch.

    PYTHON benchmarks/peer.py JOB

Imports nothing of Fletcher. The job (JSON) has `checkpoint`, `max_length`, `precision`, `threads`,
`texts` (a JSON file), `batch_size` (null: try `batch_sizes` on a part), `embeddings` (a .npy file
to write) and `result`.
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
NUM_BLOCKS = 4
TUNING_PASSES = 2


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
    batch_size = job["batch_size"]
    tried: dict[int, float] = {}
    if batch_size is None:
        blocks = tuning_blocks(texts, max(job["batch_sizes"]))
        num_texts = sum(map(len, blocks))
        for _ in range(TUNING_PASSES):
            for size in job["batch_sizes"]:
                seconds = sum(timed(block, size)[0] for block in blocks)
                tried[size] = max(tried.get(size, 0.0), num_texts / seconds)
        batch_size = max(tried, key=lambda size: tried[size])
    seconds, embeddings = timed(texts, batch_size)
    np.save(job["embeddings"], embeddings.float().numpy())
    return {"seconds": seconds, "batch_size": batch_size, "tuning": tried}


def tuning_blocks(texts: list[str], block_size: int) -> list[list[str]]:
    """Neighbours by length: `encode` sorts, so a batch of all texts is as even as these are."""
    ordered = sorted(texts, key=len)
    last = max(0, len(ordered) - block_size)
    starts = [last * place // (2 * NUM_BLOCKS) for place in range(1, 2 * NUM_BLOCKS, 2)]
    return [ordered[start : start + block_size] for start in starts]


if __name__ == "__main__":
    main()
