"""From a question to the fastest right answer: engines against each other, then arrangements."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from fletcher.config.engine import EngineConfig
from fletcher.core.batches import FloatArray
from fletcher.errors import BackendError, ConfigError
from fletcher.inference.devices import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tuning.candidates import TuningCandidate, arrangements, engines, resolve_by_rule
from fletcher.tuning.record import Key, Record, save
from fletcher.tuning.replica_group import ProcessReplicaGroup
from fletcher.tuning.sample_texts import SampleTexts
from fletcher.tuning.trials import (
    LOOK_TEXTS,
    CandidateTrial,
    Progress,
    StartCrew,
    choose,
    embed,
    race,
)


@dataclass(frozen=True, slots=True)
class TuningReport:
    """What came of a tuning.

    Attributes:
        engines: The first race: each backend and precision, arranged by rule; what the rules take
            is first.
        arrangements: The second: the fastest engine in other processes, with other runs.
        chosen: The winner; of `arrangements`.
        record: As it was kept.
        path: Where.
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
    start: StartCrew = ProcessReplicaGroup,
) -> TuningReport:
    """Measures what could run a model here and keeps the winner for servers to come.

    Two small races instead of one of all combinations, which would take several times as long and
    hold every engine in every arrangement in memory.

    Args:
        home: FLETCHER_HOME.
        asked: What the options fix.
        host: What there is.
        bundle: The model.
        progress: Gets a line now and then.
        start: Starts the processes of a candidate.

    Raises:
        ConfigError: Nothing is left to choose, or `home` cannot be written.
        BackendError: Nothing that was asked runs here, or nothing that runs is right.
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
    candidates = engines(asked, host, bundle.folder)
    probe = SampleTexts.of(bundle)
    reference = _reference(host, bundle, probe, start, progress)
    first = race(candidates, probe, reference, start, progress)
    engine = choose(first)
    if engine is None:
        raise BackendError("nothing that runs here is right: " + "; ".join(map(_told, first)))
    second = race(arrangements(engine.candidate, asked), probe, reference, start, progress)
    chosen = choose(second)
    if chosen is None:
        raise BackendError("what was right no longer runs: " + "; ".join(map(_told, second)))
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    record = Record(chosen.candidate, now, chosen.texts_per_s)
    path = save(home, Key.of(asked, host, bundle), bundle, record)
    return TuningReport(first, second, chosen, record, path)


def _reference(
    host: HostInfo, bundle: ModelBundle, probe: SampleTexts, start: StartCrew, progress: Progress
) -> FloatArray:
    """float32 [LOOK_TEXTS, dim]: ONNX Runtime's float32 on the CPU, OpenVINO's without that.

    Raises:
        BackendError: Neither is installed.
        ModelError: The model is damaged.
    """
    backend = "onnxruntime" if host.onnxruntime else "openvino"
    asked = EngineConfig(device="cpu", backend=backend, precision="float32")
    candidate = TuningCandidate(tuple(resolve_by_rule(asked, host, bundle.folder).configs))
    progress(f"reference: {candidate.engine} on {candidate.replicas}")
    group = start(candidate.configs)
    try:
        return embed(group, probe, LOOK_TEXTS, candidate.max_batch_tokens)[0]
    finally:
        group.close()


def _told(trial: CandidateTrial) -> str:
    return f"{trial.candidate.engine} {trial.out}"
