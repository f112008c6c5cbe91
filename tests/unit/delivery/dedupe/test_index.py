"""Duplicates of stored, journaled and pending rows of any upload are dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fletcher.config.delivery import DeliveryConfig, JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.dedupe.fingerprints import FingerprintMap, fingerprints
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.dedupe.prefilter import DedupePrefilter
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.upload import Upload
from fletcher.errors import (
    ColumnTypeError,
    FletcherError,
    InvalidCommandError,
    OverloadedError,
    StoreUnavailableError,
)
from fletcher.telemetry.tracing import Telemetry
from tests.doubles.stores import MemoryStore, outage

SCHEMA = pa.schema({"id": pa.utf8(), "vector": pa.list_(pa.float32(), 1), "text": pa.utf8()})

journaled = pytest.mark.parametrize("journal", [True, False])
# (id, text); a text of None is a row that failed.
Row = tuple[str, str | None]
# After this the committer does not try again by itself.
PAUSE = OverloadedError("too much", retry_after_ms=600_000)


@contextmanager
def delivering(
    store: MemoryStore, folder: Path | None, *, retry_s: float = 30, dedupe_bytes: int = 1 << 20
) -> Iterator[Delivery]:
    config = DeliveryConfig(
        group_rows=10,
        commit_rows=100,
        group_delay_ms=10,
        store_retry_s=retry_s,
        store_timeout_s=60,
        max_dedupe_bytes=dedupe_bytes,
    )
    where = (
        None
        if folder is None
        else JournalConfig(folder=folder, max_bytes=1 << 30, segment_bytes=1 << 16, retention_s=0)
    )
    delivery = Delivery({"default": store}, config, Telemetry(), where)
    delivery.recover()
    try:
        yield delivery
    finally:
        store.gate.set()
        delivery.close()


def options(upload_id: str, **fields: Any) -> EmbedCommand:
    return EmbedCommand(**{"dataset": "d", "upload_id": upload_id, "dedupe": "id", **fields})


def batch_of(rows: Sequence[Row]) -> pa.RecordBatch:
    vectors = [None if text is None else [1.0] for _, text in rows]
    columns = [[one for one, _ in rows], vectors, [text for _, text in rows]]
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)],
        schema=SCHEMA,
    )


def send(sink: DatasetSink, upload: Upload, first: int, *rows: Row) -> None:
    assert upload.claim_rows(first, first + len(rows) - 1)
    failed = tuple(place for place, (_, text) in enumerate(rows) if text is None)
    sink.submit_rows(Rows.from_batch(upload, batch_of(rows), first, failed, lambda: None))


def wait(upload: Upload) -> None:
    with upload.changed:
        assert upload.changed.wait_for(lambda: not upload.in_flight or upload.failure, timeout=30)


def wait_for_doubt(sink: DatasetSink) -> None:
    committer = sink.committer
    with committer._changed:
        assert committer._changed.wait_for(
            lambda: committer._queue.waiting.sent and not committer._queue._holds_rows, 30
        )


def try_again(sink: DatasetSink) -> None:
    with sink.committer._changed:
        sink.committer.append_size.resume(time.monotonic())
    sink.flush()


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
        upload, sink = delivery.open_upload(options("one"), SCHEMA)
        send(sink, upload, 0, ("a", "1"), ("b", "2"), ("a", "3"))
        send(sink, upload, 3, ("b", "4"), ("c", "5"))
        upload.announce_total(5)
        wait(upload)
        assert upload.complete
        assert stored(delivery, store) == [("a", "1"), ("b", "2"), ("c", "5")]
        counts = upload.summary("m")
        assert (counts["rows_stored"], counts["rows_durable"]) == (3, 5)
        assert (counts["rows_deduplicated"], counts["rows_failed"]) == (2, 0)
        other, sink = delivery.open_upload(options("two"), SCHEMA)
        send(sink, other, 0, ("c", "6"), ("d", "7"))
        wait(other)
        assert stored(delivery, store)[3:] == [("d", "7")]
        assert store.scans == [("d", ("id",))]  # once
    with delivering(store, where(tmp_path, journal)) as delivery:
        again, sink = delivery.open_upload(options("three"), SCHEMA)
        send(sink, again, 0, ("d", "8"), ("e", "9"))
        wait(again)
        assert [one for one, _ in stored(delivery, store)] == ["a", "b", "c", "d", "e"]


def test_by_text(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options("one", dedupe="text"), SCHEMA)
        send(sink, upload, 0, ("a", "same"), ("b", "same"), ("c", "other"))
        wait(upload)
        assert stored(delivery, store) == [("a", "same"), ("c", "other")]


@journaled
def test_rows_of_an_upload_without_dedupe_are_indexed_too(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, sink = delivery.open_upload(options("asks"), SCHEMA)
        plain, _ = delivery.open_upload(options("plain", dedupe="off"), SCHEMA)
        send(sink, plain, 0, ("a", "1"), ("a", "2"))
        wait(plain)
        send(sink, upload, 0, ("a", "3"), ("b", "4"))
        wait(upload)
        assert stored(delivery, store) == [("a", "1"), ("a", "2"), ("b", "4")]


@journaled
def test_two_uploads_at_once_do_not_both_store_an_id(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        uploads = [delivery.open_upload(options(f"u{n}"), SCHEMA) for n in range(4)]
        start = threading.Barrier(len(uploads))

        def feed(upload: Upload, sink: DatasetSink) -> None:
            start.wait(30)
            for first in range(0, 200, 5):
                send(sink, upload, first, *((f"id {first + n}", "text") for n in range(5)))

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
        direct, sink = delivery.open_upload(options("direct", durability="store"), SCHEMA)
        other, _ = delivery.open_upload(options("other"), SCHEMA)
        send(sink, direct, 0, ("a", "1"))
        sink.flush()
        assert store.waiting.wait(30)
        send(sink, other, 0, ("a", "2"), ("b", "3"))
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
        lost, sink = delivery.open_upload(options("lost"), SCHEMA)
        kept, _ = delivery.open_upload(options("kept"), SCHEMA)
        store.faults.append(("before", outage()))
        send(sink, lost, 0, ("a", "1"))
        wait(lost)
        assert lost.failure is not None
        send(sink, kept, 0, ("a", "2"))
        wait(kept)
        assert stored(delivery, store) == [("a", "2")]
        # And one that did, without an answer, is found to be there.
        store.faults.append(("after", outage()))
        unsure, _ = delivery.open_upload(options("unsure"), SCHEMA)
        send(sink, unsure, 0, ("b", "3"))
        wait(unsure)
        assert unsure.failure is not None
        send(sink, kept, 1, ("b", "4"), ("c", "5"))
        wait(kept)
        assert stored(delivery, store) == [("a", "2"), ("b", "3"), ("c", "5")]


@pytest.mark.parametrize("fault", ["before", "after"])
def test_an_id_in_doubt_is_not_decided_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    # Its append failed, and came to the store or not: until that is clear nobody decides.
    store = MemoryStore()
    turned_away = threading.Event()
    pending_error = DedupeIndex.pending_error

    def turns_away(index: DedupeIndex) -> StoreUnavailableError:
        turned_away.set()
        return pending_error(index)

    monkeypatch.setattr(DedupeIndex, "pending_error", turns_away)
    with delivering(store, tmp_path) as delivery:
        direct, sink = delivery.open_upload(options("direct", durability="store"), SCHEMA)
        other, _ = delivery.open_upload(options("other"), SCHEMA)
        store.faults.append((fault, PAUSE))
        send(sink, direct, 0, ("a", "1"), ("b", "1"))
        wait_for_doubt(sink)
        send(sink, other, 0, ("a", "2"), ("c", "2"))
        assert turned_away.wait(30)
        assert not other.covers(0, 1)
        # Meanwhile the committer goes on with rows that need no decision.
        plain, _ = delivery.open_upload(options("plain", dedupe="off"), SCHEMA)
        send(sink, plain, 0, ("a", "3"))
        wait(plain)
        assert plain.failure is None
        assert not other.covers(0, 1)
        try_again(sink)
        wait(direct)
        wait(other)
        assert (direct.failure, other.failure) == (None, None)
        rows = [("a", "1"), ("a", "3"), ("b", "1"), ("c", "2")]
        assert sorted(stored(delivery, store)) == rows
        counts = [upload.summary("m")["rows_deduplicated"] for upload in (direct, other)]
        assert counts == [0, 1]


def test_of_two_uploads_in_memory_the_second_waits_for_the_first_ones_doubt() -> None:
    store = MemoryStore()
    with delivering(store, None) as delivery:
        first, sink = delivery.open_upload(options("first"), SCHEMA)
        second, _ = delivery.open_upload(options("second"), SCHEMA)
        store.gate.clear()
        store.faults += [("before", outage()), ("after", outage())]
        send(sink, first, 0, ("a", "1"))
        assert store.waiting.wait(30)
        send(sink, second, 0, ("a", "2"), ("b", "2"))
        store.gate.set()
        wait(first)
        wait(second)
        assert (first.failure, second.failure) == (None, None)
        assert stored(delivery, store) == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize("refused", [True, False])
def test_rows_that_are_taken_together_do_not_count_on_each_other(refused: bool) -> None:
    def refuse(batches: Sequence[pa.RecordBatch]) -> FletcherError | None:
        bad = any("bad" in batch["text"].to_pylist() for batch in batches)
        return ColumnTypeError("bad") if bad and refused else None

    store = MemoryStore()
    store.refuse = refuse
    with delivering(store, None) as delivery:
        plain, sink = delivery.open_upload(options("plain", dedupe="off"), SCHEMA)
        bad, _ = delivery.open_upload(options("bad"), SCHEMA)
        good, _ = delivery.open_upload(options("good"), SCHEMA)
        store.gate.clear()
        send(sink, plain, 0, ("p", "1"))
        assert store.waiting.wait(30)
        send(sink, bad, 0, ("a", "bad"))  # these are taken together
        send(sink, good, 0, ("a", "1"), ("b", "1"))
        store.gate.set()
        wait(bad)
        wait(good)
        assert (bad.failure is not None) == refused
        kept = ("a", "1" if refused else "bad")
        assert stored(delivery, store) == [("p", "1"), kept, ("b", "1")]


def test_who_cannot_decide_is_told_to_come_again(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path, retry_s=0) as delivery:
        asks, sink = delivery.open_upload(options("asks"), SCHEMA)
        direct, _ = delivery.open_upload(options("direct", durability="store"), SCHEMA)
        plain, _ = delivery.open_upload(options("plain", dedupe="off"), SCHEMA)
        assert sink.dedupe_index.acquire_decision(0)
        send(sink, asks, 0, ("a", "1"))
        send(sink, plain, 0, ("a", "2"))
        wait(plain)
        for upload in (asks, direct):
            if upload is direct:
                send(sink, direct, 0, ("a", "3"))
            wait(upload)
            assert isinstance(upload.failure, StoreUnavailableError)
            assert upload.failure.field == "dedupe"
        delivery.open_upload(options("later", dedupe="off"), SCHEMA)
        sink.dedupe_index.release_decision()
        again, _ = delivery.open_upload(options("again"), SCHEMA)
        send(sink, again, 0, ("a", "4"), ("b", "4"))
        wait(again)
        assert stored(delivery, store) == [("a", "2"), ("b", "4")]


def test_rows_in_doubt_that_nobody_wants_any_more_let_others_decide(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        failed, sink = delivery.open_upload(options("failed", durability="store"), SCHEMA)
        other, _ = delivery.open_upload(options("other"), SCHEMA)
        store.faults.append(("after", PAUSE))
        send(sink, failed, 0, ("a", "1"))
        wait_for_doubt(sink)
        failed.fail(StoreUnavailableError("its connection is gone"))
        sink.committer.drop_abandoned()
        send(sink, other, 0, ("a", "2"))
        wait(other)
        assert other.failure is None
        assert other.summary("m")["rows_deduplicated"] == 1
        assert store.rows("d")["text"].to_pylist() == ["1"]


def test_rows_that_come_while_the_store_is_read_are_indexed(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        plain, sink = delivery.open_upload(options("plain", dedupe="off"), SCHEMA)
        read = store.scan

        def scan(dataset: str, **fields: Any) -> pa.RecordBatchReader:
            snapshot = read(dataset, **fields)
            send(sink, plain, 0, ("a", "1"))
            wait(plain)  # does not wait for the reader
            assert delivery.flush(30)
            return snapshot

        store.scan = scan  # type: ignore[method-assign]
        upload, _ = delivery.open_upload(options("one"), SCHEMA)
        send(sink, upload, 0, ("a", "2"), ("b", "2"))
        wait(upload)
        assert stored(delivery, store) == [("a", "1"), ("b", "2")]


def test_rows_that_an_earlier_process_journaled_are_indexed(tmp_path: Path) -> None:
    store = MemoryStore()
    store.down = PAUSE
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options("one"), SCHEMA)
        send(sink, upload, 0, ("a", "1"), ("b", "2"), ("a", "3"))
        wait(upload)
    assert not store.batches["d"]
    with delivering(store, tmp_path) as delivery:
        other, sink = delivery.open_upload(options("two"), SCHEMA)
        send(sink, other, 0, ("b", "4"), ("c", "5"))
        wait(other)
        again, _ = delivery.open_upload(options("one"), SCHEMA)
        assert again.counts()["rows_durable"] == 3
        send(sink, again, 3, ("c", "6"), ("d", "7"))
        again.announce_total(5)
        wait(again)
        assert again.complete
        store.down = None
        try_again(sink)
        assert sorted(stored(delivery, store)) == [("a", "1"), ("b", "2"), ("c", "5"), ("d", "7")]


@journaled
def test_a_group_of_nothing_but_duplicates_settles(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, sink = delivery.open_upload(options("one"), SCHEMA)
        send(sink, upload, 0, ("a", "1"))
        wait(upload)
        assert delivery.flush(30)
        appends = len(store.appends)
        send(sink, upload, 1, ("a", "2"), ("a", "3"))
        upload.announce_total(3)
        wait(upload)
        assert delivery.flush(30)
        assert upload.complete
        assert len(store.appends) == appends
        delivery.close_upload(upload, sink)
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, sink = delivery.open_upload(options("one"), SCHEMA)
        # The store does not know of rows that it never got: without a folder to note them in they
        # come again and go again.
        assert upload.claim_rows(0, 2) == ([] if journal else [(1, 2)])


@journaled
def test_a_row_that_failed_is_not_stored_and_may_come_again(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        upload, sink = delivery.open_upload(options("one"), SCHEMA)
        send(sink, upload, 0, ("a", None), ("a", "repaired"), ("a", "too late"))
        wait(upload)
        assert stored(delivery, store) == [("a", "repaired")]
        assert upload.counts()["rows_durable"] == 3


@journaled
def test_a_row_that_failed_into_a_store_without_null_vectors_is_not_indexed(
    tmp_path: Path, journal: bool
) -> None:
    # The upload that sent it drops no duplicates, and the store did not get it.
    store = MemoryStore(null_vectors=False)
    with delivering(store, where(tmp_path, journal)) as delivery:
        asking, sink = delivery.open_upload(options("two"), SCHEMA)
        upload, _ = delivery.open_upload(options("one", dedupe="off"), SCHEMA)
        send(sink, upload, 0, ("a", None), ("b", "fine"))
        wait(upload)
        send(sink, asking, 0, ("a", "repaired"), ("b", "again"))
        wait(asking)
        assert stored(delivery, store) == [("b", "fine"), ("a", "repaired")]


def test_what_failed_in_the_journal_of_an_earlier_process_is_not_indexed(tmp_path: Path) -> None:
    store = MemoryStore(null_vectors=False)
    store.down = outage()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options("one", dedupe="off"), SCHEMA)
        send(sink, upload, 0, ("a", None), ("b", "fine"))
        wait(upload)
    store.gate.clear()
    store.down = None
    with delivering(store, tmp_path) as delivery:
        asking, sink = delivery.open_upload(options("two"), SCHEMA)
        send(sink, asking, 0, ("a", "repaired"), ("b", "again"))
        wait(asking)
        store.gate.set()
        assert stored(delivery, store) == [("b", "fine"), ("a", "repaired")]


def test_duplicates_that_were_pending_when_an_upload_failed_count_once() -> None:
    # They counted when they were found, and once more when they were sent again.
    store = MemoryStore()
    with delivering(store, None) as delivery:
        first, sink = delivery.open_upload(options("first"), SCHEMA)
        send(sink, first, 0, ("a", "1"), ("b", "2"))
        wait(first)
        # The prefilter finds the first one, the committer the second.
        rows = batch_of([("a", "3"), ("b", "4"), ("c", "5")])
        failed, sink = delivery.open_upload(options("again"), SCHEMA)
        store.faults.append(("before", PAUSE))
        failed.claim_rows(0, 2)
        sink.submit_rows(Rows.from_batch(failed, rows, 0, (), lambda: None, duplicates=(0,)))
        wait_for_doubt(sink)
        failed.fail(StoreUnavailableError("its connection is gone"))
        delivery.close_upload(failed, sink)
        again, sink = delivery.open_upload(options("again"), SCHEMA)
        assert again.claim_rows(0, 2) == [(0, 2)]
        sink.submit_rows(Rows.from_batch(again, rows, 0, (), lambda: None, duplicates=(0,)))
        try_again(sink)
        wait(again)
        summary = again.summary("m")
        assert (summary["rows_deduplicated"], summary["rows_stored"]) == (2, 1)


def test_an_overwrite_forgets(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        for name in ("one", "two"):
            terms = options(name, mode="overwrite")
            upload, sink = delivery.open_upload(terms, SCHEMA)
            send(sink, upload, 0, ("a", name), ("a", "again"))
            wait(upload)
            upload.announce_total(2)
            delivery.complete_upload(terms, upload, sink)
            assert stored(delivery, store) == [("a", name)]


def test_a_dataset_that_somebody_dropped_has_no_duplicates(tmp_path: Path) -> None:
    # Rows counted as duplicates of rows that were gone, and were stored nowhere.
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        for name in ("one", "two"):
            upload, sink = delivery.open_upload(options(name), SCHEMA)
            send(sink, upload, 0, ("a", name))
            wait(upload)
            assert stored(delivery, store) == [("a", name)]
            store.delete_dataset("d")


@journaled
def test_delta_sends_rows_with_another_carried_column(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    carried = SCHEMA.append(pa.field("url", pa.utf8()))
    with delivering(store, where(tmp_path, journal)) as delivery:
        for name, url, num_sent in (("one", "u1", 1), ("two", "u2", 2), ("three", "u2", 2)):
            terms = options(name, dedupe="off", mode="delta")
            upload, sink = delivery.open_upload(terms, carried)
            batch = batch_of([("a", "same")]).append_column("url", pa.array([url]))
            received = pa.record_batch(
                {"id": batch["id"], "text": batch["text"], "carried:url": batch["url"]}
            )
            prefilter = DedupePrefilter(sink.dedupe_index, upload)
            found = prefilter.check_rows(received, 0)[0].tolist()
            assert found == [name == "three"]
            upload.claim_rows(0, 0)
            sink.submit_rows(Rows.from_batch(upload, batch, 0, (), lambda: None))
            wait(upload)
            assert delivery.flush(30)
            assert len(stored(delivery, store)) == num_sent
            delivery.close_upload(upload, sink)


@journaled
def test_delta_sends_what_is_new_or_changed(tmp_path: Path, journal: bool) -> None:
    store = MemoryStore()
    with delivering(store, where(tmp_path, journal)) as delivery:
        delta = {"dedupe": "off", "mode": "delta"}
        upload, sink = delivery.open_upload(options("one", **delta), SCHEMA)
        send(sink, upload, 0, ("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("a", "1"))
        wait(upload)
        # The last row of an id counts, so a change and the change back are both sent.
        sent = [("a", "1"), ("b", "2"), ("a", "3"), ("a", "1")]
        assert stored(delivery, store) == sent
        assert set(store.opened[1:]) <= {"upsert"}
        other, sink = delivery.open_upload(options("two", **delta), SCHEMA)
        prefilter = DedupePrefilter(sink.dedupe_index, other)
        rows = batch_of([("a", "1"), ("b", "new"), ("b", "2"), ("c", "1")])
        assert prefilter.check_rows(rows, 0)[0].tolist() == [True, False, False, False]
        # `b` is pending with another text: what the store has says nothing about later rows.
        assert prefilter.check_rows(batch_of([("b", "2"), ("a", "1")]), 4)[0].tolist() == [
            False,
            True,
        ]
        send(sink, other, 0, ("a", "1"), ("b", "new"), ("b", "2"), ("c", "1"))
        send(sink, other, 4, ("b", "2"), ("a", "1"))
        wait(other)
        assert stored(delivery, store)[4:] == [("b", "new"), ("b", "2"), ("c", "1")]
        assert prefilter.check_rows(batch_of([("b", "2"), ("c", "2")]), 6)[0].tolist() == [
            True,
            False,
        ]
        assert not prefilter._pending.keys() - set(fingerprints(pa.array(["c"])))


def test_a_dataset_that_does_not_fit_the_memory_is_refused_by_name(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path, dedupe_bytes=1000) as delivery:
        plain, sink = delivery.open_upload(options("plain", dedupe="off"), SCHEMA)
        send(sink, plain, 0, *((f"id {n}", "text") for n in range(10)))
        wait(plain)
        with pytest.raises(InvalidCommandError, match="--max-memory"):
            delivery.open_upload(options("one"), SCHEMA)
        # What was taken up so far is given back, and grows past the bound by nothing later.
        assert delivery._dedupe_memory.used_bytes == 0


def test_memory_is_released_with_the_sink(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options("one"), SCHEMA)
        send(sink, upload, 0, ("a", "1"))
        wait(upload)
        assert delivery._dedupe_memory.used_bytes > 0
    assert delivery._dedupe_memory.used_bytes == 0


def test_a_dataset_without_texts_cannot_be_compared_by_text(tmp_path: Path) -> None:
    store = MemoryStore()
    store.schemas["d"], store.batches["d"] = SCHEMA.remove(2), []
    with (
        delivering(store, tmp_path) as delivery,
        pytest.raises(InvalidCommandError, match="no column `text`"),
    ):
        delivery.open_upload(options("one", dedupe="text"), SCHEMA)


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
    monkeypatch.setattr("fletcher.delivery.dedupe.fingerprints._MERGE_ROWS", 50)
    # Ends in zeros, which numpy strips from bytes that are read one by one.
    keys = [bytes([n, 7]) + bytes(14) for n in range(200)]
    values = {key: bytes([n]) + bytes(15) for n, key in enumerate(keys)}
    entries = FingerprintMap(16)
    for first in range(0, 200, 20):
        entries.add_entries({key: values[key] for key in keys[first : first + 20]})
        entries.add_entries({keys[3]: bytes([first]) * 16})
    assert entries.find_values([*keys[:3], None, keys[3], b"x" * 16]) == [
        *(values[key] for key in keys[:3]),
        None,
        bytes([180]) * 16,
        None,
    ]
    assert entries.find_values(keys[4:]) == [values[key] for key in keys[4:]]
    assert entries.num_bytes >= 200 * 32
