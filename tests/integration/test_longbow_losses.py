"""Rows that a Longbow acknowledged and lost, and rows that it must not get."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fletcher.errors import (
    ColumnTypeError,
    DimensionMismatchError,
    RequestError,
    StoreUnavailableError,
    UnknownColumnError,
)
from fletcher.stores.address import open_store
from fletcher.stores.flight.longbow import longbow_batch, longbow_schema
from tests.doubles import store_rows as rows
from tests.doubles.longbow import LongbowDouble

NARROW = longbow_schema(rows.schema())


@pytest.fixture
def store(double: LongbowDouble) -> Iterator[Any]:
    opened = open_store(double.address, timeout_s=20, message_bytes=1024)
    yield opened
    opened.close()


def in_next_wait(store: Any, happen: Callable[[], object]) -> None:
    """Have `happen` called once, in the next wait until rows are confirmed."""
    running_time = store._server._uploads.running_time

    def sleep(_: float) -> None:
        running_time._sleep = lambda _: None
        happen()

    running_time._sleep = sleep


def ids(double: LongbowDouble) -> Counter[str]:
    return Counter(double.table("d")["id"].to_pylist())


def once(num_rows: int) -> Counter[str]:
    return Counter(f"id{row}" for row in range(num_rows))


@pytest.mark.parametrize("lost", [0, 1, 3, 100])
def test_rows_that_were_acknowledged_and_lost_are_sent_again(
    double: LongbowDouble, store: Any, lost: int
) -> None:
    # They counted as stored: pyarrow calls the new process as if nothing had happened.
    batches = [rows.batch(0, 40), rows.batch(40, 60)]
    keys = ["u:0-39", "u:40-99"]
    writer = store.open_writer("d", rows.schema(), "append")

    def restart() -> None:
        double.kill(lost=lost)
        assert double.restart()

    in_next_wait(store, restart)
    unconfirmed = writer.append(batches).unconfirmed
    with pytest.raises(StoreUnavailableError):
        unconfirmed.confirm()
    num_left = double.num_rows("d")
    assert num_left < 100 or not lost
    writer.close()
    writer = store.open_writer("d", rows.schema(), "append")
    missing = writer.missing_keys(keys)
    assert missing == keys if lost == 100 else "u:0-39" not in missing
    writer.append([batch for batch, key in zip(batches, keys, strict=True) if key in missing])
    assert ids(double) == once(100)
    assert store.stored_ranges("d", "u") == [(0, 99)]
    assert writer.missing_keys(keys) == []


def test_each_message_has_keys_of_its_own(double: LongbowDouble, store: Any) -> None:
    # A Longbow loses whole messages: so a key has all its rows or none.
    writer = store.open_writer("d", rows.schema(), "append")
    gaps = rows.batch(20, 30).take(pa.array([0, 1, 2, 10, 11]))
    keys = pa.array(["u:20-22"] * 3 + ["u:30-31"] * 2)
    gaps = gaps.set_column(gaps.schema.get_field_index("batch_key"), "batch_key", keys)
    writer.append([rows.batch(0, 20), gaps, rows.batch(0, 9, upload="v")])
    messages = [Counter(batch["batch_key"].to_pylist()) for _, batch in double.log]
    assert len(messages) > 2
    sizes = {"u:20-22": 3, "u:30-31": 2}
    for key, count in sum(messages, Counter()).items():
        first, last = map(int, key.split(":")[1].split("-"))
        assert count == sizes.get(key, last - first + 1) == last - first + 1
    assert not any(one & other for one in messages for other in messages if one is not other)
    assert store.stored_ranges("d", "u") == [(0, 22), (30, 31)]
    assert store.stored_ranges("d", "v") == [(0, 8)]


@pytest.mark.parametrize("step", [7, 25, 100])
def test_a_group_that_is_there_in_part_is_completed(
    double: LongbowDouble, store: Any, step: int
) -> None:
    # An earlier release sent a group in several messages under one key. It was sent whole again.
    keep = np.random.default_rng(step).permutation(100)[:70]
    part = longbow_batch(rows.batch(0, 100), NARROW).take(pa.array(keep))
    double.store("d", part)
    double.store("d", longbow_batch(rows.batch(100, 20), NARROW))
    assert store.stored_ranges("d", "u") == [(100, 119)]
    writer = store.open_writer("d", rows.schema(), "append")
    for first in range(0, 100, step):
        writer.append([rows.batch(first, min(step, 100 - first))])
    assert ids(double) == once(120)
    assert store.stored_ranges("d", "u") == [(0, 119)]
    double.restart()
    assert ids(double) == once(120)


def test_rows_of_another_client_do_not_hide_rows_of_an_upload(
    double: LongbowDouble, store: Any
) -> None:
    # A filtered read ends without an error at batches that lack the filter's column.
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 40)])
    assert store.stored_ranges("d", "u") == [(0, 39)]
    other = longbow_batch(rows.batch(90, 3), NARROW).select(["id", "vector", "timestamp"])
    for _ in range(3):
        double.store("d", other)
    writer.append([rows.batch(40, 20)])
    assert store.stored_ranges("d", "u") == [(0, 59)]
    assert writer.missing_keys(["u:0-39", "u:40-59"]) == []
    assert store.stored_ranges("d", "v") == []


def test_own_rows_are_asked_for_by_a_filter(
    double: LongbowDouble, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets: list[dict[str, Any]] = []
    read = double.read
    monkeypatch.setattr(double, "read", lambda raw: tickets.append(json.loads(raw)) or read(raw))

    def filtered() -> list[bool]:
        tickets.clear()
        assert store.stored_ranges("d", "u")
        return ["filters" in one for one in tickets]

    assert store.stored_ranges("d", "u") == []
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 40)])
    assert filtered() == [True, False]
    writer.append([rows.batch(40, 20)])
    assert filtered() == filtered() == [True]
    double.store("d", longbow_batch(rows.batch(0, 1, upload="w"), NARROW))
    assert filtered() == [True, False], "nobody knows whose rows came"
    assert filtered() == [True]


def test_rows_that_were_deleted_are_not_sent_again(double: LongbowDouble, store: Any) -> None:
    # A Longbow brings them back when it restarts, so they would be there twice.
    with closing(store.open_writer("d", rows.schema(), "append")) as writer:
        writer.append([rows.batch(0, 10)])
    double.deleted["d"].add(3)
    for _ in range(2):
        assert store.stored_ranges("d", "u") == [(0, 9)]


@pytest.mark.parametrize("garbled", [b"{", b"7", b"{}", b'{"status":7}', b"\xff"])
def test_rows_whose_answer_cannot_be_read_are_not_stored_twice(
    double: LongbowDouble,
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
    garbled: bytes,
) -> None:
    # Such a store was taken for one without this call, and got the rows once more by DoPut.
    writer = store.open_writer("d", rows.schema(), "append")
    for first in (0, 10):
        batch = rows.batch(first, 10)
        with monkeypatch.context() as patch:
            patch.setattr(double, "acknowledge", lambda *_: garbled)
            with pytest.raises(StoreUnavailableError, match="answer cannot be read"):
                writer.append([batch])
        keys = [f"u:{first}-{first + 9}"]
        missing = writer.missing_keys(keys)
        writer.append([batch] if missing else [])
        assert writer.missing_keys(keys) == []
    assert ids(double) == once(20)


def test_rows_of_a_killed_sender_have_arrived_before_they_are_counted(
    double: LongbowDouble, store: Any
) -> None:
    # They arrived after the question, and were there twice.
    arriving = longbow_batch(rows.batch(0, 10), NARROW)
    in_next_wait(store, lambda: double.store("d", arriving))
    assert store.stored_ranges("d", "u") == [(0, 9)]


def with_column(batch: pa.RecordBatch, values: pa.Array) -> pa.RecordBatch:
    return batch.append_column("year", values)


YEARS = with_column(rows.batch(0, 3), pa.array([1, 2, 3], pa.int32()))


def test_what_a_longbow_never_gives_back_is_refused(double: LongbowDouble, store: Any) -> None:
    with closing(store.open_writer("d", rows.schema(), "append")) as writer:
        writer.append([rows.batch(0, 3)])
    with pytest.raises(UnknownColumnError, match=r"no column `year`.* new dataset") as caught:
        store.open_writer("d", YEARS.schema, "append")
    assert caught.value.field == "year"
    with pytest.raises(DimensionMismatchError):
        store.open_writer("d", rows.schema(dims=9), "append")
    with pytest.raises(ColumnTypeError, match="`id` is int64"):
        store.open_writer("d", rows.schema(id_type=pa.int64()), "append")
    assert double.num_rows("d") == 3
    assert double.restart()


def test_a_column_that_rows_lack_is_null(double: LongbowDouble, store: Any) -> None:
    with closing(store.open_writer("d", YEARS.schema, "append")) as writer:
        writer.append([YEARS])
    plain = rows.batch(3, 2)
    store.open_writer("d", plain.schema, "append").append([plain])
    assert Counter(store.scan("d").read_all()["year"].to_pylist()) == Counter([1, 2, 3, None, None])
    assert double.restart()


def test_a_writer_declares_its_types_before_the_first_row(
    double: LongbowDouble, store: Any
) -> None:
    # No row shows them yet, and a DoExchange checks nothing: the Longbow never started again.
    store.open_writer("d", YEARS.schema, "append").close()
    other = with_column(rows.batch(3, 3), pa.array(["x", "y", "z"]))
    with pytest.raises(RequestError, match="schema mismatch"):
        store.open_writer("d", other.schema, "append")
    store.open_writer("d", YEARS.schema, "append").append([YEARS])
    assert double.restart()
    assert double.num_rows("d") == 3
