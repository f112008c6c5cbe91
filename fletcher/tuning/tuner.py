"""Tuning: trials of engines, then of arrangements, and a record of the winner."""

from __future__ import annotations

import contextlib
import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from fletcher.config.engine import EngineConfig
from fletcher.core.batches import FloatArray
from fletcher.errors import BackendError, ConfigError
from fletcher.inference.devices import resolve_replicas
from fletcher.inference.host import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tuning.candidates import TuningCandidate, arrangements, engines
from fletcher.tuning.record import Key, Record, save
from fletcher.tuning.replica_group import ReplicaGroup
from fletcher.tuning.sample_texts import SampleTexts
from fletcher.tuning.trials import (
    CHECK_TEXTS,
    CandidateTrial,
    Progress,
    StartReplicas,
    choose_fastest,
    embed,
    run_trials,
)


@dataclass(frozen=True, slots=True)
class TuningReport:
    """Result of a tuning.

    Attributes:
        engines: Trials of each device, backend and precision, with the number of processes that the
            rules give. The rules' own choice is first.
        arrangements: Trials of the fastest engine with other numbers of processes and run sizes.
        chosen: The winner, one of `arrangements`.
        record: The record that was written.
        path: Path of the record's file.
    """

    engines: list[CandidateTrial]
    arrangements: list[CandidateTrial]
    chosen: CandidateTrial
    record: Record
    path: Path


def tune(
    home: Path,
    asked: EngineConfig,
    host: HostInfo,
    bundle: ModelBundle,
    progress: Progress,
    start: StartReplicas = ReplicaGroup,
) -> TuningReport:
    """Measure candidates for a model and record the winner, which servers then run.

    The engines are tried first, then the arrangements of the fastest engine. A single set of trials
    of all combinations would take several times as long, and would hold all combinations in memory
    together. Options of `asked` that are `auto` or 0 are open, so tuning chooses their values.

    Raises:
        ConfigError: The backend or the model cannot be tuned, or `home` cannot be written.
        BackendError: This host cannot run what `asked` asks for, or no candidate's vectors are
            right.
        ModelError: The model is damaged.
    """
    if asked.backend == "null":
        raise ConfigError("`backend` is 'null', which runs no model to tune", field="backend")
    if bundle.output != "dense":
        raise ConfigError(
            f"`model` {bundle.name} gives {bundle.output} vectors, and engines are compared by "
            "dense ones; serve it without tuning",
            field="model",
        )
    candidates = engines(asked, host, bundle)
    samples = SampleTexts.for_model(bundle)
    reference = _reference(host, bundle, samples, start, progress)
    first = run_trials(candidates, samples, reference, start, progress)
    engine = choose_fastest(first)
    if engine is None:
        raise BackendError("no engine gives right vectors here: " + "; ".join(map(_verdict, first)))
    second = run_trials(arrangements(engine.candidate, asked), samples, reference, start, progress)
    chosen = choose_fastest(second)
    if chosen is None:
        raise BackendError(
            "the fastest engine no longer gives right vectors: " + "; ".join(map(_verdict, second))
        )
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    record = Record(chosen.candidate, now, chosen.texts_per_s)
    path = save(home, Key.for_question(asked, host, bundle), bundle, record)
    return TuningReport(first, second, chosen, record, path)


def _reference(
    host: HostInfo, bundle: ModelBundle, samples: SampleTexts, start: StartReplicas, say: Progress
) -> FloatArray:
    """Compute reference vectors in float32 on the CPU, float32 [CHECK_TEXTS, dim]."""
    backend = "onnxruntime" if host.onnxruntime else "openvino"
    asked = EngineConfig(device="cpu", backend=backend, precision="float32")
    candidate = TuningCandidate(tuple(resolve_replicas(asked, host, bundle).configs))
    say(f"reference: {candidate.engine} on {candidate.replicas}")
    with contextlib.closing(start(candidate.configs)) as group:
        return embed(group, samples, CHECK_TEXTS, candidate.max_batch_tokens)[0]


def _verdict(trial: CandidateTrial) -> str:
    return f"{trial.candidate.engine} {trial.rejected}"
