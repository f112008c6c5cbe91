"""Candidates of tuning: the few engines and numbers of processes worth measuring."""

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

# Values that tuning may choose for `auto`. Arithmetic in which a row's vector depends on the other
# rows of a run is not among them and must be asked for by name. An example is int8 with ranges
# taken at run time.
TunedBackend = Literal["openvino", "onnxruntime"]
TunedPrecision = Literal["bfloat16", "float16", "float32"]
BACKENDS: tuple[TunedBackend, ...] = get_args(TunedBackend)
PRECISIONS: tuple[TunedPrecision, ...] = get_args(TunedPrecision)


@dataclass(frozen=True, slots=True)
class TuningCandidate:
    """Replicas that could run a model. All have the same `max_batch_tokens`."""

    configs: tuple[BackendConfig, ...]

    @property
    def max_batch_tokens(self) -> int:
        """Largest number of padded tokens in one run."""
        return self.configs[0].max_batch_tokens

    @property
    def processes(self) -> tuple[BackendConfig, ...]:
        """The replicas with `max_batch_tokens` 0.

        Candidates for which this value is equal can run in the same processes.
        """
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
        """The replicas in words, such as `cpu: 8+8 cores` or `cuda:0, cuda:1`."""
        cores = [str(one.threads) for one in self.configs if one.device == "cpu"]
        if cores:
            return f"cpu: {'+'.join(cores)} core{'s' if cores != ['1'] else ''}"
        return ", ".join(one.device for one in self.configs)

    def __str__(self) -> str:
        return f"{self.engine} on {self.replicas}, {self.max_batch_tokens} tokens a run"


def engines(asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> list[TuningCandidate]:
    """One candidate for each device, backend and precision that can run here.

    The number of processes follows the rules of `resolve_replicas`. The rules' own choice is first.

    Raises:
        BackendError: This host cannot run what `asked` asks for.
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
    """Candidates with one engine and different numbers of processes and run sizes.

    The given candidate is first.
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
            # With a small model, a single process leaves the GPU idle between two runs.
            yield tuple(one for one in configs for _ in range(2))
        return
    cores = sum(one.threads for one in configs)
    for number in (len(configs) // 2, len(configs) * 2):
        if 1 <= number <= cores:
            yield tuple(
                dataclasses.replace(first, threads=one) for one in split_cores(cores, number)
            )
