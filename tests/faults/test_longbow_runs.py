"""Some random runs into a Longbow that is killed; `scripts/soak --longbow` has more."""

from __future__ import annotations

from pathlib import Path

import pytest

from fletcher.models.bundle.bundle import ModelBundle
from tests.faults import longbow_runs
from tests.faults.launching import Launcher
from tests.faults.longbow_servers import starter

SEEDS = (1, 2, 4, 9, 12, 13, 14, 15, 18, 21, 26)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_row_is_stored_once(
    launcher: Launcher, tiny_bundle: ModelBundle, tmp_path: Path, seed: int
) -> None:
    plan = longbow_runs.draw(seed, **longbow_runs.SMALL)
    models = tiny_bundle.folder.parent
    report = longbow_runs.run(plan, starter(None), launcher, models, tmp_path / "run")
    assert report.num_torn == 0
    assert sum(report.faults.values()) == len(plan.faults)
