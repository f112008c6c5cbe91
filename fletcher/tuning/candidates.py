"""Candidates of tuning: the few arrangements of engines worth measuring."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from fletcher.config.engine import EngineConfig
from fletcher.errors import BackendError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import resolve_replicas, split_cores
from fletcher.inference.host import HostInfo
from fletcher.models.bundle.bundle import ModelBundle

# Choices of `auto`. Arithmetic in which a row's vector depends on the rows beside it, such as int8
# with ranges taken at run time, must be asked for by name.
TunedBackend = Literal["openvino", "onnxruntime"]
TunedPrecision = Literal["bfloat16", "float16", "float32"]
BACKENDS: tuple[TunedBackend, ...] = get_args(TunedBackend)
PRECISIONS: tuple[TunedPrecision, ...] = get_args(TunedPrecision)


@dataclass(frozen=True, slots=True)
class TuningCandidate:
    """Replicas that could run a model; all have the same `max_batch_tokens`."""

    configs: tuple[BackendConfig, ...]

    @property
    def max_batch_tokens(self) -> int:
        """Largest number of padded tokens in one run."""
        return self.configs[0].max_batch_tokens

    @property
    def processes(self) -> tuple[BackendConfig, ...]:
        """The replicas without `max_batch_tokens`; equal ones share their processes."""
        return self.with_tokens(0).configs

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


def engines(asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> list[TuningCandidate]:
    """Every device, backend and precision that can run here, arranged by rule.

    The rules' own choice is first.

    Raises:
        BackendError: Nothing here can run what was asked for.
    """
    found = [resolve_replicas(asked, host, bundle)]
    for device in ("cuda", "cpu") if asked.device == "auto" else (asked.device,):
        for backend in BACKENDS if asked.backend == "auto" else (asked.backend,):
            for precision in PRECISIONS if asked.precision == "auto" else (asked.precision,):
                one = dataclasses.replace(
                    asked, device=device, backend=backend, precision=precision
                )
                with contextlib.suppress(BackendError):  # not available here
                    found.append(resolve_replicas(one, host, bundle))
    return list(dict.fromkeys(TuningCandidate(tuple(one.configs)) for one in found))


def arrangements(engine: TuningCandidate, asked: EngineConfig) -> list[TuningCandidate]:
    """One engine in fewer and more processes, with smaller and larger runs.

    The given arrangement is first.
    """
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
            yield tuple(
                dataclasses.replace(first, threads=one) for one in split_cores(cores, number)
            )
