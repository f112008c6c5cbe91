"""Numbers of a Longbow's datasets in the `stats` action."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from fletcher.delivery.store_survey import StoreSurvey
from fletcher.errors import StoreUnavailableError
from fletcher.stores.base import DatasetInfo
from fletcher.stores.longbow_trouble import BEHIND, LOST

SCHEMA = pa.schema({"id": pa.utf8()})


class LaggingStore:
    """A store whose index has `indexed` of 12,000 rows."""

    capabilities = SimpleNamespace(index_lags=True)

    def __init__(self, indexed: int | None = 2_057) -> None:
        self.indexed = indexed
        self.is_indexing = False
        self.num_calls = 0
        self.error: Exception | None = None
        self.hangs = threading.Event()
        self.hangs.set()

    def datasets(self) -> list[DatasetInfo]:
        self.num_calls += 1
        self.hangs.wait(30)
        if self.error is not None:
            raise self.error
        return [DatasetInfo("d", SCHEMA, 12_000, 1_000, self.indexed, self.is_indexing)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def survey(store: Any, clock: Clock, **more: Any) -> StoreSurvey:
    return StoreSurvey("s", store, every_s=10, clock=clock, **{"wait_s": 30, **more})


def test_an_index_that_stands_still_has_lost_rows(caplog: pytest.LogCaptureFixture) -> None:
    store, clock = LaggingStore(), Clock()
    asked = survey(store, clock)
    numbers = {"rows": 12_000, "indexed": 2_057, "bytes": 1_000}
    assert asked.statistics() == {"d": {**numbers, "trouble": BEHIND}}
    clock.now = 9
    assert asked.statistics()["d"]["trouble"] == BEHIND  # not asked again yet
    assert store.num_calls == 1
    for clock.now in (10, 20):
        assert asked.statistics() == {"d": {**numbers, "trouble": LOST}}
    assert caplog.text.count("2057 of 12000 rows are indexed") == 2  # behind, then lost
    store.indexed, clock.now = 12_000, 30
    assert asked.statistics()["d"]["trouble"] is None


def test_an_index_that_grows_is_behind() -> None:
    store, clock = LaggingStore(), Clock()
    asked = survey(store, clock)
    for clock.now, store.indexed in ((0, 100), (10, 200), (20, 5_000)):
        assert asked.statistics()["d"]["trouble"] == BEHIND
    store.is_indexing = True  # on a busy machine
    for clock.now in (30, 40):
        assert asked.statistics()["d"]["trouble"] == BEHIND
    store.indexed, clock.now = None, 50
    assert asked.statistics()["d"]["trouble"] is None


def test_a_store_that_hangs_does_not_hold_up_statistics() -> None:
    store, clock = LaggingStore(), Clock()
    asked = survey(store, clock, wait_s=0)
    store.hangs.clear()
    try:
        for clock.now in (0, 100, 200):
            assert asked.statistics() == {}
        assert store.num_calls <= 1  # no second thread
    finally:
        store.hangs.set()


def test_failures_keep_the_last_numbers() -> None:
    store, clock = LaggingStore(), Clock()
    asked = survey(store, clock)
    before = asked.statistics()
    for clock.now, store.error in ((10, StoreUnavailableError("away")), (20, ValueError("bug"))):
        assert asked.statistics() == before


def test_other_stores_are_not_asked() -> None:
    store = LaggingStore()
    store.capabilities = SimpleNamespace(index_lags=False)
    assert survey(store, Clock()).statistics() == {}
    assert store.num_calls == 0
