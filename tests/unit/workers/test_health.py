"""When a worker is healthy, degraded or ejected, and when it is started again."""

from __future__ import annotations

import random

import pytest

from fletcher.workers.health import RESTART_BACKOFF, Health


def worked(
    health: Health,
    num_jobs: int,
    *,
    cost: int = 1000,
    seconds: float = 0.1,
    others: float | None = 1.0,
) -> Health:
    for _ in range(num_jobs):
        health.record_answer(cost, seconds, others)
    return health


def test_the_rate_follows_a_slowdown_within_seconds() -> None:
    health = worked(Health(), 100)
    assert health.rate == pytest.approx(10_000, rel=0.01)
    worked(health, 10, seconds=0.5)  # 5 s of computing
    assert health.rate == pytest.approx(2000, rel=0.5)


def test_a_worker_that_gets_slower_is_degraded_until_it_is_as_before() -> None:
    health = worked(Health(), 50)
    assert health.state == "healthy"
    worked(health, 10, seconds=0.5)
    assert health.state == "degraded"
    worked(health, 30)
    assert health.state == "healthy"


def test_small_jobs_that_cost_more_a_token_are_no_slowness() -> None:
    health = worked(Health(), 50, cost=30_000, seconds=0.03)
    worked(health, 50, cost=10, seconds=0.002)  # 200 times slower a token
    assert health.state == "healthy"


def test_a_busy_machine_that_slows_all_degrades_none() -> None:
    health = worked(Health(), 50)
    assert worked(health, 20, seconds=0.5, others=4.0).state == "healthy"
    assert worked(Health(), 50, others=None).state == "healthy"
    assert worked(health, 20, seconds=0.5, others=None).state == "healthy"


def test_a_single_slow_answer_degrades_nobody() -> None:
    health = worked(Health(), 50)
    assert worked(health, 1, seconds=30).state == "healthy"


def test_first_answers_judge_nobody() -> None:
    health = worked(Health(), 1, seconds=0.001)
    assert worked(health, 7, seconds=1).state == "healthy"


def test_failures_now_and_then_degrade_and_in_a_row_eject() -> None:
    health = worked(Health(), 50)
    for _ in range(3):
        health.record_failure()
        health.record_failure()
        health.record_answer(1000, 0.1)
    assert health.state == "degraded"
    assert worked(health, 20).state == "healthy"
    for _ in range(3):
        health.record_failure()
    assert health.state == "ejected"
    assert worked(health, 5).state == "ejected"  # what it had in hand does not bring it back
    health.readmit()
    assert health.state == "degraded"
    assert worked(health, 20).state == "healthy"


def test_a_new_process_starts_healthy_and_unmeasured() -> None:
    health = worked(Health(), 50)
    for _ in range(3):
        health.record_failure()
    health.record_restart()
    assert (health.state, health.rate) == ("healthy", None)


def test_restarts_come_later_and_later_and_never_at_the_same_time() -> None:
    rng = random.Random(5)
    assert RESTART_BACKOFF.delay_s(0, rng.random()) == 0
    for num_failures, longest in [(1, 0.5), (2, 1), (3, 2), (6, 16), (7, 30), (1000, 30)]:
        waits = [RESTART_BACKOFF.delay_s(num_failures, rng.random()) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest
        assert 0.9 * longest < max(waits) <= longest
