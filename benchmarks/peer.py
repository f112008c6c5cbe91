"""One peer, measured in a separate process, in any environment that has it.

    PYTHON benchmarks/peer.py JOB

Imports nothing of Fletcher. The job (JSON) has `kind` (a key of LOADERS), `max_length`, `threads`,
`texts` (a JSON file), `batch_size` (null: try `batch_sizes` on a part), `embeddings` (a .npy file
to write) and `result`; for sentence-transformers, transformers and Infinity `checkpoint`,
`precision` and `device` (`cpu` if absent), for Infinity `pooling` as well, for fastembed
`bundle`, `graph`, `dim` and `pad_token_id`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its own folder is on the path, not the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks import infinity
from benchmarks.infinity import Encode

WARM_UP_TEXTS = 32
NUM_BLOCKS = 4
TUNING_PASSES = 2
_PYTORCH = ("sentence-transformers", "transformers", "torch")
PACKAGES = (*_PYTORCH, "infinity-emb", "fastembed", "optimum", "onnxruntime", "openvino")
# These sort all texts themselves; the others see only the next batch, or a window.
_SORTING = ("torch", "transformers", "onnx", "openvino")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = {**measure(job), "versions": versions()}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of those PACKAGES that this environment has."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="fletcher-bench-"))
        return _measure(job, texts, LOADERS[job["kind"]](job, Path(scratch), stack))


def _measure(job: dict[str, Any], texts: list[str], encode: Encode) -> dict[str, Any]:
    def timed(some: list[str], batch_size: int) -> tuple[float, Any]:
        started = time.perf_counter()
        embeddings = encode(some, batch_size)
        return time.perf_counter() - started, embeddings

    batch_size = job["batch_size"]
    for size in [batch_size] if batch_size else job["batch_sizes"]:
        encode(texts[:WARM_UP_TEXTS], size)
    tried: dict[int, float] = {}
    if batch_size is None:
        block_size = max(job["batch_sizes"])
        blocks = [texts[: NUM_BLOCKS * block_size]]
        if job["kind"] in _SORTING:
            blocks = tuning_blocks(sorted(texts, key=len), block_size)
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
    """Blocks of neighbours, in the order in which texts are embedded, from all over it."""
    last = max(0, len(ordered) - block_size)
    starts = [last * place // (2 * NUM_BLOCKS) for place in range(1, 2 * NUM_BLOCKS, 2)]
    return [ordered[start : start + block_size] for start in starts]


def _sentence_transformers(job: dict[str, Any], backend: str, **model_kwargs: Any) -> Any:
    import sentence_transformers
    import torch

    torch.set_num_threads(job["threads"])
    model = sentence_transformers.SentenceTransformer(
        job["checkpoint"],
        device=_device(job),
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
        return embeddings.float().cpu().numpy()  # waits for a GPU as well

    return encode


def _device(job: dict[str, Any]) -> str:
    return str(job.get("device", "cpu"))


def _torch(job: dict[str, Any], *_: object) -> Encode:
    import torch

    model = _sentence_transformers(job, "torch")
    model.to(getattr(torch, job["precision"]))
    return _encode_with(model)


def _transformers(job: dict[str, Any], *_: object) -> Encode:
    """Embeds as sentence-transformers does, without it: sorted by length, PyTorch's attention."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    folder, device = Path(job["checkpoint"]), _device(job)
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
        return embeddings[torch.tensor(order).argsort().to(embeddings.device)].cpu().numpy()

    return encode


def _onnx(job: dict[str, Any], *_: object) -> Encode:
    """sentence-transformers on Optimum's ONNX graph."""
    return _encode_with(_sentence_transformers(job, "onnx", provider="CPUExecutionProvider"))


def _openvino(job: dict[str, Any], *_: object) -> Encode:
    """sentence-transformers on Optimum's graph, in the precision that OpenVINO chooses."""
    return _encode_with(_sentence_transformers(job, "openvino"))


def _fastembed(job: dict[str, Any], folder: Path, _: ExitStack) -> Encode:
    """fastembed with Fletcher's own graph, which pools and normalises."""
    import tokenizers
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    model_folder = folder / "model"
    # A copy: ONNX Runtime follows no links that lead out of the folder.
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


LOADERS: dict[str, Callable[[dict[str, Any], Path, ExitStack], Encode]] = {
    "torch": _torch,
    "transformers": _transformers,
    "onnx": _onnx,
    "openvino": _openvino,
    "fastembed": _fastembed,
    "infinity": infinity.torch_engine,
    "infinity-onnx": infinity.onnx_engine,
    "infinity-server": infinity.server,
}

if __name__ == "__main__":
    main()
