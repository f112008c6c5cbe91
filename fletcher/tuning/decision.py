"""Choice of the replicas that a server runs, by measurement or else by rule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from fletcher.config.engine import EngineConfig
from fletcher.inference.devices import Resolution, resolve_replicas
from fletcher.inference.host import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tuning import record


class CheckResult(msgspec.Struct, frozen=True):
    """Result of a check; also the content of its file.

    Attributes:
        lowest_cosine: Lowest cosine of a sample text's vector to float32; -1 for a vector that is
            not finite.
        floor: Lowest cosine that a right vector may have.
        reference: Engine that the vectors were compared with.
        checked_at: Time of the check, ISO 8601, UTC.
    """

    lowest_cosine: float
    floor: float
    reference: str
    checked_at: str
    format: Literal[1] = 1

    @property
    def passed(self) -> bool:
        """Whether the engine's vectors are right."""
        return self.lowest_cosine >= self.floor

    def __str__(self) -> str:
        verdict = "right" if self.passed else "WRONG"
        return f"{verdict} vectors, lowest cosine to {self.reference} {self.lowest_cosine:.5f}"


@dataclass(frozen=True, slots=True)
class Decision(Resolution):
    """Replicas to run, and the reason.

    Attributes:
        measured: The measurement that decided; None if the rules decided.
        check: Result of the engine's self-check; None if there is nothing to check.
    """

    measured: record.Record | None = None
    check: CheckResult | None = None

    def describe(self) -> dict[str, Any]:
        """Entries for `stats`: the reason, and the measurement's time and speed if any."""
        about: dict[str, Any] = {"chosen_by": "rule", "reason": self.reason}
        if self.measured is not None:
            about |= {
                "chosen_by": "measurement",
                "measured_at": self.measured.measured_at,
                "texts_per_s": round(self.measured.texts_per_s, 1),
            }
        if self.check is not None:
            about["self_check"] = {
                "lowest_cosine": round(self.check.lowest_cosine, 6),
                "reference": self.check.reference,
                "checked_at": self.check.checked_at,
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
