"""Some random schedules of faults; `scripts/soak` plays them by the thousand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fletcher.models.bundle.bundle import ModelBundle
from tests.faults.launching import Forking, Launcher
from tests.faults.plans import draw
from tests.faults.schedules import run


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Forking() as launcher:
        yield launcher


@pytest.mark.parametrize(
    ("store", "power", "seed"),
    [
        # Seeds with few rows and many kinds of faults.
        *(("lance", False, seed) for seed in (1, 292)),
        *(("lance", True, seed) for seed in (18, 36)),
        *(("fletcher", False, seed) for seed in (326,)),
        *(("fletcher", True, seed) for seed in (163,)),
        *(("parquet", False, seed) for seed in (198,)),
        *(("longbow", False, seed) for seed in (22,)),
    ],
)
def test_no_row_is_lost_or_doubled(
    launcher: Launcher, tiny_bundle: ModelBundle, tmp_path: Path, store: str, power: bool, seed: int
) -> None:
    schedule = draw(seed, store, power=power)
    report = run(schedule, launcher, tiny_bundle.folder.parent, tmp_path / "schedule")
    assert sum(report.faults.values()) == len(schedule.events)
