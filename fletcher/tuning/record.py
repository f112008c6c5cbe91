"""Tune records in FLETCHER_HOME/tune, and the conditions for their validity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fletcher.config.engine import EngineConfig
from fletcher.errors import ConfigError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.host import HostInfo, cuda_names, installed_version
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.spec import MANIFEST, Natural, Positive
from fletcher.tuning.candidates import TunedBackend, TunedPrecision, TuningCandidate
from fletcher.util.durable import write_atomically

log = logging.getLogger(__name__)

FORMAT: Literal[1] = 1
_ENGINES = ("onnxruntime", "onnxruntime-gpu", "openvino")


@dataclass(frozen=True, slots=True)
class Record:
    """Result of a tuning: the fastest candidate.

    Attributes:
        candidate: The replicas to run. Their configurations have the bundle's current folder.
        measured_at: Time of the tuning, ISO 8601, UTC.
        texts_per_s: Median of the candidate's speed in all rounds, in texts per second.
    """

    candidate: TuningCandidate
    measured_at: str
    texts_per_s: float


class _Replica(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A BackendConfig in a record's file, limited to values that candidates can have.

    The limits are needed for safety, because `backend` names a module to import.
    """

    backend: TunedBackend
    device: Annotated[str, Meta(pattern=r"^(cpu|cuda:\d+)$")]
    precision: TunedPrecision
    threads: Natural
    gpu_memory: Natural
    version: str
    dim: Natural
    cuda_graphs: bool
    late: bool


class _File(msgspec.Struct, frozen=True):
    """Content of a record's file."""

    format: Literal[1]
    host: dict[str, Any]
    asked: dict[str, Any]
    holds: dict[str, str]
    measured_at: str
    texts_per_s: float
    max_batch_tokens: Positive
    replicas: Annotated[list[_Replica], Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class Key:
    """Conditions of a measurement.

    Each combination of `host` and `asked` has its own file. A record is valid only as long as the
    values in `holds` are unchanged.

    Attributes:
        host: The processor with its cores and instructions, the memory nodes and the devices.
        asked: The options, including those that are left open.
        holds: Versions of Fletcher and the engines, and the checksum of the bundle's manifest. The
            manifest has the checksums of the bundle's files.
    """

    host: Mapping[str, Any]
    asked: Mapping[str, Any]
    holds: Mapping[str, str]

    @classmethod
    def for_question(cls, asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> Key:
        """Key for the options `asked`, a host and a model."""
        versions = {"fletcher": "longbow-fletcher", **{name: name for name in _ENGINES}}
        return cls(
            host={
                "cpu": host.cpu,
                "cores": host.cores,
                "isa": sorted(host.isa),
                "numa_nodes": host.num_numa_nodes,
                "cuda_devices": host.num_cuda_devices,
                "cuda_names": cuda_names(),
            },
            asked=dataclasses.asdict(asked),
            holds={
                "model": hashlib.sha256((bundle.folder / MANIFEST).read_bytes()).hexdigest(),
                **{name: installed_version(package) for name, package in versions.items()},
            },
        )

    def path(self, home: Path, bundle: ModelBundle) -> Path:
        """Path of the record's file. Each version of a model has its own file."""
        question = json.dumps([self.host, self.asked], sort_keys=True)
        digest = hashlib.sha256(question.encode()).hexdigest()[:12]
        return home / "tune" / f"{bundle.folder.name}-{digest}.json"


def load(home: Path, key: Key, bundle: ModelBundle) -> Record | None:
    """Read the record of a key; None if there is no valid record.

    A damaged or outdated record is reported in the log.
    """
    path = key.path(home, bundle)
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be used (%s): `fletcher tune` writes it anew", path, error)
        return None
    if stale := _changes(content.holds, key.holds):
        log.warning("%s is out of date (%s): `fletcher tune` measures again", path, stale)
        return None
    configs = (
        BackendConfig(
            bundle=str(bundle.folder),
            max_batch_tokens=content.max_batch_tokens,
            **msgspec.structs.asdict(one),
        )
        for one in content.replicas
    )
    return Record(TuningCandidate(tuple(configs)), content.measured_at, content.texts_per_s)


def save(home: Path, key: Key, bundle: ModelBundle, record: Record) -> Path:
    """Write a record atomically; return the path of its file.

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
            {name: getattr(one, name) for name in _Replica.__struct_fields__}
            for one in record.candidate.configs
        ],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text, unique=True)
    except OSError as error:
        raise ConfigError(
            f"`home`: {path.parent} cannot be written: {error.strerror}; give another with --home "
            "or FLETCHER_HOME",
            field="home",
        ) from None
    return path


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Differences between two versions of `holds` in words; empty if there are none."""
    words = []
    for name, value in now.items():
        if then.get(name) != value:
            # A model's checksums would tell a reader nothing.
            versions = f" {then.get(name) or 'none'} then, {value or 'none'} now"
            words.append(f"another {name}" if name == "model" else name + versions)
    return ", ".join(words)
