"""Datasets that share a store that is unavailable, overloaded or slow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fletcher.config.delivery import DeliveryConfig, JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.upload import Upload
from fletcher.errors import OverloadedError, StoreUnavailableError
from fletcher.telemetry.tracing import Telemetry
from tests.doubles.stores import MemoryStore, outage

SCHEMA = pa.schema({"id": pa.int64(), "vector": pa.list_(pa.float32(), 2)})


@contextmanager
def delivering(
    store: MemoryStore, journal: Path | None = None, **fields: Any
) -> Iterator[Delivery]:
    config = DeliveryConfig(
        **{
            "group_rows": 10,
            "commit_rows": 1000,
            "group_delay_ms": 10,
            "store_retry_s": 30.0,
            "store_timeout_s": 60,
            **fields,
        }
    )
    telemetry = Telemetry()
    kept = JournalConfig(folder=journal, max_bytes=1 << 30, segment_bytes=1 << 16, retention_s=0.0)
    delivery = Delivery({"default": store}, config, telemetry, kept if journal else None)
    try:
        yield delivery
    finally:
        store.gate.set()
        delivery.close()


def open_(delivery: Delivery, dataset: str = "d", **fields: Any) -> tuple[Upload, DatasetSink]:
    options = EmbedCommand(**{"dataset": dataset, "upload_id": "u", **fields})
    return delivery.open_upload(options, SCHEMA)


def send(sink: DatasetSink, upload: Upload, first: int, num_rows: int) -> None:
    assert upload.claim_rows(first, first + num_rows - 1)
    ids = pa.array(range(first, first + num_rows), pa.int64())
    vectors = pa.array([[1.0, 0.0]] * num_rows, SCHEMA.field("vector").type)
    batch = pa.record_batch([ids, vectors], schema=SCHEMA)
    sink.submit_rows(Rows.from_batch(upload, batch, first, (), lambda: None))


def wait(upload: Upload, condition: Callable[[], bool]) -> bool:
    with upload.changed:
        return upload.changed.wait_for(condition, timeout=30)


def stored(upload: Upload, num_rows: int) -> bool:
    return wait(upload, lambda: upload.counts()["rows_stored"] == num_rows)


def ids(store: MemoryStore, dataset: str = "d") -> list[int]:
    return sorted(store.rows(dataset).column("id").to_pylist())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_all_datasets_wait_together_and_the_log_tells_it_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fletcher.delivery")
    store = MemoryStore()
    with delivering(store) as delivery:
        opened = [open_(delivery, name) for name in "abcd"]
        store.down = outage()
        for upload, sink in opened:
            send(sink, upload, 0, 5)
        state = delivery.statistics
        until(lambda: state()["default"]["state"] == "away")
        assert delivery._telemetry.store_away.values() == {("default",): 1.0}
        with pytest.raises(StoreUnavailableError, match="the store is out") as caught:
            open_(delivery, "e")
        assert caught.value.retry_after_ms is not None
        tried = store.num_tries
        until(lambda: store.num_tries >= tried + 3)
        store.down = None
        assert all(stored(upload, 5) for upload, _ in opened)
        assert state()["default"]["state"] == "there"
        assert all(ids(store, name) == list(range(5)) for name in "abcd")
    messages = [one.message for one in caplog.records]
    assert messages.count("store default is unavailable: the store is out") == 1
    assert sum("is available again after" in one for one in messages) == 1
    assert sum("trying again" in one for one in messages) <= 4
    assert all("trying" in one or one.startswith("store default") for one in messages)


@pytest.mark.parametrize("stored_last", ["slow", "healthy"])
def test_a_dataset_that_always_times_out_does_not_stop_the_others(stored_last: str) -> None:
    store = MemoryStore()
    with delivering(store) as delivery:
        opened = {name: open_(delivery, name) for name in ("slow", "healthy")}
        for name in sorted(opened, key=lambda name: name == stored_last):
            upload, sink = opened[name]
            send(sink, upload, 0, 5)
            assert stored(upload, 5)
        store.locked = {"slow"}
        slow, slow_sink = opened["slow"]
        send(slow_sink, slow, 5, 5)
        tried = store.num_tries
        until(lambda: store.num_tries >= tried + 4)
        # If the slow one was stored last, every dataset that anyone tries fails.
        state = "away" if stored_last == "slow" else "there"
        assert delivery.statistics()["default"]["state"] in (state, "probing")
        for name in ("healthy", "new"):
            upload, sink = open_(delivery, name, upload_id="next")
            send(sink, upload, 0, 10)
            assert stored(upload, 10)
        assert slow.counts()["rows_stored"] == 5
        store.locked = set()
        assert stored(slow, 10)
        assert ids(store, "slow") == list(range(10))


def test_what_is_too_much_at_once_goes_in_parts_with_the_same_keys() -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store) as delivery:
        upload, sink = open_(delivery)
        send(sink, upload, 0, 10)
        assert store.waiting.wait(30)
        for first in range(10, 200, 10):
            send(sink, upload, first, 10)
        store.most_rows = 30
        store.gate.set()
        assert stored(upload, 200)
        assert ids(store) == list(range(200))
        assert max(sum(batch.num_rows for batch in one) for one in store.appends) <= 30
        assert set(store.keys("d")) == {f"u:{first}-{first + 9}" for first in range(0, 200, 10)}
        assert delivery.statistics()["default"]["pace"] < 1
        assert delivery.statistics()["default"]["outages"] == 0
        assert upload.failure is None


def test_a_store_that_asks_to_slow_down_gets_a_rest() -> None:
    store = MemoryStore()
    store.slow_down = True
    with delivering(store) as delivery:
        upload, sink = open_(delivery)
        for first in range(0, 40, 10):
            send(sink, upload, first, 10)
            assert stored(upload, first + 10)
        rest = sink.committer.append_size.rest_s
        assert rest >= 0.4
        store.slow_down = False
        for first in range(40, 80, 10):
            send(sink, upload, first, 10)
            assert stored(upload, first + 10)
        assert sink.committer.append_size.rest_s < rest / 4


def test_rows_in_memory_are_given_up_though_rows_of_the_journal_wait_before_them(
    tmp_path: Path,
) -> None:
    # They stood behind those for as long as the store was away, and their client heard nothing.
    store = MemoryStore()
    with delivering(store, tmp_path, store_retry_s=0.2) as delivery:
        kept, sink = open_(delivery, upload_id="kept")
        plain, _ = open_(delivery, upload_id="plain", durability="store")
        store.down = outage()
        send(sink, kept, 0, 10)
        until(lambda: store.num_tries > 0)
        send(sink, plain, 0, 10)
        assert wait(plain, lambda: plain.failure is not None)
        assert isinstance(plain.failure, StoreUnavailableError)
        store.down = None
        assert stored(kept, 10)
        assert kept.failure is None
        assert store.keys("d") == ["kept:0-9"]


def test_rows_are_tried_before_they_are_given_up_however_short_the_patience() -> None:
    store = MemoryStore()
    with delivering(store, store_retry_s=0.0) as delivery:
        store.down = outage()
        for number in range(5):
            upload, sink = _patiently(delivery, f"u{number}")
            send(sink, upload, 0, 5)
            assert wait(upload, lambda one=upload: one.failure is not None)
            delivery.close_upload(upload, sink)
        store.down = None
        upload, sink = _patiently(delivery, "last")
        send(sink, upload, 0, 5)
        wait(upload, lambda: not upload.in_flight or upload.failure is not None)
        assert upload.failure is None
        assert ids(store) == list(range(5))


def _patiently(delivery: Delivery, upload_id: str) -> tuple[Upload, DatasetSink]:
    while True:
        try:
            return open_(delivery, upload_id=upload_id)
        except StoreUnavailableError as error:
            threading.Event().wait((error.retry_after_ms or 0) / 1000)


def test_an_upload_that_is_given_up_for_overload_says_so() -> None:
    store = MemoryStore()
    with delivering(store, store_retry_s=0.2) as delivery:
        upload, sink = open_(delivery)
        store.most_rows = 3
        send(sink, upload, 0, 10)
        assert wait(upload, lambda: upload.failure is not None)
        assert isinstance(upload.failure, OverloadedError)


def test_nobody_asks_a_store_that_is_away_about_an_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    # A store that hung answered neither the server nor, in its time, the client that asked.
    store = MemoryStore()
    asked: list[str] = []
    monkeypatch.setattr(store, "dataset", asked.append)
    with delivering(store) as delivery:
        upload, sink = open_(delivery)
        store.down = outage()
        send(sink, upload, 0, 5)
        until(lambda: delivery.statistics()["default"]["state"] == "away")
        asked.clear()
        with pytest.raises(StoreUnavailableError, match="the store is out") as caught:
            delivery.upload_status(EmbedCommand(dataset="d", upload_id="unknown"))
        assert caught.value.retry_after_ms is not None
        assert delivery.upload_status(EmbedCommand(dataset="d", upload_id="u"))["rows_durable"] == 0
        assert asked == []
        store.down = None
