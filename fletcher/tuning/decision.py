"""What a server runs: what was measured for it, or else what the rules say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.config.engine import EngineConfig
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tuning import record
from fletcher.tuning.candidates import resolve_by_rule


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided.

    Attributes:
        configs: One for each replica.
        reason: One line for the log: what runs where, and why.
        measured: The measurement; None where the rules decided.
    """

    configs: list[BackendConfig]
    reason: str
    measured: record.Record | None = None

    def describe(self) -> dict[str, Any]:
        """For `stats`: how it was chosen, when it was measured and how fast it was then."""
        about: dict[str, Any] = {"chosen_by": "rule", "reason": self.reason}
        if self.measured is not None:
            about |= {
                "chosen_by": "measurement",
                "measured_at": self.measured.measured_at,
                "texts_per_s": round(self.measured.texts_per_s, 1),
            }
        return about


def decide(home: Path, asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> Decision:
    """Reads what `fletcher tune` found for the same question; measures nothing itself.

    Args:
        home: FLETCHER_HOME.
        asked: What the options fix.
        host: What there is.
        bundle: The model.

    Raises:
        ConfigError: As `fletcher.inference.devices.resolve`.
        BackendError: As `fletcher.inference.devices.resolve`.
    """
    rule = resolve_by_rule(asked, host, bundle.folder)
    if asked.backend == "null":
        return Decision(rule.configs, rule.reason)
    found = record.load(home, record.Key.of(asked, host, bundle), bundle)
    if found is None:
        return Decision(rule.configs, f"{rule.reason}; by rule, `fletcher tune` measures")
    return Decision(
        list(found.candidate.configs),
        f"{found.candidate}: {found.texts_per_s:.0f} texts/s, measured {found.measured_at}",
        found,
    )
