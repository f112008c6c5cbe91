"""sentence-transformers, measured: a process of its own, in whatever environment has PyTorch.

    PYTHON benchmarks/peer.py JOB

Imports nothing of Fletcher. The job (JSON) has `checkpoint`, `max_length`, `precision`, `device`
(`cpu` where absent), `threads`, `texts` (a JSON file), `batch_size` (null: try `batch_sizes` on a
part), `embeddings` (a .npy file to write) and `result`. Without sentence-transformers, transformers
itself does the same: sorted by length, attention by PyTorch (SDPA), pooled as the checkpoint says.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import sentence_transformers
except ImportError:
    sentence_transformers = None

WARM_UP_TEXTS = 32
NUM_BLOCKS = 4
TUNING_PASSES = 2

Encode = Callable[[list[str], int], Any]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    versions = {"torch": torch.__version__}
    if sentence_transformers is not None:
        versions = {"sentence-transformers": sentence_transformers.__version__, **versions}
    answer = {**measure(job), "versions": versions}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    device = job.get("device", "cpu")
    encode = plain(job, device) if sentence_transformers is None else sentence(job, device)

    def timed(some: list[str], batch_size: int) -> tuple[float, Any]:
        started = time.perf_counter()
        embeddings = encode(some, batch_size)
        if device != "cpu":
            torch.cuda.synchronize()
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
    np.save(job["embeddings"], embeddings.float().cpu().numpy())
    return {"seconds": seconds, "batch_size": batch_size, "tuning": tried}


def sentence(job: dict[str, Any], device: str) -> Encode:
    model = sentence_transformers.SentenceTransformer(
        job["checkpoint"], device=device, local_files_only=True
    )
    model.max_seq_length = job["max_length"]
    model.to(getattr(torch, job["precision"]))

    def encode(some: list[str], batch_size: int) -> Any:
        return model.encode(
            some, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )

    return encode


def plain(job: dict[str, Any], device: str) -> Encode:
    import transformers

    folder = Path(job["checkpoint"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    model.to(device, getattr(torch, job["precision"]))
    pooling = folder / "1_Pooling" / "config.json"
    first = pooling.is_file() and '"pooling_mode_cls_token": true' in pooling.read_text()

    @torch.inference_mode()
    def encode(some: list[str], batch_size: int) -> Any:
        order = sorted(range(len(some)), key=lambda place: -len(some[place]))
        parts = []
        for start in range(0, len(order), batch_size):
            inputs = tokenizer(
                [some[place] for place in order[start : start + batch_size]],
                padding=True,
                truncation=True,
                max_length=job["max_length"],
                return_tensors="pt",
            ).to(device)
            states = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][:, :, None].to(states.dtype)
            pooled = states[:, 0] if first else (states * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(pooled.float(), dim=1))
        embeddings = torch.cat(parts)
        return embeddings[torch.tensor(order).argsort().to(embeddings.device)]

    return encode


def tuning_blocks(texts: list[str], block_size: int) -> list[list[str]]:
    """Neighbours by length: `encode` sorts, so a batch of all texts is as even as these are."""
    ordered = sorted(texts, key=len)
    last = max(0, len(ordered) - block_size)
    starts = [last * place // (2 * NUM_BLOCKS) for place in range(1, 2 * NUM_BLOCKS, 2)]
    return [ordered[start : start + block_size] for start in starts]


if __name__ == "__main__":
    main()
