"""Load levels: their thresholds, and when a level is left, by a clock that the test sets."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.serving.load_level import LoadLevel, LoadMonitor, LoadSignals, classify_load
from fletcher.telemetry.tracing import Telemetry


class Simulation:
    """LoadSignals that a test sets, a clock that it turns, and the grades that were announced."""

    def __init__(self) -> None:
        self.signals = LoadSignals()
        self.now = 100.0
        self.telemetry = Telemetry()
        self.announced: list[LoadLevel] = []
        self.monitor = LoadMonitor(
            lambda: self.signals, self.telemetry, self.announced.append, lambda: self.now
        )

    def after(self, seconds: float, **signals: Any) -> LoadLevel:
        self.now += seconds
        self.signals = LoadSignals(**signals)
        return self.monitor.observe()


@pytest.mark.parametrize(
    ("signals", "level"),
    [
        (LoadSignals(), LoadLevel.NORMAL),
        # One upload at full speed, or many: the memory is full, and all is well.
        (LoadSignals(memory=1.0, queue=500.0, streams=0.8, journal=0.5), LoadLevel.MODERATE),
        # The store is slower than the clients, but works: they wait, and a new one may, too.
        (LoadSignals(memory=1.0, journal=1.0), LoadLevel.MODERATE),
        # The store is unavailable, and the journal has room for hours.
        (LoadSignals(memory=1.0, journal=0.5, store_unavailable=True), LoadLevel.MODERATE),
        (LoadSignals(journal=0.0, store_unavailable=True), LoadLevel.NORMAL),
        (LoadSignals(journal=0.9, store_unavailable=True), LoadLevel.SEVERE),
        # Without a journal the memory holds what the store does not take.
        (LoadSignals(memory=0.9, store_unavailable=True), LoadLevel.SEVERE),
        (LoadSignals(memory=0.95), LoadLevel.MODERATE),
        (LoadSignals(streams=0.9), LoadLevel.SEVERE),
        (LoadSignals(starving=0.5), LoadLevel.SEVERE),
        (LoadSignals(queue=8.0), LoadLevel.MODERATE),
    ],
)
def test_what_each_signal_means(signals: LoadSignals, level: LoadLevel) -> None:
    assert classify_load(signals)[0] is level


def test_a_level_is_entered_at_once_and_left_after_a_delay() -> None:
    server = Simulation()
    assert server.after(1, streams=0.95) is LoadLevel.SEVERE
    for _ in range(2):
        assert server.after(60, streams=0.80) is LoadLevel.SEVERE, "lower, but not far enough"
    assert server.after(1, streams=0.5) is LoadLevel.SEVERE, "calm, but not for long"
    assert server.after(2, streams=0.95) is LoadLevel.SEVERE
    assert server.after(2, streams=0.5) is LoadLevel.SEVERE, "the calm begins anew"
    assert server.after(2.9, streams=0.5) is LoadLevel.SEVERE
    assert server.after(0.2, streams=0.5) is LoadLevel.NORMAL
    assert server.announced == [LoadLevel.SEVERE, LoadLevel.NORMAL]


def test_severe_falls_to_the_level_that_still_holds() -> None:
    server = Simulation()
    server.after(1, memory=1.0, store_unavailable=True)
    server.after(1, memory=1.0)
    assert server.after(4, memory=1.0) is LoadLevel.MODERATE


def test_transitions_are_logged_once_and_time_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Simulation()
    with caplog.at_level(logging.INFO, "fletcher.serving.load_level"):
        for _ in range(10):
            server.after(1, streams=1.0)
        for _ in range(10):
            server.after(1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "severe after normal: 100% of the streams are open" in caplog.messages[0]
    assert "normal after severe" in caplog.messages[1]
    snapshot = server.telemetry.snapshot()
    # The second that ended in severe was normal's; leaving it took three.
    assert snapshot["fletcher.pressure.time"] == {"normal": 7.0, "severe": 13.0}
    assert snapshot["fletcher.pressure.grade"] == 0
    statistics = server.monitor.statistics()
    assert (statistics["grade"], statistics["for_s"]) == ("normal", 6.0)


def test_bulk_work_leaves_half_of_the_common_memory_where_it_is_told_to() -> None:
    budget = MemoryBudget(4000, max_streams=10)  # 100 bytes of reserve each, 1750 in common
    bulk, interactive = budget.open_allowance(), budget.open_allowance()
    budget.spare(half=True)
    bulk.acquire(925)
    call = threading.Thread(target=bulk.acquire, args=(200,))
    call.start()
    call.join(0.05)
    assert call.is_alive(), "more than half of the common part"
    interactive.acquire(925, bulk=False)
    interactive.close()
    budget.spare(half=False)
    call.join(30)
    assert not call.is_alive()


def test_streams_that_wait_long_for_memory_starve() -> None:
    now = [0.0]
    budget = MemoryBudget(4000, max_streams=10, clock=lambda: now[0])
    first, second = budget.open_allowance(), budget.open_allowance()
    first.acquire(1850)
    call = threading.Thread(target=second.acquire, args=(200,))
    call.start()
    call.join(0.05)
    assert budget.starving(60) == 0
    now[0] = 61.0
    assert budget.starving(60) == 1
    first.close()
    call.join(30)
    assert budget.starving(60) == 0
