"""A store's breaker, with a clock that the test sets."""

from __future__ import annotations

import logging
import math

import pytest

from fletcher.delivery.breaker import Breaker
from fletcher.delivery.timing import DeliveryTiming
from fletcher.errors import (
    ColumnTypeError,
    FletcherError,
    OverloadedError,
    StoreUnavailableError,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("s", DeliveryTiming().retry, clock=clock, jitter=lambda: 1.0)


def delay_s(breaker: Breaker, caller: str) -> float:
    """Time that `caller` has to wait."""
    clock = breaker._clock
    return max(0.0, breaker.ready_at(caller) - clock())


def fail(breaker: Breaker, who: str = "a", error: FletcherError | None = None) -> None:
    error = error or StoreUnavailableError("no disk", field="store")
    with pytest.raises(type(error)), breaker.guard_call(who):
        raise error


def test_it_opens_after_failures_in_a_row_only(breaker: Breaker) -> None:
    for _ in range(5):
        fail(breaker)
        fail(breaker)
        with breaker.guard_call("a"):
            pass
    fail(breaker, error=OverloadedError("too much"))
    fail(breaker, error=ColumnTypeError("not this"))
    fail(breaker)
    fail(breaker)
    assert delay_s(breaker, "a") == 0
    fail(breaker)
    assert delay_s(breaker, "a") > 0


def test_one_tries_after_the_pause_and_an_answer_closes_it_for_all(
    breaker: Breaker, clock: Clock
) -> None:
    woken: list[None] = []
    breaker.add_listener(lambda: woken.append(None))
    for _ in range(3):
        fail(breaker)
    assert delay_s(breaker, "b") == pytest.approx(0.1)
    clock.now += 0.1
    assert delay_s(breaker, "b") == 0
    with breaker.guard_call("b"):
        assert delay_s(breaker, "a") == math.inf
        assert breaker.snapshot()["state"] == "probing"
        assert woken == []
    assert delay_s(breaker, "a") == 0
    assert woken == [None]
    assert breaker.snapshot() == {"state": "there", "outages": 1}


def test_pauses_grow_and_who_failed_lets_others_go_first(breaker: Breaker, clock: Clock) -> None:
    for _ in range(3):
        fail(breaker)
    pauses = []
    for who in "abababababab":
        pauses.append(delay_s(breaker, who))
        clock.now += delay_s(breaker, who)
        fail(breaker, who)
        assert delay_s(breaker, who) > delay_s(breaker, "another") > 0
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10, 10, 10])


def test_what_was_under_way_when_it_opened_makes_no_pause_longer(
    breaker: Breaker, clock: Clock
) -> None:
    with pytest.raises(StoreUnavailableError), breaker.guard_call("late"):
        for _ in range(3):
            fail(breaker)
        clock.now += 0.02
        raise StoreUnavailableError("reset", field="store")
    assert delay_s(breaker, "a") == pytest.approx(0.08)


def test_the_stores_own_word_on_when_to_come_again(breaker: Breaker) -> None:
    for _ in range(3):
        fail(breaker, error=StoreUnavailableError("no", field="store", retry_after_ms=4000))
    assert delay_s(breaker, "a") == 4


def test_an_opening_that_goes_well_lets_rows_try_and_proves_nothing(
    breaker: Breaker, clock: Clock
) -> None:
    # A store whose disk is full opens datasets: it was back at each, and away at each append.
    for _ in range(3):
        fail(breaker)
    with pytest.raises(StoreUnavailableError, match="unavailable for 0 s: no disk") as caught:
        breaker.require_ready("a")
    assert caught.value.retry_after_ms == 100
    clock.now += 0.1
    breaker.require_ready("a")
    with breaker.guard_call("a", proof=False):
        pass
    assert breaker.snapshot()["state"] == "away"
    assert delay_s(breaker, "a") == 0


def test_coming_and_going_are_logged_once(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(20):
        clock.now += delay_s(breaker, "a")
        fail(breaker)
    clock.now += 12
    with breaker.guard_call("a"):
        pass
    away, back = [one.message for one in caplog.records]
    assert away == "store s is unavailable: no disk"
    assert back.startswith("store s is available again after ")


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailableError("LanceDB failed", field="dataset"),
        StoreUnavailableError("the journal's disk fails", field="journal"),
        MemoryError(),
        KeyError(),
    ],
)
def test_an_error_in_which_the_store_has_no_part(breaker: Breaker, error: Exception) -> None:
    # One damaged dataset made a quiet store count as unavailable, and the others were refused.
    for who in ("a", "b", "c", "a", "b", "c"):
        with pytest.raises(type(error)), breaker.guard_call(who):
            raise error
    assert breaker.unavailable_since is None
    breaker.require_ready("healthy")


UNPROVEN = StoreUnavailableError("no answer within the deadline")


def test_a_dataset_that_always_times_out_beside_others_is_alone(breaker: Breaker) -> None:
    with breaker.guard_call("healthy"):
        pass
    for _ in range(10):  # while the store is quiet
        fail(breaker, "stuck", UNPROVEN)
    assert breaker.unavailable_since is None
    assert breaker.held_since("stuck") is None  # its committer pauses by itself
    breaker.require_ready("healthy")


def test_failures_of_several_datasets_hold_those_alone_back(breaker: Breaker, clock: Clock) -> None:
    with breaker.guard_call("healthy"):
        pass
    for who in ("a", "b", "c"):
        clock.now += 1
        fail(breaker, who, UNPROVEN)
    assert breaker.unavailable_since == 1
    for who in ("a", "b", "c"):
        assert breaker.held_since(who) == 1
        with pytest.raises(StoreUnavailableError, match="no answer"):
            breaker.require_ready(who)
    # A dataset that did not fail may call beside the one that tries, and settles the question.
    clock.now = breaker.ready_at("a")
    with pytest.raises(StoreUnavailableError), breaker.guard_call("a"):
        breaker.require_ready("healthy")
        with breaker.guard_call("healthy"):
            assert breaker.ready_at("b") == math.inf
        assert breaker.unavailable_since is None
        raise UNPROVEN
    assert breaker.unavailable_since is None
    # If it fails, too, it waits with them.
    for who in ("a", "b", "c", "healthy"):
        fail(breaker, who, UNPROVEN)
    assert breaker.held_since("healthy") is not None


def test_the_dataset_that_was_stored_last_speaks_for_its_store(breaker: Breaker) -> None:
    # It may be the only one in use, so all datasets fail.
    with breaker.guard_call("only"):
        pass
    for _ in range(3):
        fail(breaker, "only", UNPROVEN)
    assert breaker.unavailable_since is not None
    assert breaker.held_since("only") is not None
    breaker.require_ready("new")


def test_a_refused_connection_holds_all_back(breaker: Breaker) -> None:
    with breaker.guard_call("healthy"):
        pass
    fail(breaker, "a", UNPROVEN)
    for _ in range(2):
        fail(breaker, "a")
    assert breaker.held_since("healthy") is not None


def test_an_error_that_says_nothing_lets_another_dataset_try(breaker: Breaker) -> None:
    for who in ("a", "b", "a", "b"):
        fail(breaker, who)
    breaker._retry_at = 0.0
    with pytest.raises(MemoryError), breaker.guard_call("a"):
        raise MemoryError
    assert breaker.unavailable_since is not None
    breaker.require_ready("b")
