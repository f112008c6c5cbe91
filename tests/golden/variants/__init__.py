"""Checkpoints that differ from those of tests/golden/families in one setting each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

FOLDER = Path(__file__).parent
VARIANTS: dict[str, dict[str, Any]] = json.loads((FOLDER / "variants.json").read_text())
TEXTS = [
    "",
    "a Board Game between TWO players, with a graphical interface",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e words [MASK] and 12,345 numbers!",
    "toolbox programs " * 30,
]
_MODULES = "sentence_transformers.models."


def make_variant(name: str, work: Path) -> Path:
    """Write a variant's checkpoint into a new folder in `work`."""
    edits = dict(VARIANTS[name])
    folder = work / "variant"
    shutil.copytree(FOLDER.parent / "families" / edits.pop("base", "distilbert"), folder)
    modules = edits.pop("modules", None)
    if modules:
        _write_modules(folder, modules)
    for file, fields in edits.items():
        path = folder / f"{file}.json"
        if fields is None:
            path.unlink()
            continue
        present = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**present, **fields}))
    return folder


def _write_modules(folder: Path, names: list[str]) -> None:
    places = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    listed = []
    for index, name in enumerate(names):
        place = places.get(name, f"{index}_{name}")
        (folder / place).mkdir(exist_ok=True)
        if name == "Dropout":
            (folder / place / "config.json").write_text('{"dropout": 0.5}')
        if name == "StaticEmbedding":
            tensors = safetensors.numpy.load_file(folder / "model.safetensors")
            table = next(
                one for key, one in tensors.items() if key.endswith("word_embeddings.weight")
            )
            table = {"embedding.weight": table.astype(np.float32)}
            safetensors.numpy.save_file(table, folder / place / "model.safetensors")
            (folder / "tokenizer.json").rename(folder / place / "tokenizer.json")
        listed.append(
            {"idx": index, "name": str(index), "path": place, "type": f"{_MODULES}{name}"}
        )
    (folder / "modules.json").write_text(json.dumps(listed))
