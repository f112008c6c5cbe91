"""Some random sequences with a Longbow; `scripts/soak --longbow-sequences` has more."""

from __future__ import annotations

from pathlib import Path

import pytest

from fletcher.models.bundle.bundle import ModelBundle
from tests.faults import longbow_sequences
from tests.faults.launching import Launcher
from tests.faults.longbow_servers import QUICK, starter

SEEDS = (0, 2, 6, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_longbow_has_what_was_reported_as_stored(
    launcher: Launcher, tiny_bundle: ModelBundle, tmp_path: Path, seed: int
) -> None:
    plan = longbow_sequences.draw(seed)
    models = tiny_bundle.folder.parent
    report = longbow_sequences.run(plan, starter(None), launcher, models, tmp_path / "run", QUICK)
    assert sum(report.steps.values()) >= len(plan.steps)
