"""Checkpoints with heads 64 wide and positions beyond 512, made of numbers that need no file.

The weights come from a generator with a fixed seed. tests/golden/wide.json has each checkpoint's
config and the shapes of its tensors; scripts/make_golden_wide writes it, and uses this module.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent
MAX_LENGTH = 520
LENGTHS = (1, 17, 255, 300, 511, 519)


def write_checkpoint(family: str, about: dict[str, Any], folder: Path) -> Path:
    """Write the checkpoint of a family; `about` has its `config` and its `tensors`' shapes."""
    shutil.copytree(GOLDEN / "families" / family, folder)
    (folder / "config.json").write_text(json.dumps(about["config"]))
    for name in ("sentence_bert_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            fields = json.loads(path.read_text())
            key = "max_seq_length" if name.startswith("sentence") else "model_max_length"
            path.write_text(json.dumps({**fields, key: MAX_LENGTH}))
    pooling = folder / "1_Pooling" / "config.json"
    fields = json.loads(pooling.read_text())
    pooling.write_text(json.dumps({**fields, "embedding_dimension": about["dim"]}))
    # Only Transformer, Pooling and Normalize: these tests are about what is before them.
    listed = json.loads((folder / "modules.json").read_text())
    kept = [one for one in listed if one["type"].rpartition(".")[2] != "Dense"]
    if not any(one["type"].endswith("Normalize") for one in kept):
        kind = "sentence_transformers.models.Normalize"
        kept.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": kind})
    (folder / "modules.json").write_text(json.dumps(kept))
    _write_tensors(folder / "model.safetensors", about["tensors"])
    return folder


def rows(vocab_size: int) -> list[list[int]]:
    """Token ids of each row: a few kinds of length, in an order that is not sorted."""
    generator = np.random.default_rng(17)
    made = [generator.integers(5, vocab_size, length).tolist() for length in LENGTHS]
    return [made[index] for index in (3, 0, 5, 2, 1, 4)]


def _write_tensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, shape in shapes.items():
        array = _values(name, shape).astype(np.float16).tobytes()
        places = [len(data), len(data) + len(array)]
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": places}
        data += array
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _values(name: str, shape: list[int]) -> Any:
    # The same numbers on every machine: no transcendental function makes them.
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    between = 2 * generator.random(shape) - 1  # variance 1/3
    if "attention_bias" in name:
        return 4 * between
    if len(shape) == 1:
        return (0.2 * between + 1) if "orm" in name and "bias" not in name else 0.2 * between
    if "embed" in name:
        return 0.5 * between
    return between * 2.5 / np.sqrt(shape[1])
