"""A Hugging Face or sentence-transformers folder on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fletcher.errors import ModelError
from fletcher.models.bert import write_bert
from fletcher.models.bundle import TOKENIZER, ModelSpec
from fletcher.models.checkpoint import Checkpoint

Progress = Callable[[str], None]


class GraphWriter(Protocol):
    """Writes a family's graph into a folder and says what it wrote."""

    def __call__(self, checkpoint: Checkpoint, folder: Path, *, source: str) -> ModelSpec: ...


WRITERS: dict[str, GraphWriter] = {"bert": write_bert}  # by `model_type` of config.json


def build_from_folder(folder: Path, staging: Path, *, source: str, progress: Progress) -> ModelSpec:
    """Writes a bundle's files for a checkpoint folder into `staging`.

    Raises:
        ModelError: The folder is no checkpoint, or its family is not supported.
    """
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ModelError(
            f"`{folder.name}` holds neither config.json nor modules.json: it is no Hugging Face "
            "checkpoint"
        )
    checkpoint = Checkpoint.read(folder)
    family = checkpoint.config.get("model_type")
    writer = WRITERS.get(str(family))
    if writer is None:
        raise ModelError(
            f"config.json: `model_type` is {family!r}, graphs are written for "
            f"{', '.join(sorted(WRITERS))}; export the model to ONNX and add that file instead",
            field="model_type",
            allowed=sorted(WRITERS),
        )
    progress(f"writing the {family} graph")
    shutil.copyfile(checkpoint.tokenizer, staging / TOKENIZER)
    return writer(checkpoint, staging, source=source)
