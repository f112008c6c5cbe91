"""Who gets the next job, without workers."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fletcher.workers.dispatch import STRATEGIES, DispatchCandidate, WorkerChooser, mean_rate


def shares(
    chooser: WorkerChooser, rates: dict[str, float | None], num_jobs: int = 900
) -> Counter[str]:
    """How many jobs of 100 each idle worker gets, one after the other."""
    given: Counter[str] = Counter()
    workers = [DispatchCandidate(name, 0, rate) for name, rate in rates.items()]
    for _ in range(num_jobs):
        one = workers[chooser.choose(workers)]
        chooser.charge(one.name, 100, one.rate or mean_rate(list(rates.values())))
        given[one.name] += 1
    return given


def test_a_five_times_slower_worker_gets_a_fifth() -> None:
    given = shares(WorkerChooser("throughput-weighted"), {"a": 1000, "b": 1000, "slow": 200}, 1100)
    assert given["a"] == pytest.approx(500, abs=2)
    assert given["b"] == pytest.approx(500, abs=2)
    assert given["slow"] == pytest.approx(100, abs=2)


def test_shares_follow_rates_at_once_when_they_change() -> None:
    chooser = WorkerChooser("throughput-weighted")
    assert shares(chooser, {"a": 1000, "b": 1000})["a"] == 450
    assert shares(chooser, {"a": 1000, "b": 200}, 600)["b"] == pytest.approx(100, abs=2)


@pytest.mark.parametrize("rates", [{"a": None, "b": None}, {"a": 500.0, "b": None}])
def test_what_is_not_measured_counts_as_the_mean(rates: dict[str, float | None]) -> None:
    assert shares(WorkerChooser("throughput-weighted"), rates)["b"] == 450


def test_a_worker_that_was_away_is_not_flooded_when_it_is_back() -> None:
    chooser = WorkerChooser("throughput-weighted")
    shares(chooser, {"a": 1000})
    assert shares(chooser, {"a": 1000, "back": 1000}, 100)["back"] == pytest.approx(50, abs=1)


def test_among_busy_workers_the_one_that_is_free_first() -> None:
    fast, slow = DispatchCandidate("fast", 400, 1000), DispatchCandidate("slow", 100, 100)
    assert WorkerChooser("throughput-weighted").choose([slow, fast]) == 1
    assert WorkerChooser("least-loaded").choose([slow, fast]) == 0


def test_round_robin_takes_turns_whatever_the_rates() -> None:
    assert shares(WorkerChooser("round-robin"), {"a": 1000, "b": 1, "c": None}) == dict.fromkeys(
        "abc", 300
    )


def test_random_takes_all_about_equally() -> None:
    chooser = WorkerChooser("random", random.Random(5))
    assert min(shares(chooser, {"a": 1000, "b": 1, "c": None}).values()) > 250


@pytest.mark.parametrize("strategy", ["least-loaded", "round-robin", "random"])
def test_degraded_workers_come_after_the_others(strategy: str) -> None:
    chooser = WorkerChooser(strategy)
    workers = [DispatchCandidate("bad", 0, degraded=True), DispatchCandidate("good", 900)]
    assert [chooser.choose(workers) for _ in range(5)] == [1] * 5
    assert chooser.choose(workers[:1]) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_single_worker_is_always_chosen(strategy: str) -> None:
    assert shares(WorkerChooser(strategy), {"only": None}, 10) == {"only": 10}
