from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[2] / "golden"

EditCheckpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> EditCheckpoint:
    """A copy of the tiny checkpoint, `edits` merged into its JSON files (`__` stands for `/`)."""

    def copy(**edits: dict[str, Any]) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDEN / "tiny", folder)
        for name, fields in edits.items():
            path = folder / f"{name.replace('__', '/')}.json"
            present = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**present, **fields}))
        return folder

    return copy
