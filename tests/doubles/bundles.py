"""Copies of a bundle with other hashes and, by the null backend, other vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec

from fletcher.models.bundle.bundle import ModelBundle, write_manifest
from fletcher.models.bundle.spec import MANIFEST, ModelSpec


def another(bundle: ModelBundle, folder: Path, name: str, weights: str) -> ModelBundle:
    """A copy in `folder`, under another or the same name, that claims other weights."""
    shutil.copytree(bundle.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    for field in ("format", "name", "hash", "files"):
        del manifest[field]
    spec = msgspec.convert({**manifest, "weights_sha256": weights}, ModelSpec)
    write_manifest(folder, name, spec)
    return ModelBundle.from_folder(folder)
