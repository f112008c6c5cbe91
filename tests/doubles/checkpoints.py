"""Copies of tiny checkpoints in which one token makes the model fail or overflow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers

GOLDEN = Path(__file__).parents[1] / "golden"
POISON = "z"


def poisoned(checkpoint: str, folder: Path, value: float = 3e38) -> Path:
    """Copies a checkpoint; texts with the word `z` have vectors that are not finite."""
    copy = folder / checkpoint.replace("/", "-")
    shutil.copytree(GOLDEN / checkpoint, copy)
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    (token,) = tokenizer.encode(POISON, add_special_tokens=False).ids
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:begin])
    (words,) = (one for name, one in tensors.items() if name.endswith("word_embeddings.weight"))
    dtype = {"F32": np.float32, "F16": np.float16}[words["dtype"]]
    row = np.full(words["shape"][1], value, dtype).tobytes()
    place = begin + words["data_offsets"][0] + token * len(row)
    data[place : place + len(row)] = row
    path.write_bytes(data)
    return copy
