"""How much goes at once, and when: a clock and a store of made-up words."""

from __future__ import annotations

import pytest

from fletcher.delivery.append_size import AppendSize
from fletcher.errors import OverloadedError, StoreUnavailableError


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> AppendSize:
    return AppendSize(2.0, clock=clock, jitter=lambda: 1.0)


def test_what_is_too_much_is_halved_and_grows_again_in_steps(pace: AppendSize) -> None:
    assert pace.limit(1000) == 1000
    pace.failed(0.1, OverloadedError("message larger than max"))
    pace.failed(0.1, OverloadedError("message larger than max"))
    assert pace.limit(1000) == 250
    pace.stored(0.1, full=True, slow_down=False)
    assert pace.limit(1000) == 265
    pace.stored(0.1, full=False, slow_down=False)
    assert pace.limit(1000) == 265
    for _ in range(23):
        pace.stored(0.1, full=True, slow_down=False)
    assert pace.limit(1000) == 1000


def test_slow_appends_become_smaller_whether_they_end_well_or_not(pace: AppendSize) -> None:
    pace.stored(2.5, full=True, slow_down=False)
    assert pace.share == 0.5
    pace.failed(8.0, StoreUnavailableError("no answer within the deadline"))
    assert pace.share == 0.25
    pace.failed(0.0, StoreUnavailableError("connection refused"))
    assert pace.share == 0.25


def test_at_least_one_row_goes(pace: AppendSize) -> None:
    for _ in range(100):
        pace.failed(0.0, OverloadedError("no"))
    assert pace.limit(10) == 1


def test_a_request_to_slow_down_makes_a_rest_that_fades(pace: AppendSize) -> None:
    rests = []
    for asked in (True, True, True, False, False, False, False):
        pace.stored(0.1, full=True, slow_down=asked)
        rests.append(pace.delay_s())
    assert rests == pytest.approx([0.1, 0.2, 0.4, 0.2, 0.1, 0.0, 0.0])


def test_pauses_after_failures_grow_and_end_with_the_trouble(
    pace: AppendSize, clock: Clock
) -> None:
    pauses = []
    for _ in range(4):
        pace.failed(0.0, StoreUnavailableError("locked"))
        pauses.append(pace.delay_s())
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8])
    pace.failed(0.0, StoreUnavailableError("locked", retry_after_ms=7000))
    assert pace.delay_s() == pytest.approx(7)
    clock.now += 6
    assert pace.delay_s() == pytest.approx(1)
    pace.resume()
    assert pace.delay_s() == 0
    pace.failed(0.0, StoreUnavailableError("locked"))
    assert pace.delay_s() == pytest.approx(0.1)
