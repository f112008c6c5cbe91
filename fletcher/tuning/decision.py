"""Choice of the replicas that a server runs, by measurement or else by rule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.config.engine import EngineConfig
from fletcher.inference.devices import Resolution, resolve_replicas
from fletcher.inference.host import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tuning import record


@dataclass(frozen=True, slots=True)
class Decision(Resolution):
    """Replicas to run, and the reason; `measured` is None if the rules decided."""

    measured: record.Record | None = None

    def describe(self) -> dict[str, Any]:
        """Entries for `stats`: the reason, and the measurement's time and speed if any."""
        about: dict[str, Any] = {"chosen_by": "rule", "reason": self.reason}
        if self.measured is not None:
            about |= {
                "chosen_by": "measurement",
                "measured_at": self.measured.measured_at,
                "texts_per_s": round(self.measured.texts_per_s, 1),
            }
        return about


def decide(home: Path, asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> Decision:
    """Choose the replicas by a valid tune record or else by rule, without measuring.

    Raises:
        BackendError: The host lacks something that `asked` asks for.
    """
    rule = resolve_replicas(asked, host, bundle)
    if asked.backend == "null":
        return Decision(rule.configs, rule.reason)
    found = record.load(home, record.Key.for_question(asked, host, bundle), bundle)
    if found is None:
        return Decision(rule.configs, f"{rule.reason}; by rule, `fletcher tune` measures")
    return Decision(
        list(found.candidate.configs),
        f"{found.candidate}: {found.texts_per_s:.0f} texts/s, measured {found.measured_at}",
        found,
    )
