"""What was measured, kept in FLETCHER_HOME/tune, and whether it still holds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fletcher.config.engine import EngineConfig
from fletcher.errors import ConfigError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.spec import MANIFEST
from fletcher.tuning.candidates import BACKENDS, PRECISIONS, TuningCandidate

log = logging.getLogger(__name__)

FORMAT = 1
_ENGINES = ("onnxruntime", "onnxruntime-gpu", "openvino")
_DEVICE = re.compile(r"cpu|cuda:\d+")
# The fields of a replica that are kept, and their types.
_KINDS = {
    name: type(value)
    for name, value in dataclasses.asdict(BackendConfig("", "", "")).items()
    if name not in ("bundle", "max_batch_tokens")
}


@dataclass(frozen=True, slots=True)
class Record:
    """The winner of a race.

    Attributes:
        candidate: It, for the bundle's folder as it is now.
        measured_at: When, ISO 8601, UTC.
        texts_per_s: Its median turn.
    """

    candidate: TuningCandidate
    measured_at: str
    texts_per_s: float


@dataclass(frozen=True, slots=True)
class Key:
    """What a measurement is good for.

    Another host or question has a file of its own; what `holds` says must be true still.

    Attributes:
        host: The processor, its cores and instructions, the devices.
        asked: What the options fix.
        holds: Versions of Fletcher and the engines, and the checksum of the bundle's manifest,
            which has those of all its files.
    """

    host: Mapping[str, Any]
    asked: Mapping[str, Any]
    holds: Mapping[str, str]

    @classmethod
    def of(cls, asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> Key:
        """The key of a question that is asked on a host of a model."""
        versions = {"fletcher": "longbow-fletcher", **{name: name for name in _ENGINES}}
        return cls(
            host={
                "cpu": host.cpu,
                "cores": host.cores,
                "isa": sorted(host.isa),
                "numa_nodes": host.num_numa_nodes,
                "cuda_devices": host.num_cuda_devices,
                "cuda_names": _cuda_names(Path("/")),
            },
            asked=dataclasses.asdict(asked),
            holds={
                "model": hashlib.sha256((bundle.folder / MANIFEST).read_bytes()).hexdigest(),
                **{name: _version(package) for name, package in versions.items()},
            },
        )

    def path(self, home: Path, bundle: ModelBundle) -> Path:
        """Where the measurement of a model is kept; that of a kept version beside the others."""
        question = json.dumps([self.host, self.asked], sort_keys=True)
        digest = hashlib.sha256(question.encode()).hexdigest()[:12]
        return home / "tune" / f"{bundle.folder.name}-{digest}.json"


def load(home: Path, key: Key, bundle: ModelBundle) -> Record | None:
    """What was measured, if it was and still holds; otherwise the log has a line that says why."""
    path = key.path(home, bundle)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        stale = _changed(content["holds"], key.holds)
        record = _read(content, bundle.folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "%s cannot be used (%s): `fletcher tune` writes it anew", path, type(error).__name__
        )
        return None
    if stale:
        log.warning("%s is out of date (%s): `fletcher tune` measures again", path, stale)
        return None
    return record


def save(home: Path, key: Key, bundle: ModelBundle, record: Record) -> Path:
    """Writes what was measured, whole or not at all.

    Raises:
        ConfigError: The folder cannot be written.
    """
    path = key.path(home, bundle)
    content = {
        "format": FORMAT,
        **dataclasses.asdict(key),
        "measured_at": record.measured_at,
        "texts_per_s": record.texts_per_s,
        "max_batch_tokens": record.candidate.max_batch_tokens,
        "replicas": [
            {name: getattr(one, name) for name in _KINDS} for one in record.candidate.configs
        ],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, staged = tempfile.mkstemp(prefix=f".{path.name}~", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(descriptor)
                os.fchmod(descriptor, 0o644)  # mkstemp's files are for their owner alone
            Path(staged).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(staged).unlink()
            raise
    except OSError as error:
        raise ConfigError(
            f"`home`: {path.parent} cannot be written: {error.strerror}; give another with --home "
            "or FLETCHER_HOME",
            field="home",
        ) from None
    return path


def _read(content: Mapping[str, Any], bundle_folder: Path) -> Record:
    """Raises KeyError, TypeError or ValueError for what `save` did not write."""
    tokens = content["max_batch_tokens"]
    if type(tokens) is not int or tokens < 1 or not content["replicas"]:
        raise ValueError(content)
    configs = tuple(_replica(one, bundle_folder, tokens) for one in content["replicas"])
    return Record(
        TuningCandidate(configs), str(content["measured_at"]), float(content["texts_per_s"])
    )


def _replica(fields: Mapping[str, Any], bundle_folder: Path, tokens: int) -> BackendConfig:
    if {name: type(value) for name, value in fields.items()} != _KINDS:
        raise TypeError(fields)
    config = BackendConfig(bundle=str(bundle_folder), max_batch_tokens=tokens, **fields)
    # A backend names a module to import.
    known = config.backend in BACKENDS and config.precision in PRECISIONS
    if not known or not _DEVICE.fullmatch(config.device) or config.threads < 0:
        raise ValueError(fields)
    return config


def _changed(then: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """What is not as it was, in words; empty where nothing is."""
    words = []
    for name, value in now.items():
        if then.get(name) != value:
            # Checksums say nothing to people.
            versions = f" {then.get(name) or 'none'} then, {value or 'none'} now"
            words.append(f"another {name}" if name == "model" else name + versions)
    return ", ".join(words)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cuda_names(root: Path) -> list[str]:
    """What the driver calls its devices, without loading CUDA."""
    names = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name == "Model":
                    names.append(value.strip())
    return names
