"""`fletcher tune`: measure the fastest way to run a model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fletcher.cli.command_line import command
from fletcher.cli.options import ConfigFlags, config_options, json_option
from fletcher.cli.terminal import print_json, print_table, say
from fletcher.telemetry.logs import set_up_logging

if TYPE_CHECKING:
    from fletcher.tuning.trials import CandidateTrial
    from fletcher.tuning.tuner import TuningReport

_OPTIONS = ("model", "device", "backend", "precision", "threads", "max_batch_tokens", "home")
_HEADER = ("engine", "replicas", "tokens/run", "texts/s", "rounds", "cosine", "")


@command("tune", "fletcher tune --model all-MiniLM-L6-v2", "fletcher tune --device cpu --threads 8")
@json_option("Print one JSON object.")
@config_options(*_OPTIONS, text={"model": "Model to measure."})
def cli(flags: ConfigFlags, as_json: bool) -> None:
    """Measure the fastest way to run a model on this machine, and keep it.

    Tries engines, precisions, numbers of processes and batch sizes on real texts. Combinations with
    wrong vectors are rejected; the fastest of the others is kept. Servers started with the same
    options then use the kept combination. Tuning takes about a minute for a small model, and needs
    a machine that does nothing else meanwhile.
    """
    from fletcher.inference.host import detect_host
    from fletcher.models.bundle.registry import Registry
    from fletcher.tuning.tuner import tune

    set_up_logging("error", "text")
    config = flags.resolve(_OPTIONS).config
    registry = Registry(config.home / "models")
    registry.ensure_model(config.model.default, say)
    bundle = registry.verify_model(config.model.default)
    report = tune(config.home, config.engine, detect_host(), bundle, say)
    if as_json:
        print_json(_as_json(report), indent=2)
    else:
        _print(report)


def _print(report: TuningReport) -> None:
    chosen = report.chosen
    # Figures of `engines` and of `arrangements` cannot be compared with each other.
    rows = [
        [_row(trial, "chosen" if trial is chosen else trial.rejected) for trial in trials]
        for trials in (report.engines, report.arrangements)
    ]
    print_table([*rows[0], (), *rows[1]], header=_HEADER, right=(2, 3, 4, 5))
    print(f"\nchosen: {chosen.candidate}")
    print(f"why: {_why(report)}")
    print(f"kept in {report.path}")


def _row(trial: CandidateTrial, note: str) -> tuple[str, ...]:
    candidate = trial.candidate
    rate = rounds = "-"
    if trial.rounds:
        rate = f"{trial.texts_per_s:.0f}"
        rounds = f"{min(trial.rounds):.0f}-{max(trial.rounds):.0f}"
    cosine = "-" if trial.lowest_cosine is None else f"{trial.lowest_cosine:.6f}"
    tokens = str(candidate.max_batch_tokens)
    return candidate.engine, candidate.replicas, tokens, rate, rounds, cosine, note


def _why(report: TuningReport) -> str:
    ran = [trial for trial in report.arrangements if trial.rounds]
    fastest = max(ran, key=lambda trial: trial.texts_per_s)
    if fastest is not report.chosen:
        return "no other was faster in every round"
    if report.chosen is ran[0]:
        return f"the fastest of {len(ran)} arrangements of the fastest engine"
    gain = report.chosen.texts_per_s / ran[0].texts_per_s
    return f"faster in every round, {gain:.2f} times the first of its arrangements"


def _as_json(report: TuningReport) -> dict[str, Any]:
    def about(trial: CandidateTrial) -> dict[str, Any]:
        candidate = trial.candidate
        return {
            "backend": candidate.configs[0].backend,
            "precision": candidate.configs[0].precision,
            "replicas": [
                {"device": one.device, "threads": one.threads} for one in candidate.configs
            ],
            "max_batch_tokens": candidate.max_batch_tokens,
            "texts_per_s": round(trial.texts_per_s, 1),
            "turns": [round(rate, 1) for rate in trial.rounds],
            "lowest_cosine": trial.lowest_cosine,
            "out": trial.rejected,
        }

    return {
        "chosen": about(report.chosen),
        "why": _why(report),
        "measured_at": report.record.measured_at,
        "path": str(report.path),
        "engines": [about(trial) for trial in report.engines],
        "arrangements": [about(trial) for trial in report.arrangements],
    }
