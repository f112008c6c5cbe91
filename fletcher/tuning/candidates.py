"""What could run a model on a host: the few arrangements that are worth measuring."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fletcher.config.engine import EngineConfig
from fletcher.errors import BackendError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import HostInfo, Resolution, resolve

# What `auto` may become. An arithmetic in which a row's vector depends on the rows beside it, such
# as int8 with ranges taken at run time, is for those who name it.
BACKENDS = ("openvino", "onnxruntime")
PRECISIONS = ("bfloat16", "float16", "float32")


def resolve_by_rule(asked: EngineConfig, host: HostInfo, bundle_folder: Path) -> Resolution:
    """The replicas that the rules make of the options. Raises as `inference.devices.resolve`."""
    return resolve(host=host, bundle_folder=bundle_folder, **dataclasses.asdict(asked))


@dataclass(frozen=True, slots=True)
class TuningCandidate:
    """One way to run a model.

    Attributes:
        configs: One for each replica; all have the same `max_batch_tokens`.
    """

    configs: tuple[BackendConfig, ...]

    @property
    def max_batch_tokens(self) -> int:
        """Padded tokens in one run at most."""
        return self.configs[0].max_batch_tokens

    @property
    def processes(self) -> tuple[BackendConfig, ...]:
        """The replicas alone: candidates that share them differ in their `max_batch_tokens`."""
        return tuple(dataclasses.replace(one, max_batch_tokens=0) for one in self.configs)

    def with_tokens(self, max_batch_tokens: int) -> TuningCandidate:
        """The same replicas with another `max_batch_tokens`."""
        configs = (
            dataclasses.replace(one, max_batch_tokens=max_batch_tokens) for one in self.configs
        )
        return TuningCandidate(tuple(configs))

    @property
    def engine(self) -> str:
        """Backend and precision."""
        return f"{self.configs[0].backend} {self.configs[0].precision}"

    @property
    def replicas(self) -> str:
        """The processes, in words: `cpu: 8+8 cores`, `cuda:0, cuda:1`."""
        cores = [str(one.threads) for one in self.configs if one.device == "cpu"]
        if cores:
            return f"cpu: {'+'.join(cores)} core{'s' if cores != ['1'] else ''}"
        return ", ".join(one.device for one in self.configs)

    def __str__(self) -> str:
        return f"{self.engine} on {self.replicas}, {self.max_batch_tokens} tokens a run"


def engines(asked: EngineConfig, host: HostInfo, bundle_folder: Path) -> list[TuningCandidate]:
    """Every device, backend and precision that may be had, arranged by rule; the rules' own first.

    Raises:
        ConfigError: As `resolve`.
        BackendError: As `resolve`: nothing can run what was asked.
    """
    found = [resolve_by_rule(asked, host, bundle_folder)]
    for device in ("cuda", "cpu") if asked.device == "auto" else (asked.device,):
        for backend in BACKENDS if asked.backend == "auto" else (asked.backend,):
            for precision in PRECISIONS if asked.precision == "auto" else (asked.precision,):
                one = dataclasses.replace(
                    asked, device=device, backend=backend, precision=precision
                )
                with contextlib.suppress(BackendError):  # not to be had here
                    found.append(resolve_by_rule(one, host, bundle_folder))
    return list(dict.fromkeys(TuningCandidate(tuple(one.configs)) for one in found))


def arrangements(engine: TuningCandidate, asked: EngineConfig) -> list[TuningCandidate]:
    """One engine in fewer or more processes, with smaller or larger runs; as it is first."""
    tokens = engine.max_batch_tokens
    budgets = (tokens,) if asked.max_batch_tokens else (tokens, tokens // 2, tokens * 2)
    return [
        TuningCandidate(configs).with_tokens(budget)
        for configs in _processes(engine.configs, asked)
        for budget in budgets
    ]


def _processes(
    configs: tuple[BackendConfig, ...], asked: EngineConfig
) -> Iterator[tuple[BackendConfig, ...]]:
    yield configs
    first = configs[0]
    if first.device != "cpu":
        if not asked.replicas_per_device:
            # A small model leaves a GPU idle between two runs of one process.
            yield tuple(one for one in configs for _ in range(2))
        return
    cores = sum(one.threads for one in configs)
    for number in (len(configs) // 2, len(configs) * 2):
        if 1 <= number <= cores:
            yield tuple(dataclasses.replace(first, threads=one) for one in shares(cores, number))


def shares(cores: int, number: int) -> Sequence[int]:
    """Cores of each of some processes, as even as whole cores are."""
    return [cores // number + (n < cores % number) for n in range(number)]
