"""Uploads and sinks against a store that fails before, after and while it stores."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fletcher.config.delivery import DeliveryConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery import sink as sink_module
from fletcher.delivery.actions import Staged
from fletcher.delivery.committer import Committer
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.delivery.opening import UploadOpener
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload
from fletcher.errors import (
    ColumnTypeError,
    FletcherError,
    InvalidCommandError,
    RequestError,
    StoreUnavailableError,
    UploadConflictError,
)
from fletcher.stores.address import open_store
from fletcher.stores.base import Store
from fletcher.stores.lance.store import LanceStore
from fletcher.telemetry.tracing import Telemetry
from tests.doubles.stores import MemoryStore, outage

SCHEMA = pa.schema({"id": pa.int64(), "vector": pa.list_(pa.float32(), 2)})
CONFIG = DeliveryConfig(
    group_rows=10, commit_rows=100, group_delay_ms=10, store_retry_s=30, store_timeout_s=60
)


@contextmanager
def delivering(
    store: Store, config: DeliveryConfig = CONFIG, **timing: float
) -> Iterator[Delivery]:
    delivery = Delivery({"default": store}, config, Telemetry(), timing=DeliveryTiming(**timing))
    try:
        yield delivery
    finally:
        if isinstance(store, MemoryStore):
            store.gate.set()
        delivery.close()


def options(**fields: Any) -> EmbedCommand:
    return EmbedCommand(**{"dataset": "d", "upload_id": "u", **fields})


def send(
    sink: DatasetSink, upload: Upload, first: int, num_rows: int, failed: tuple[int, ...] = ()
) -> threading.Event:
    """Claims and queues rows whose ids are their offsets."""
    assert upload.claim_rows(first, first + num_rows - 1) == [(first, first + num_rows - 1)]
    vectors = [None if row in failed else [1.0, 0.0] for row in range(num_rows)]
    batch = pa.record_batch(
        {
            "id": pa.array(range(first, first + num_rows), pa.int64()),
            "vector": pa.array(vectors, SCHEMA.field("vector").type),
        },
        schema=SCHEMA,
    )
    released = threading.Event()
    sink.submit_rows(Rows.from_batch(upload, batch, first, failed, released.set))
    return released


def settled(upload: Upload) -> bool:
    with upload.changed:
        return upload.changed.wait_for(
            lambda: upload.in_flight == 0 or upload.failure is not None, timeout=30
        )


def ids(store: MemoryStore) -> list[int]:
    return store.rows("d").column("id").to_pylist()


def test_rows_of_an_upload_are_joined_into_keyed_groups() -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        released = [send(sink, upload, first, 4) for first in (0, 4, 8, 12)]
        store.gate.set()
        assert settled(upload)
        assert all(one.wait(30) for one in released)
        assert ids(store) == list(range(16))
        assert all(len(range(*_extent(key))) <= 10 for key in store.keys("d"))
        assert upload.counts() == {
            "rows_received": 16,
            "rows_stored": 16,
            "rows_failed": 0,
            "rows_durable": 16,
        }


def _extent(key: str) -> tuple[int, int]:
    first, last = key.split(":")[1].split("-")
    return int(first), int(last) + 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_outage_neither_loses_nor_doubles(when: str) -> None:
    store = MemoryStore()
    store.faults.extend([(when, outage()), None, (when, outage()), (when, outage())])
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        for first in range(0, 60, 5):
            send(sink, upload, first, 5)
        assert settled(upload)
        assert sorted(ids(store)) == list(range(60))
        assert upload.failure is None


def test_an_outage_that_outlasts_the_patience_fails_the_upload_and_can_be_resumed() -> None:
    store = MemoryStore()
    config = DeliveryConfig(
        group_rows=10, commit_rows=100, group_delay_ms=10, store_retry_s=0, store_timeout_s=60
    )
    with delivering(store, config) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 5)
        assert settled(upload)
        # The rows arrive, the answer does not: the client cannot know, the store can.
        store.faults.append(("after", outage()))
        released = send(sink, upload, 5, 5)
        assert settled(upload)
        assert released.wait(30)
        assert isinstance(upload.failure, StoreUnavailableError)
        assert upload.summary("m")["complete"] is False
        delivery.close_upload(upload, sink)

        again, sink = delivery.open_upload(options(), SCHEMA)
        assert again.failure is None
        assert again.counts()["rows_durable"] == 10
        assert again.claim_rows(0, 11) == [(10, 11)]


def test_an_upsert_stays_one_over_an_outage_and_beside_other_uploads() -> None:
    # The mode was the writer's, and forgotten with it: the retry appended, and ids came twice.
    store = MemoryStore()
    with delivering(store) as delivery:
        upsert, sink = delivery.open_upload(options(upload_id="one", mode="upsert"), SCHEMA)
        store.faults.append(("before", outage()))
        send(sink, upsert, 0, 5)
        assert settled(upsert)
        assert store.opened == ["upsert", "upsert"]
        plain, _ = delivery.open_upload(options(upload_id="other"), SCHEMA)
        send(sink, upsert, 5, 5)
        assert settled(upsert)
        assert store.opened[2:] == ["append", "upsert"]
        send(sink, plain, 0, 5)
        assert settled(plain)
        assert store.opened[4:] == ["append"]


def test_vectors_of_another_kind_are_shown_to_the_store_though_the_columns_are_the_same() -> None:
    # pyarrow compares schemas without metadata: the open writer took rows of another normalisation.
    store = MemoryStore()
    with delivering(store) as delivery:
        delivery.open_upload(
            options(upload_id="one"), SCHEMA.with_metadata({"fletcher.normalized": "1"})
        )
        delivery.open_upload(
            options(upload_id="two"), SCHEMA.with_metadata({"fletcher.normalized": "0"})
        )
        assert store.opened == ["append", "append"]


def test_one_uploads_refusal_leaves_others_alone() -> None:
    store = MemoryStore()
    store.refuse = lambda batches: (
        ColumnTypeError("not this") if any(_has_id(batch, 7) for batch in batches) else None
    )
    store.gate.clear()
    with delivering(store) as delivery:
        good, sink = delivery.open_upload(options(upload_id="good"), SCHEMA)
        bad, _ = delivery.open_upload(options(upload_id="bad"), SCHEMA)
        send(sink, good, 100, 3)
        send(sink, bad, 7, 1)
        store.gate.set()
        assert settled(good)
        assert settled(bad)
        assert isinstance(bad.failure, RequestError)
        assert good.failure is None
        assert ids(store) == [100, 101, 102]


def _has_id(batch: pa.RecordBatch, number: int) -> bool:
    return number in batch.column("id").to_pylist()


def test_a_store_that_breaks_after_it_stored_does_not_get_the_rows_twice() -> None:
    # When an append of several uploads failed, each was sent alone, unasked what had arrived.
    store = MemoryStore()
    store.gate.clear()
    store.faults.append(("after", ZeroDivisionError("a defect of the store's client")))
    with delivering(store) as delivery:
        one, sink = delivery.open_upload(options(upload_id="one"), SCHEMA)
        two, _ = delivery.open_upload(options(upload_id="two"), SCHEMA)
        send(sink, one, 0, 3)
        send(sink, two, 3, 3)
        store.gate.set()
        assert settled(one)
        assert settled(two)
        assert ids(store) == list(range(6))


def test_rows_that_cannot_be_prepared_fail_their_upload_and_leave_the_dataset_usable() -> None:
    # An error outside the store's call ended the committer's thread, which stayed the dataset's:
    # its uploads never settled, and later openings waited for ever.
    store = MemoryStore()
    with delivering(store, dataclasses.replace(CONFIG, store_retry_s=0.1)) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        upload.claim_rows(0, 1)
        sink.submit_rows(Rows.from_batch(upload, _Broken(), 0, (), lambda: None))  # type: ignore[arg-type]
        assert settled(upload)
        assert upload.failure is not None
        delivery.close_upload(upload, sink)
        other, sink = delivery.open_upload(options(upload_id="other"), SCHEMA)
        send(sink, other, 0, 5)
        assert settled(other)
        assert ids(store) == list(range(5))


class _Broken:
    """A batch that cannot be joined to others."""

    num_rows = 2
    nbytes = 16
    schema = SCHEMA


def test_a_committer_that_has_ended_refuses_at_once() -> None:
    store = MemoryStore()
    delivery = Delivery({"default": store}, CONFIG, Telemetry())
    upload, sink = delivery.open_upload(options(), SCHEMA)
    delivery.close()
    released = send(sink, upload, 0, 5)
    assert released.wait(30)
    assert isinstance(upload.failure, StoreUnavailableError)
    assert isinstance(
        sink.committer.request_opening(SCHEMA, "append").exception(5), StoreUnavailableError
    )
    with pytest.raises(StoreUnavailableError):
        delivery.open_upload(options(upload_id="late"), SCHEMA)


def test_an_append_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Joined texts of 2 GiB overflow the offsets of utf8.
    monkeypatch.setattr("fletcher.delivery.commit_queue._COMMIT_BYTES", 100)
    store = MemoryStore()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        store.gate.clear()
        send(sink, upload, 0, 3)
        assert store.waiting.wait(30)
        for first in range(3, 12, 3):
            send(sink, upload, first, 3)
        store.gate.set()
        assert settled(upload)
        assert ids(store) == list(range(12))
        assert [sum(batch.num_rows for batch in one) for one in store.appends] == [3, 6, 3]


def test_rows_that_fill_an_append_by_their_bytes_wait_for_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only their number counted: with long texts or wide vectors every append waited for its delay.
    monkeypatch.setattr("fletcher.delivery.commit_queue._COMMIT_BYTES", 100)
    store = MemoryStore()
    with delivering(store, dataclasses.replace(CONFIG, group_delay_ms=60000)) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 7)
        assert settled(upload)


def test_rows_of_a_failed_upload_leave_at_once_though_the_store_is_away() -> None:
    # They left when they were due: uploads that failed one after the other filled the memory.
    store = MemoryStore()
    with delivering(store) as delivery:
        going, sink = delivery.open_upload(options(upload_id="going"), SCHEMA)
        failing, _ = delivery.open_upload(options(upload_id="failing"), SCHEMA)
        store.gate.clear()
        send(sink, going, 0, 5)
        assert store.waiting.wait(30)
        released = send(sink, failing, 0, 5)
        kept = send(sink, going, 5, 5)
        failing.fail(RequestError("a bad row"))
        delivery.close_upload(failing, sink)
        assert released.is_set()
        assert not kept.is_set()
        store.gate.set()
        assert settled(going)
        assert ids(store) == list(range(10))


@pytest.mark.parametrize(("mode", "kept"), [("append", [0, 1, 2]), ("upsert", [0, 2])])
def test_failed_rows_of_an_upsert_replace_nothing(mode: str, kept: list[int]) -> None:
    # They took the vector from the stored row, and rows without an id replaced each other.
    store = MemoryStore(null_vectors=True)
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(mode=mode), SCHEMA)
        send(sink, upload, 0, 3, failed=(1,))
        upload.report_failed_row(1, 1, InvalidCommandError("`text` is null"))
        assert settled(upload)
        assert ids(store) == kept
        counts = upload.counts()
        assert (counts["rows_stored"], counts["rows_durable"]) == (len(kept), 3)


def test_failed_rows_are_kept_back_where_the_store_takes_no_null_vectors() -> None:
    for null_vectors, expected in ((False, [0, 2]), (True, [0, 1, 2])):
        store = MemoryStore(null_vectors=null_vectors)
        with delivering(store) as delivery:
            upload, sink = delivery.open_upload(options(), SCHEMA)
            send(sink, upload, 0, 3, failed=(1,))
            upload.report_failed_row(1, 1, InvalidCommandError("`text` is null"))
            assert settled(upload)
            assert ids(store) == expected
            counts = upload.counts()
            assert counts["rows_stored"] == len(expected)
            assert (counts["rows_failed"], counts["rows_durable"]) == (1, 3)


def test_a_reconnected_client_does_not_send_pending_rows_twice() -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 5)
        assert store.waiting.wait(30)
        delivery.close_upload(upload, sink)
        opening: list[Upload] = []
        # The committer opens nothing while it stores, so that the store can be asked what arrived.
        reopen = threading.Thread(
            target=lambda: opening.append(delivery.open_upload(options(), SCHEMA)[0])
        )
        reopen.start()
        store.gate.set()
        reopen.join(30)
        assert opening == [upload]
        assert upload.claim_rows(0, 9) == [(5, 9)]


def test_after_a_restart_the_store_tells_what_is_there() -> None:
    store = MemoryStore()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 25)
        assert settled(upload)
    with delivering(store) as delivery:
        status = delivery.upload_status(options())
        assert status == {"rows_durable": 25, "ranges": [[0, 24]], "complete": False}
        upload, sink = delivery.open_upload(options(), SCHEMA)
        assert upload.claim_rows(0, 30) == [(25, 30)]
        assert upload.counts()["rows_stored"] == 25


@pytest.mark.parametrize("durable", [True, False])
def test_rows_that_a_store_lost_are_noticed_at_the_end_of_their_upload(durable: bool) -> None:
    store = MemoryStore()
    can = dataclasses.replace(store.capabilities, durable=durable, counts_groups=True)
    store.capabilities = can
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 3)
        assert settled(upload)
        send(sink, upload, 3, 3, failed=(1,))
        assert settled(upload)
        lost = store.batches["d"].pop()
        upload.announce_total(6)
        delivery.complete_upload(options(), upload, sink)
        delivery.close_upload(upload, sink)
        if durable:  # such a store is not asked
            assert upload.complete
            return
        assert isinstance(upload.failure, StoreUnavailableError)
        assert "has 3 of the 6 rows" in upload.failure.message
        again, sink = delivery.open_upload(options(), SCHEMA)
        assert again.claim_rows(0, 5) == [(3, 5)]
        store.batches["d"].append(lost)
        again.settle_rows(3, 5, stored=3)
        again.announce_total(6)
        delivery.complete_upload(options(), again, sink)
        assert again.complete
        assert again.failure is None


def overwrite(delivery: Delivery, first: int, num_rows: int, upload_id: str = "u") -> Upload:
    """Overwrite the dataset by rows `first` to the end."""
    terms = options(upload_id=upload_id, mode="overwrite")
    upload, sink = delivery.open_upload(terms, SCHEMA)
    send(sink, upload, first, num_rows)
    assert settled(upload)
    upload.announce_total(first + num_rows)
    delivery.complete_upload(terms, upload, sink)
    delivery.close_upload(upload, sink)
    return upload


def complete_again(delivery: Delivery, terms: EmbedCommand, num_rows: int) -> None:
    """Resume an upload, all of whose rows are stored, to its end."""
    upload, sink = delivery.open_upload(terms, SCHEMA)
    assert upload.claim_rows(0, num_rows - 1) == []
    upload.announce_total(num_rows)
    delivery.complete_upload(terms, upload, sink)
    assert upload.complete


def test_an_overwrite_takes_effect_once_it_is_whole() -> None:
    # The dataset was emptied at its beginning.
    store = MemoryStore()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(upload_id="old"), SCHEMA)
        send(sink, upload, 0, 3)
        assert settled(upload)
        terms = options(mode="overwrite")
        upload, sink = delivery.open_upload(terms, SCHEMA)
        send(sink, upload, 0, 4)
        assert settled(upload)
        upload.announce_total(8)
        delivery.complete_upload(terms, upload, sink)
        delivery.close_upload(upload, sink)
        assert not upload.complete
        assert ids(store) == list(range(3))
        assert delivery.upload_status(options()) == {
            "rows_durable": 4,
            "ranges": [[0, 3]],
            "complete": False,
        }
    with delivering(store) as delivery:  # resumed after a restart
        assert delivery.upload_status(options())["ranges"] == [[0, 3]]
        upload, sink = delivery.open_upload(terms, SCHEMA)
        assert upload.claim_rows(0, 7) == [(4, 7)]
        delivery.close_upload(upload, sink)
    with delivering(store) as delivery:
        assert overwrite(delivery, 4, 4).complete
        assert ids(store) == list(range(8))
        assert list(store.batches) == ["d"]
        assert delivery.upload_status(options())["complete"]
    with delivering(store) as delivery:  # it is sent once more, and is there already
        upload, sink = delivery.open_upload(terms, SCHEMA)
        assert upload.claim_rows(0, 7) == []
        upload.announce_total(8)
        delivery.complete_upload(terms, upload, sink)
        assert upload.complete
        assert delivery.upload_status(options())["complete"]
    assert ids(store) == list(range(8))
    assert store.replaced == ["d"]


def test_a_store_that_fails_to_replace_keeps_the_old_rows() -> None:
    store = MemoryStore()
    with delivering(store) as delivery:
        overwrite(delivery, 0, 3, "old")
        terms = options(mode="overwrite")
        upload, sink = delivery.open_upload(terms, SCHEMA)
        send(sink, upload, 0, 5)
        assert settled(upload)
        upload.announce_total(5)
        store.down = StoreUnavailableError("away")
        with pytest.raises(StoreUnavailableError):
            delivery.complete_upload(terms, upload, sink)
        upload.fail(store.down)
        delivery.close_upload(upload, sink)
        assert ids(store) == list(range(3))
        store.down = None
    with delivering(store) as delivery:
        complete_again(delivery, terms, 5)
    assert ids(store) == list(range(5))


def test_a_staged_dataset_that_outlived_its_replacement_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server was killed just before, and the rows stayed there for good.
    def killed(self: LanceStore, name: str) -> None:
        raise StoreUnavailableError("killed")

    terms = options(mode="overwrite")
    with (
        monkeypatch.context() as patch,
        delivering(open_store(f"lance:{tmp_path}")) as delivery,
        pytest.raises(StoreUnavailableError, match="killed"),
    ):
        patch.setattr(LanceStore, "_drop", killed)
        overwrite(delivery, 0, 3, "old")
        overwrite(delivery, 0, 5)
    store = open_store(f"lance:{tmp_path}")
    assert [info.num_rows for info in store.datasets()] == [5]
    assert [info.num_rows for info in store.staged_datasets()] == [5]
    with delivering(store) as delivery:
        complete_again(delivery, terms, 5)
        assert store.staged_datasets() == []
        assert [info.num_rows for info in store.datasets()] == [5]


def test_two_connections_of_one_overwrite_share_its_rows() -> None:
    store = MemoryStore()
    terms = options(mode="overwrite")
    with delivering(store) as delivery:
        opened = [delivery.open_upload(terms, SCHEMA) for _ in range(2)]
        (upload, sink), (other, same) = opened
        assert upload is other
        assert sink is same
        send(sink, upload, 0, 2)
        send(same, other, 2, 2)
        assert settled(upload)
        upload.announce_total(4)
        for one, its_sink in opened:
            delivery.complete_upload(terms, one, its_sink)
            delivery.close_upload(one, its_sink)
        assert upload.complete
    assert ids(store) == list(range(4))


@pytest.mark.parametrize("change", ["overwritten", "dropped", "dropped and made anew"])
@pytest.mark.parametrize("connected", [True, False])
def test_an_upload_is_told_that_its_rows_are_gone(change: str, connected: bool) -> None:
    # Its rows still counted as durable, and a resend was taken for a repeat.
    store = MemoryStore()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(upload_id="a"), SCHEMA)
        send(sink, upload, 0, 3)
        assert settled(upload)
        if not connected:
            delivery.close_upload(upload, sink)
        if change == "overwritten":
            overwrite(delivery, 0, 2, "b")
        else:
            store.delete_dataset("d")
        if change == "dropped and made anew":
            store.open_writer("d", store.schemas["d"], "append")
        if connected:
            delivery.complete_upload(options(upload_id="a"), upload, sink)
            assert isinstance(upload.failure, UploadConflictError)
            assert upload.counts()["rows_durable"] == 0
            delivery.close_upload(upload, sink)
        nothing = {"rows_durable": 0, "ranges": [], "complete": False}
        assert delivery.upload_status(options(upload_id="a")) == nothing
        again, sink = delivery.open_upload(options(upload_id="a"), SCHEMA)
        assert again.claim_rows(0, 2) == [(0, 2)]


def test_an_upload_is_told_that_its_dataset_was_deleted_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its rows counted as stored, whatever became of later datasets of that name.
    store = MemoryStore()
    with delivering(store) as delivery:
        begin = UploadOpener.begin

        def deleted_at_once(*arguments: Any, **named: Any) -> Upload:
            upload = begin(*arguments, **named)
            store.delete_dataset("d")
            return upload

        with monkeypatch.context() as patch:
            patch.setattr(UploadOpener, "begin", deleted_at_once)
            upload, sink = delivery.open_upload(options(), SCHEMA)
        store.open_writer("d", SCHEMA.append(pa.field("batch_key", pa.utf8())), "append")
        send(sink, upload, 0, 3)
        assert settled(upload)
        delivery.close_upload(upload, sink)
        store.delete_dataset("d")
        store.open_writer("d", SCHEMA.append(pa.field("batch_key", pa.utf8())), "append")
        assert delivery.upload_status(options())["ranges"] == []
        again, sink = delivery.open_upload(options(), SCHEMA)
        assert again.claim_rows(0, 2) == [(0, 2)]


def test_two_uploads_that_make_one_dataset_do_not_end_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()
    with delivering(store) as delivery:
        first: list[Upload] = []
        read = store.incarnation

        def read_before_another_upload(name: str) -> str | None:
            missing = read(name)
            monkeypatch.setattr(store, "incarnation", read)
            first.append(delivery.open_upload(options(upload_id="a"), SCHEMA)[0])
            return missing

        monkeypatch.setattr(store, "incarnation", read_before_another_upload)
        second, _ = delivery.open_upload(options(upload_id="b"), SCHEMA)
        assert first[0].failure is None
        assert first[0].incarnation == second.incarnation == read("d")


def test_one_upload_id_cannot_mean_two_things() -> None:
    with delivering(MemoryStore()) as delivery:
        delivery.open_upload(options(), SCHEMA)
        other = SCHEMA.append(pa.field("extra", pa.utf8()))
        with pytest.raises(UploadConflictError) as caught:
            delivery.open_upload(options(), other)
        assert caught.value.field == "upload_id"


def test_memory_durability_never_claims_to_be_durable() -> None:
    store = MemoryStore()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(durability="memory"), SCHEMA)
        send(sink, upload, 0, 5)
        assert settled(upload)
        assert upload.counts()["rows_durable"] == 0
        assert upload.counts()["rows_stored"] == 5


def test_complete_needs_the_announced_number_and_no_gap() -> None:
    store = MemoryStore()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 5, 5)
        assert settled(upload)
        upload.announce_total(10)
        assert not upload.complete
        send(sink, upload, 0, 5)
        assert settled(upload)
        assert upload.complete
        upload.announce_total(11)
        assert not upload.complete


def test_an_unknown_store_is_named_with_those_there_are() -> None:
    with delivering(MemoryStore()) as delivery, pytest.raises(InvalidCommandError) as caught:
        delivery.open_upload(options(store="elsewhere"), SCHEMA)
    assert caught.value.allowed == ["default"]


def test_a_store_that_refuses_to_open_refuses_the_upload() -> None:
    store = MemoryStore()

    def refuse(*_: Any) -> Any:
        raise StoreUnavailableError("nothing there")

    store.open_writer = refuse  # type: ignore[method-assign]
    with delivering(store) as delivery:
        with pytest.raises(FletcherError, match="nothing there"):
            delivery.open_upload(options(), SCHEMA)
        assert delivery.upload_status(options())["rows_durable"] == 0


def test_shutting_down_gives_up_what_is_queued_and_says_so() -> None:
    store = MemoryStore()
    store.gate.clear()
    delivery = Delivery({"default": store}, CONFIG, Telemetry())
    upload, sink = delivery.open_upload(options(), SCHEMA)
    send(sink, upload, 0, 5)
    assert store.waiting.wait(30)
    released = send(sink, upload, 5, 5)
    closer = threading.Thread(target=delivery.close)
    closer.start()
    while not sink.committer._queue.stopped:
        closer.join(0.001)
    store.gate.set()
    closer.join(30)
    assert released.wait(30)
    assert ids(store) == list(range(5))
    assert isinstance(upload.failure, StoreUnavailableError)


def test_a_replacement_does_not_wait_for_what_comes_after_it() -> None:
    # Behind a steady upload it waited for ever, and all openings behind it.
    store = MemoryStore()
    store.gate.clear()
    with_key = SCHEMA.append(pa.field("batch_key", pa.utf8()))
    store.open_writer("d.staged-0123456789abcdef", with_key, "append")
    staged = Staged("d.staged-0123456789abcdef", "i", [])
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 5)
        assert store.waiting.wait(30)
        replaced = sink.committer.request_replacement(staged)
        send(sink, upload, 5, 5)
        store.gate.set()
        assert replaced.result(30) is None
        assert settled(upload)
        assert ids(store) == list(range(5, 10))


def test_a_replacement_whose_caller_stopped_waiting_does_not_happen() -> None:
    # The caller was told that it had failed, and later the dataset was emptied all the same.
    store = MemoryStore()
    store.gate.clear()
    with delivering(store) as delivery:
        upload, sink = delivery.open_upload(options(upload_id="old"), SCHEMA)
        send(sink, upload, 0, 5)
        assert store.waiting.wait(30)
        assert sink.committer.request_replacement(Staged("gone", "i", [])).cancel()
        store.gate.set()
        assert settled(upload)
        assert sink.committer.request_opening(SCHEMA, "append").result(30) is None
        assert ids(store) == list(range(5))
        assert store.replaced == []


@pytest.mark.parametrize("in_use", [True, False])
def test_a_sink_ends_after_its_writer(monkeypatch: pytest.MonkeyPatch, in_use: bool) -> None:
    # A new sink could open the dataset while the writer still held its lock.
    has_writer: list[bool] = []
    asked, retire = threading.Event(), Delivery._retire_sink

    def asks(delivery: Delivery, sink: DatasetSink) -> bool:
        has_writer.append(sink.committer._sender._writer is not None)
        asked.set()
        return retire(delivery, sink)

    monkeypatch.setattr(Delivery, "_retire_sink", asks)
    with delivering(MemoryStore(), committer_linger_s=0.05) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        if in_use:
            assert not asked.wait(0.3)
            assert sink.committer._sender._writer is not None
        else:
            delivery.close_upload(upload, sink)
            sink.committer.thread.join(30)
            assert has_writer == [False]


def test_a_sink_is_in_use_before_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine that paused for a while its sink asked too early, and failed for good.
    asked, may_end = threading.Event(), DatasetSink._may_end

    def asks(sink: DatasetSink) -> bool:
        try:
            return may_end(sink)
        finally:
            asked.set()

    def slow(*arguments: Any, **fields: Any) -> Committer:
        sink = Committer(*arguments, **fields)
        assert asked.wait(30)
        return sink

    monkeypatch.setattr(DatasetSink, "_may_end", asks)
    monkeypatch.setattr(sink_module, "Committer", slow)
    with delivering(MemoryStore(), committer_linger_s=0.01) as delivery:
        _, sink = delivery.open_upload(options(), SCHEMA)
        assert sink.committer.thread.is_alive()


def test_rows_that_cannot_be_let_go_leave_the_others_of_their_append_alone() -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store) as delivery:
        first, sink = delivery.open_upload(options(upload_id="first"), SCHEMA)
        bad, _ = delivery.open_upload(options(upload_id="bad"), SCHEMA)
        good, _ = delivery.open_upload(options(upload_id="good"), SCHEMA)
        send(sink, first, 0, 1)
        assert store.waiting.wait(30)

        failing = True

        def fails() -> None:
            if failing:
                raise ZeroDivisionError

        bad.claim_rows(0, 0)
        batch = pa.record_batch(
            [pa.array([1], pa.int64()), pa.array([[1, 0]], SCHEMA[1].type)], schema=SCHEMA
        )
        sink.submit_rows(Rows.from_batch(bad, batch, 0, (), fails))
        released = send(sink, good, 2, 3)
        store.gate.set()
        assert settled(good)
        assert released.wait(30)
        assert (bad.failure, good.failure) == (None, None)
        assert len(store.appends) == 2
        failing = False
