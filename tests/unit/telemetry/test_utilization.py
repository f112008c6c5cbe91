"""Shares of time from runs and a clock that stands still in between."""

from __future__ import annotations

import pytest

from fletcher.telemetry.utilization import RECENT_S, Utilization


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def runs(busy: Utilization, clock: Clock, num_runs: int, *, seconds: float, every: float) -> None:
    """Runs that end `every` so many seconds."""
    for _ in range(num_runs):
        clock.now += every
        busy.record_run(seconds)


def test_a_device_that_never_ran_is_idle() -> None:
    busy = Utilization(Clock())
    assert busy.recent_share(2) == 0
    assert busy.last_load(2) == (0, 0)


def test_a_load_is_measured_from_its_first_run_to_its_last() -> None:
    clock = Clock()
    busy = Utilization(clock)
    # Two at a time, each followed by a tenth of its own time.
    runs(busy, clock, 400, seconds=0.1, every=0.11 / 2)
    share, elapsed = busy.last_load(2)
    assert share == pytest.approx(1 / 1.1, abs=0.01)
    assert elapsed == pytest.approx(22, abs=0.1)
    assert busy.recent_share(2) == pytest.approx(1 / 1.1, abs=0.02)


def test_after_a_pause_the_last_load_stays_and_the_last_seconds_go() -> None:
    clock = Clock()
    busy = Utilization(clock)
    runs(busy, clock, 200, seconds=0.1, every=0.1)
    clock.now += RECENT_S / 2
    assert busy.recent_share(1) == pytest.approx(0.5, abs=0.11)
    clock.now += RECENT_S
    assert busy.recent_share(1) == 0
    assert busy.last_load(1) == (pytest.approx(1.0), pytest.approx(20))


def test_a_load_after_a_pause_is_another() -> None:
    clock = Clock()
    busy = Utilization(clock)
    runs(busy, clock, 100, seconds=0.1, every=0.1)
    clock.now += 60
    runs(busy, clock, 100, seconds=0.1, every=0.2)
    share, elapsed = busy.last_load(1)
    assert share == pytest.approx(0.5, abs=0.01)
    assert elapsed == pytest.approx(20, abs=0.2)


def test_short_pauses_are_part_of_a_load() -> None:
    clock = Clock()
    busy = Utilization(clock)
    runs(busy, clock, 20, seconds=0.1, every=1.0)
    assert busy.last_load(1)[0] == pytest.approx(0.1, abs=0.01)
    assert busy.recent_share(1) == pytest.approx(0.1, abs=0.01)


def test_more_runs_than_there_is_room_for_are_no_more_than_all_the_time() -> None:
    clock = Clock()
    busy = Utilization(clock)
    runs(busy, clock, 300, seconds=0.3, every=0.1)
    assert busy.last_load(2)[0] == 1
    assert busy.recent_share(2) == 1
