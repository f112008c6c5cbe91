"""Sizes of appends and pauses between them."""

from __future__ import annotations

import pytest

from fletcher.delivery.append_size import AppendSize
from fletcher.delivery.timing import DeliveryTiming
from fletcher.errors import OverloadedError, StoreUnavailableError

NOW = 5.0


@pytest.fixture
def size() -> AppendSize:
    return AppendSize(2.0, DeliveryTiming().retry, jitter=lambda: 1.0)


def test_what_is_too_much_is_halved_and_grows_again_in_steps(size: AppendSize) -> None:
    assert size.limit(1000) == 1000
    size.note_failed(NOW, 0.1, OverloadedError("message larger than max"))
    size.note_failed(NOW, 0.1, OverloadedError("message larger than max"))
    assert size.limit(1000) == 250
    size.note_stored(NOW, 0.1, full=True, slow_down=False)
    assert size.limit(1000) == 265
    size.note_stored(NOW, 0.1, full=False, slow_down=False)
    assert size.limit(1000) == 265
    for _ in range(23):
        size.note_stored(NOW, 0.1, full=True, slow_down=False)
    assert size.limit(1000) == 1000


def test_slow_appends_become_smaller_whether_they_end_well_or_not(size: AppendSize) -> None:
    size.note_stored(NOW, 2.5, full=True, slow_down=False)
    assert size.share == 0.5
    size.note_failed(NOW, 8.0, StoreUnavailableError("no answer within the deadline"))
    assert size.share == 0.25
    size.note_failed(NOW, 0.0, StoreUnavailableError("connection refused"))
    assert size.share == 0.25


def test_at_least_one_row_goes(size: AppendSize) -> None:
    for _ in range(100):
        size.note_failed(NOW, 0.0, OverloadedError("no"))
    assert size.limit(10) == 1


def test_a_request_to_slow_down_makes_a_rest_that_fades(size: AppendSize) -> None:
    rests = []
    for asked in (True, True, True, False, False, False, False):
        size.note_stored(NOW, 0.1, full=True, slow_down=asked)
        rests.append(size.ready_at - NOW)
    assert rests == pytest.approx([0.1, 0.2, 0.4, 0.2, 0.1, 0.0, 0.0])


def test_pauses_after_failures_grow_and_end_with_the_trouble(size: AppendSize) -> None:
    pauses = []
    for _ in range(4):
        size.note_failed(NOW, 0.0, StoreUnavailableError("locked"))
        pauses.append(size.ready_at - NOW)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8])
    size.note_failed(NOW, 0.0, StoreUnavailableError("locked", retry_after_ms=7000))
    assert size.ready_at - NOW == pytest.approx(7)
    size.resume(NOW)
    assert size.ready_at - NOW == 0
    size.note_failed(NOW, 0.0, StoreUnavailableError("locked"))
    assert size.ready_at - NOW == pytest.approx(0.1)
