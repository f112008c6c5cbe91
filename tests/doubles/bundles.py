"""Bundles told apart: copies of one, with other hashes and, by the null backend, vectors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from fletcher.models.bundle.bundle import ModelBundle, write_manifest
from fletcher.models.bundle.spec import MANIFEST, ModelSpec


def another(bundle: ModelBundle, folder: Path, name: str, weights: str) -> ModelBundle:
    """A copy in `folder` under another name, or the same, that says it has other weights."""
    shutil.copytree(bundle.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    for field in ("format", "name", "hash", "files"):
        del manifest[field]
    write_manifest(folder, name, replace(ModelSpec.parse(manifest), weights_sha256=weights))
    return ModelBundle.load(folder)
