"""Rows that are there already are dropped: stored, journaled, on their way, of any upload."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fletcher.delivery.delivery import Delivery
from fletcher.delivery.fingerprints import FingerprintMap, fingerprints
from fletcher.delivery.known import Screen
from fletcher.delivery.lane import DeliveryConfig
from fletcher.delivery.route import JournalConfig, Route
from fletcher.delivery.rows import Rows
from fletcher.delivery.upload import Upload
from fletcher.errors import InvalidCommandError
from fletcher.options import EmbedOptions
from fletcher.telemetry import Telemetry
from tests.doubles.stores import MemoryStore, outage

SCHEMA = pa.schema({"id": pa.utf8(), "vector": pa.list_(pa.float32(), 1), "text": pa.utf8()})

journaled = pytest.mark.parametrize("journal", [True, False])
# (id, text); a text of None is a row that failed.
Row = tuple[str, str | None]


@contextmanager
def delivering(
    store: MemoryStore, folder: Path | None, *, retry_s: float = 30, known_bytes: int = 1 << 20
) -> Iterator[Delivery]:
    config = DeliveryConfig(
        group_rows=10,
        commit_rows=100,
        group_delay_s=0.01,
        store_retry_s=retry_s,
        max_known_bytes=known_bytes,
    )
    where = None if folder is None else JournalConfig(folder, 1 << 30, 1 << 16, 0.0)
    delivery = Delivery({"default": store}, config, Telemetry(), where)
    delivery.recover()
    try:
        yield delivery
    finally:
        store.gate.set()
        delivery.shut_down()


def options(upload_id: str, **fields: Any) -> EmbedOptions:
    return EmbedOptions(**{"dataset": "d", "upload_id": upload_id, "dedupe": "id", **fields})


def batch_of(rows: Sequence[Row]) -> pa.RecordBatch:
    vectors = [None if text is None else [1.0] for _, text in rows]
    columns = [[one for one, _ in rows], vectors, [text for _, text in rows]]
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)],
        schema=SCHEMA,
    )


def send(route: Route, upload: Upload, first: int, *rows: Row) -> None:
    assert upload.claim(first, first + len(rows) - 1)
    failed = tuple(place for place, (_, text) in enumerate(rows) if text is None)
    route.put(Rows.of(upload, batch_of(rows), first, failed, lambda: None))


def wait(upload: Upload) -> None:
    with upload.changed:
        assert upload.changed.wait_for(lambda: not upload.in_flight or upload.failure, timeout=30)


def stored(delivery: Delivery, store: MemoryStore) -> list[tuple[str, str]]:
    assert delivery.flush(30)
    table = store.rows("d")
    return list(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def where(tmp_path: Path, journal: bool) -> Path | None:
    return tmp_path if journal else None


@journaled
def test_a_row_is_stored_once_in_an_upload_and_over_uploads(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, route = delivery.open(options("one"), SCHEMA)
        send(route, upload, 0, ("a", "1"), ("b", "2"), ("a", "3"))
        send(route, upload, 3, ("b", "4"), ("c", "5"))
        upload.announce(5)
        wait(upload)
        assert upload.complete
        assert stored(delivery, store) == [("a", "1"), ("b", "2"), ("c", "5")]
        counts = upload.summary("m")
        assert (counts["rows_stored"], counts["rows_durable"]) == (3, 5)
        assert (counts["rows_deduplicated"], counts["rows_failed"]) == (2, 0)
        other, route = delivery.open(options("two"), SCHEMA)
        send(route, other, 0, ("c", "6"), ("d", "7"))
        wait(other)
        assert stored(delivery, store)[3:] == [("d", "7")]
        assert store.scans == [("d", ("id",))]  # once
    with delivering(store, where(tmp_path, journal)) as delivery:
        again, route = delivery.open(options("three"), SCHEMA)
        send(route, again, 0, ("d", "8"), ("e", "9"))
        wait(again)
        assert [one for one, _ in stored(delivery, store)] == ["a", "b", "c", "d", "e"]


def test_by_text(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        upload, route = delivery.open(options("one", dedupe="text"), SCHEMA)
        send(route, upload, 0, ("a", "same"), ("b", "same"), ("c", "other"))
        wait(upload)
        assert stored(delivery, store) == [("a", "same"), ("c", "other")]


@journaled
def test_rows_of_an_upload_that_does_not_ask_are_known_too(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, route = delivery.open(options("asks"), SCHEMA)
        plain, _ = delivery.open(options("plain", dedupe="off"), SCHEMA)
        send(route, plain, 0, ("a", "1"), ("a", "2"))
        wait(plain)
        send(route, upload, 0, ("a", "3"), ("b", "4"))
        wait(upload)
        assert stored(delivery, store) == [("a", "1"), ("a", "2"), ("b", "4")]


@journaled
def test_two_uploads_at_once_do_not_both_store_an_id(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        uploads = [delivery.open(options(f"u{n}"), SCHEMA) for n in range(4)]
        start = threading.Barrier(len(uploads))

        def feed(upload: Upload, route: Route) -> None:
            start.wait(30)
            for first in range(0, 200, 5):
                send(route, upload, first, *((f"id {first + n}", "text") for n in range(5)))

        threads = [threading.Thread(target=feed, args=one) for one in uploads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for upload, _ in uploads:
            wait(upload)
            assert upload.counts()["rows_durable"] == 200
        ids = [one for one, _ in stored(delivery, store)]
        assert sorted(ids) == sorted({f"id {n}" for n in range(200)})
        dropped = sum(upload.summary("m")["rows_deduplicated"] for upload, _ in uploads)
        assert dropped == 3 * 200


def test_a_mix_of_durabilities_does_not_store_an_id_twice(tmp_path: Path) -> None:
    # One is decided where it is journaled, the other where it is stored: never at once.
    store = MemoryStore()
    store.gate.clear()
    with delivering(store, tmp_path) as delivery:
        direct, route = delivery.open(options("direct", durability="store"), SCHEMA)
        other, _ = delivery.open(options("other"), SCHEMA)
        send(route, direct, 0, ("a", "1"))
        route.hurry()
        assert store.waiting.wait(30)
        send(route, other, 0, ("a", "2"), ("b", "3"))
        with other.changed:  # a moment is enough for what must not happen
            assert not other.changed.wait_for(lambda: other.covers(0, 1), timeout=0.3)
        store.gate.set()
        wait(direct)
        wait(other)
        assert sorted(stored(delivery, store)) == [("a", "1"), ("b", "3")]


def test_an_acknowledged_duplicate_never_rests_on_a_row_that_is_lost() -> None:
    # The first upload's row did not reach the store: the second's is no duplicate of it.
    store = MemoryStore()
    with delivering(store, None, retry_s=0) as delivery:
        lost, route = delivery.open(options("lost"), SCHEMA)
        kept, _ = delivery.open(options("kept"), SCHEMA)
        store.faults.append(("before", outage()))
        send(route, lost, 0, ("a", "1"))
        wait(lost)
        assert lost.failure is not None
        send(route, kept, 0, ("a", "2"))
        wait(kept)
        assert stored(delivery, store) == [("a", "2")]
        # And one that did, without an answer, is found to be there.
        store.faults.append(("after", outage()))
        unsure, _ = delivery.open(options("unsure"), SCHEMA)
        send(route, unsure, 0, ("b", "3"))
        wait(unsure)
        assert unsure.failure is not None
        send(route, kept, 1, ("b", "4"), ("c", "5"))
        wait(kept)
        assert stored(delivery, store) == [("a", "2"), ("b", "3"), ("c", "5")]


def test_rows_that_an_earlier_process_journaled_are_known(tmp_path: Path) -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store, tmp_path) as delivery:
        upload, route = delivery.open(options("one"), SCHEMA)
        send(route, upload, 0, ("a", "1"), ("b", "2"), ("a", "3"))
        wait(upload)
        for one in delivery._all_routes():  # as good as a crash for what is on disk
            one.lane._closing.set()
    assert not store.batches["d"]
    store.gate.clear()
    with delivering(store, tmp_path) as delivery:
        other, route = delivery.open(options("two"), SCHEMA)
        send(route, other, 0, ("b", "4"), ("c", "5"))
        wait(other)
        again, _ = delivery.open(options("one"), SCHEMA)
        assert again.counts()["rows_durable"] == 3
        send(route, again, 3, ("c", "6"), ("d", "7"))
        again.announce(5)
        wait(again)
        assert again.complete
        store.gate.set()
        assert sorted(stored(delivery, store)) == [("a", "1"), ("b", "2"), ("c", "5"), ("d", "7")]


@journaled
def test_a_group_of_nothing_but_duplicates_settles(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, route = delivery.open(options("one"), SCHEMA)
        send(route, upload, 0, ("a", "1"))
        wait(upload)
        assert delivery.flush(30)
        appends = len(store.appends)
        send(route, upload, 1, ("a", "2"), ("a", "3"))
        upload.announce(3)
        wait(upload)
        assert delivery.flush(30)
        assert upload.complete
        assert len(store.appends) == appends
        delivery.close(upload, route)
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, route = delivery.open(options("one"), SCHEMA)
        # The store does not know of rows that it never got: they come again and go again.
        assert upload.claim(0, 2) == [(1, 2)]


@journaled
def test_a_row_that_failed_is_not_stored_and_may_come_again(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, route = delivery.open(options("one"), SCHEMA)
        send(route, upload, 0, ("a", None), ("a", "repaired"), ("a", "too late"))
        wait(upload)
        assert stored(delivery, store) == [("a", "repaired")]
        assert upload.counts()["rows_durable"] == 3


def test_an_overwrite_forgets(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        for name in ("one", "two"):
            upload, route = delivery.open(options(name, mode="overwrite"), SCHEMA)
            send(route, upload, 0, ("a", name), ("a", "again"))
            wait(upload)
            assert stored(delivery, store) == [("a", name)]


@journaled
def test_delta_sends_what_is_new_or_changed(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        delta = {"dedupe": "off", "mode": "delta"}
        upload, route = delivery.open(options("one", **delta), SCHEMA)
        send(route, upload, 0, ("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("a", "1"))
        wait(upload)
        # The last row of an id counts, so a change and the change back are both sent.
        sent = [("a", "1"), ("b", "2"), ("a", "3"), ("a", "1")]
        assert stored(delivery, store) == sent
        assert set(store.opened[1:]) <= {"upsert"}
        other, route = delivery.open(options("two", **delta), SCHEMA)
        screen = Screen(route.known, other)
        rows = batch_of([("a", "1"), ("b", "new"), ("b", "2"), ("c", "1")])
        assert screen.skip(rows, 0).tolist() == [True, False, False, False]
        # `b` is on its way with another text: what the store has says nothing about later rows.
        assert screen.skip(batch_of([("b", "2"), ("a", "1")]), 4).tolist() == [False, True]
        send(route, other, 0, ("a", "1"), ("b", "new"), ("b", "2"), ("c", "1"))
        send(route, other, 4, ("b", "2"), ("a", "1"))
        wait(other)
        assert stored(delivery, store)[4:] == [("b", "new"), ("b", "2"), ("c", "1")]
        assert screen.skip(batch_of([("b", "2"), ("c", "2")]), 6).tolist() == [True, False]
        assert not screen._moving.keys() - set(fingerprints(pa.array(["c"])))


def test_a_dataset_that_does_not_fit_the_memory_is_refused_by_name(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path, known_bytes=1000) as delivery:
        plain, route = delivery.open(options("plain", dedupe="off"), SCHEMA)
        send(route, plain, 0, *((f"id {n}", "text") for n in range(10)))
        wait(plain)
        with pytest.raises(InvalidCommandError, match="--max-memory"):
            delivery.open(options("one"), SCHEMA)
        # What was taken up so far is given back, and grows past the bound by nothing later.
        assert delivery._known_space.used_bytes == 0


def test_memory_is_given_back_with_the_route(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        upload, route = delivery.open(options("one"), SCHEMA)
        send(route, upload, 0, ("a", "1"))
        wait(upload)
        assert delivery._known_space.used_bytes > 0
    assert delivery._known_space.used_bytes == 0


def test_a_dataset_without_texts_cannot_be_compared_by_text(tmp_path: Path) -> None:
    store = MemoryStore()
    store.schemas["d"], store.batches["d"] = SCHEMA.remove(2), []
    with (
        delivering(store, tmp_path) as delivery,
        pytest.raises(InvalidCommandError, match="no column `text`"),
    ):
        delivery.open(options("one", dedupe="text"), SCHEMA)


def test_fingerprints() -> None:
    texts = ["a", None, "", "ä" * 1000, "a"]
    plain = fingerprints(pa.array(texts))
    assert plain[0] == plain[4]
    assert plain[1] is None
    assert len(set(plain)) == 4
    for kind in (pa.large_utf8(), pa.string_view(), pa.dictionary(pa.int8(), pa.utf8())):
        assert fingerprints(pa.array(texts).cast(kind)) == plain
    numbers = fingerprints(pa.array([1, 2**63 - 1], pa.int64()))
    assert numbers == fingerprints(pa.array([1, 2**63 - 1], pa.uint64()))
    assert numbers[0] == fingerprints(pa.array(["1"]))[0]


def test_a_map_of_fingerprints_keeps_the_last_value_over_merges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fletcher.delivery.fingerprints._MERGE_ROWS", 50)
    # Ends in zeros, which numpy strips from bytes that are read one by one.
    keys = [bytes([n, 7]) + bytes(14) for n in range(200)]
    values = {key: bytes([n]) + bytes(15) for n, key in enumerate(keys)}
    entries = FingerprintMap(16)
    for first in range(0, 200, 20):
        entries.update({key: values[key] for key in keys[first : first + 20]})
        entries.update({keys[3]: bytes([first]) * 16})
    assert entries.get([*keys[:3], None, keys[3], b"x" * 16]) == [
        *(values[key] for key in keys[:3]),
        None,
        bytes([180]) * 16,
        None,
    ]
    assert entries.get(keys[4:]) == [values[key] for key in keys[4:]]
    assert entries.num_bytes >= 200 * 32
