"""Models from a Hugging Face or sentence-transformers folder on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import TOKENIZER
from fletcher.models.bundle.spec import ModelSpec
from fletcher.models.checkpoint.checkpoint import Checkpoint
from fletcher.models.onnx.writer import write_model

Progress = Callable[[str], None]
# Function that writes a bundle's files into a folder, with exits after the given layers.
Build = Callable[[Path, Sequence[int], Progress], ModelSpec]


def build_from_folder(
    folder: Path, source: str, staging: Path, exits: Sequence[int], progress: Progress
) -> ModelSpec:
    """Write a bundle's files into `staging`, made from the checkpoint in `folder`.

    Raises:
        ModelError: The folder holds no checkpoint, or the model's family is not supported.
    """
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ModelError(
            f"{folder.name} has neither config.json nor modules.json, expected a Hugging Face "
            "checkpoint"
        )
    checkpoint = Checkpoint.from_folder(folder)
    progress("writing the graph")
    checkpoint.tokenizer.add_markers(checkpoint.kind.markers)
    checkpoint.tokenizer.write(staging / TOKENIZER)
    return write_model(checkpoint, staging, source=source, exits=exits)
