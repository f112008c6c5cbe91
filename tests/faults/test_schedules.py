"""Some random schedules of faults; `scripts/soak` plays them by the thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fletcher.models.bundle.bundle import ModelBundle
from tests.faults.launching import Launcher
from tests.faults.plans import draw
from tests.faults.schedules import run


@pytest.mark.parametrize(
    ("store", "power", "seed"),
    [
        # Seeds with few rows and several kinds of faults.
        *(("lance", False, seed) for seed in (1,)),
        *(("lance", True, seed) for seed in (18, 36)),
        *(("fletcher", False, seed) for seed in (129, 197)),
        *(("fletcher", True, seed) for seed in (4,)),
        *(("parquet", False, seed) for seed in (198,)),
        *(("longbow", False, seed) for seed in (22,)),
    ],
)
def test_no_row_is_lost_or_doubled(
    launcher: Launcher, tiny_bundle: ModelBundle, tmp_path: Path, store: str, power: bool, seed: int
) -> None:
    more = not power and store != "longbow"
    schedule = draw(seed, store, power=power, more=more)
    report = run(schedule, launcher, tiny_bundle.folder.parent, tmp_path / "schedule")
    assert sum(report.faults[kind] for kind in {one.kind for one in schedule.events}) == len(
        schedule.events
    )
