"""Uploads through the journal: outages, crashes, full journals, refusals."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fletcher.config.delivery import DeliveryConfig, JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.rejected import RejectedGroups
from fletcher.delivery.journal.root import JournalSpace, revive_segments
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload
from fletcher.errors import (
    ColumnTypeError,
    ConfigError,
    InternalError,
    InvalidCommandError,
    JournalFullError,
    StoreUnavailableError,
    UploadConflictError,
)
from fletcher.stores.staging import staged_name
from fletcher.telemetry.tracing import Telemetry
from tests.doubles.stores import MemoryStore, outage

SCHEMA = pa.schema({"id": pa.int64(), "vector": pa.list_(pa.float32(), 2)})
CONFIG = DeliveryConfig(
    group_rows=10, commit_rows=100, group_delay_ms=10, store_retry_s=30, store_timeout_s=60
)
# Journaled rows wait in the committer.
SLOW = dataclasses.replace(CONFIG, group_delay_ms=600000)


@contextmanager
def delivering(
    store: MemoryStore,
    folder: Path,
    config: DeliveryConfig = CONFIG,
    timing: DeliveryTiming | None = None,
    **journal: Any,
) -> Iterator[Delivery]:
    fields = {"max_bytes": 1 << 30, "segment_bytes": 1 << 16, "retention_s": 0.0, **journal}
    journal_config = JournalConfig(folder=folder, **fields)
    delivery = Delivery({"default": store}, config, Telemetry(), journal_config, timing)
    delivery.recover()
    try:
        yield delivery
    finally:
        store.gate.set()
        delivery.close()


def options(**fields: Any) -> EmbedCommand:
    return EmbedCommand(**{"dataset": "d", "upload_id": "u", **fields})


def send(
    sink: DatasetSink, upload: Upload, first: int, num_rows: int, chunks: int = 1
) -> threading.Event:
    assert upload.claim_rows(first, first + num_rows - 1) == [(first, first + num_rows - 1)]
    ids = pa.array(np.repeat(np.arange(first, first + num_rows), chunks))
    vectors = pa.array([[1.0, 0.0]] * num_rows * chunks, SCHEMA.field("vector").type)
    released = threading.Event()
    batch = pa.record_batch([ids, vectors], schema=SCHEMA)
    rows = Rows.from_batch(upload, batch, first, (), released.set, num_rows=num_rows)
    sink.submit_rows(rows)
    return released


def wait(upload: Upload, condition: Callable[[], bool]) -> bool:
    with upload.changed:
        return upload.changed.wait_for(condition, timeout=30)


def durable(upload: Upload, num_rows: int) -> bool:
    return wait(upload, lambda: upload.counts()["rows_durable"] == num_rows)


def stored(upload: Upload, num_rows: int) -> bool:
    return wait(upload, lambda: upload.counts()["rows_stored"] == num_rows)


def ids(store: MemoryStore) -> list[int]:
    return sorted(store.rows("d").column("id").to_pylist())


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.glob("*/d/0*"))


def test_rows_are_durable_before_they_are_stored_and_their_memory_is_free(tmp_path: Path) -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        released = [send(sink, upload, first, 5) for first in range(0, 50, 5)]
        assert durable(upload, 50)
        assert all(one.wait(30) for one in released)
        assert upload.counts()["rows_stored"] == 0
        assert upload.in_flight == 0
        store.gate.set()
        assert stored(upload, 50)
        assert ids(store) == list(range(50))
        assert delivery.flush(10)
    assert files(tmp_path) == []


def test_what_is_stored_is_on_disk_before_journaled_rows_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After a power loss the replaced rows were sent again, and then were there twice.
    store, appends_at_sync = MemoryStore(), []
    sync_notes = Journal.sync_notes

    def note(self: Journal, before: Any = None) -> None:
        appends_at_sync.append(len(store.appends))
        sync_notes(self, before)

    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert stored(upload, 10)
        monkeypatch.setattr(Journal, "sync_notes", note)
        upload, sink = delivery.open_upload(options(upload_id="v", mode="upsert"), SCHEMA)
        send(sink, upload, 0, 10)
        assert stored(upload, 10)
    assert appends_at_sync[0] == 1


@pytest.mark.parametrize("connected", [True, False])
def test_rows_that_wait_while_their_dataset_is_deleted_are_stored_once(
    tmp_path: Path, connected: bool
) -> None:
    # The client was told to send all rows again, and these were stored beside the journaled ones.
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        lost, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, lost, 0, 10)
        assert durable(lost, 10)
        sink.flush()
        assert stored(lost, 10)
        send(sink, lost, 10, 6)
        assert durable(lost, 16)
        store.delete_dataset("d")
        if not connected:
            delivery.close_upload(lost, sink)
        status = delivery.upload_status(options())
        assert (status["ranges"], status["complete"]) == ([[10, 15]], False)
        again, sink = delivery.open_upload(options(), SCHEMA)
        assert isinstance(lost.failure, UploadConflictError)
        assert again.claim_rows(10, 15) == []
        send(sink, again, 0, 10)
        send(sink, again, 16, 4)
        assert durable(again, 20)
        sink.flush()
        assert stored(again, 20)
        assert ids(store) == list(range(20))


def test_after_a_crash_what_was_acknowledged_reaches_the_store_once(tmp_path: Path) -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 30)
        assert durable(upload, 30)
        # The first append hangs; closing is as good as a crash for what is on disk.
        for one in delivery._all_sinks():
            one.committer._queue.stopped = True
    before = ids(store)
    with delivering(store, tmp_path) as delivery:
        status = delivery.upload_status(options())
        assert status["rows_durable"] == 30
        upload, sink = delivery.open_upload(options(), SCHEMA)
        assert upload.claim_rows(0, 39) == [(30, 39)]
        assert stored(upload, 30)
        assert ids(store) == list(range(30))
    assert len(before) in (0, 30)
    assert files(tmp_path) == []


def test_a_crash_between_the_stores_commit_and_the_journals_knowledge(tmp_path: Path) -> None:
    store = MemoryStore()
    patience = DeliveryConfig(
        group_rows=10, commit_rows=100, group_delay_ms=10, store_retry_s=0, store_timeout_s=60
    )
    store.faults.append(("after", outage()))
    with delivering(store, tmp_path, patience) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
        while not store.appends:
            time.sleep(0.001)
        for one in delivery._all_sinks():
            one.committer.close()
    assert ids(store) == list(range(10))
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        assert upload.counts()["rows_durable"] == 10
        assert delivery.flush(10)
        assert upload.counts()["rows_stored"] == 10
    assert ids(store) == list(range(10))
    assert files(tmp_path) == []


def test_an_outage_costs_no_error_however_long(tmp_path: Path) -> None:
    store = MemoryStore()
    patience = DeliveryConfig(
        group_rows=10, commit_rows=100, group_delay_ms=10, store_retry_s=0, store_timeout_s=60
    )
    store.faults.extend([("before", outage()), ("after", outage()), ("before", outage())])
    with delivering(store, tmp_path, patience) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        for first in range(0, 40, 10):
            send(sink, upload, first, 10)
        assert stored(upload, 40)
        assert upload.failure is None
        assert ids(store) == list(range(40))


def test_a_full_journal_holds_clients_back_then_says_so(tmp_path: Path) -> None:
    store = MemoryStore()
    store.gate.clear()
    patience = DeliveryConfig(
        group_rows=10, commit_rows=10, group_delay_ms=0, store_retry_s=0.3, store_timeout_s=60
    )
    with delivering(store, tmp_path, patience, max_bytes=1000, segment_bytes=1) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 40)
        assert durable(upload, 40)
        released = send(sink, upload, 40, 10)
        assert wait(upload, lambda: upload.failure is not None)
        assert isinstance(upload.failure, JournalFullError)
        assert upload.failure.retry_after_ms is not None
        assert released.wait(30)
        delivery.close_upload(upload, sink)
        store.gate.set()
        assert delivery.flush(10)
        again, sink = delivery.open_upload(options(), SCHEMA)
        assert again.claim_rows(0, 49) == [(40, 49)]
        assert again.counts()["rows_stored"] == 40


def test_an_open_segment_does_not_keep_the_room_of_rows_that_are_stored(tmp_path: Path) -> None:
    # The journal was full for ever: of groups that the store had.
    with delivering(MemoryStore(), tmp_path, max_bytes=1000) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        for first in range(0, 300, 100):
            send(sink, upload, first, 100)
            assert durable(upload, first + 100)
        other, sink = delivery.open_upload(options(dataset="other"), SCHEMA)
        send(sink, other, 0, 100)
        assert durable(other, 100)
        assert upload.failure is other.failure is None


def test_rows_that_the_store_refuses_are_kept_for_a_person(tmp_path: Path) -> None:
    store = MemoryStore()
    store.refuse = lambda batches: ColumnTypeError("not this")
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert wait(upload, lambda: upload.failure is not None)
        assert delivery.flush(10)
    assert files(tmp_path) == [".rejected"]


def test_refused_rows_that_did_not_settle_are_sent_again_and_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server was killed in between. The store took them later, and their file stayed.
    store = MemoryStore()
    store.refuse = lambda batches: ColumnTypeError("not this")
    with monkeypatch.context() as patch, delivering(store, tmp_path) as delivery:
        patch.setattr(Journal, "settle_group", lambda *_: None)
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert wait(upload, lambda: upload.failure is not None)
    assert set(files(tmp_path)) == {".arrow", ".rejected"}
    store.refuse = lambda batches: None
    with delivering(store, tmp_path) as delivery:
        assert delivery.flush(30)
        assert ids(store) == list(range(10))
        assert delivery.upload_status(options())["ranges"] == [[0, 9]]
    assert files(tmp_path) == []


def test_refused_rows_are_not_durable_and_can_be_sent_again(tmp_path: Path) -> None:
    # The status was complete, and rows that were sent again were dropped as known.
    store = MemoryStore()
    with delivering(store, tmp_path / "home", timing=LONG_SEGMENTS) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert stored(upload, 10)
        store.refuse = lambda batches: ColumnTypeError("not this")
        send(sink, upload, 10, 10)
        upload.announce_total(20)
        assert wait(upload, lambda: upload.failure is not None)
        assert delivery.flush(10)
        delivery.close_upload(upload, sink)
        assert not upload.complete
        status = {"rows_durable": 10, "ranges": [[0, 9]], "complete": False}
        assert delivery.upload_status(options()) == status
        shutil.copytree(tmp_path / "home", tmp_path / "killed")
        killed = MemoryStore()
        killed.batches, killed.schemas = {"d": list(store.batches["d"])}, dict(store.schemas)
        store.refuse = lambda batches: None
        assert delivery._space is not None
        (rejected,) = (tmp_path / "home").glob("*/d/*.rejected")
        assert delivery._space.used_bytes >= rejected.stat().st_size > 0
        again, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, again, 10, 10)
        again.announce_total(20)
        assert stored(again, 20)
        assert again.complete
        assert not rejected.exists()  # else it could be sent once more
    assert ids(store) == list(range(20))
    # Nor does a server that was killed then count them, and it takes them once more.
    with delivering(killed, tmp_path / "killed") as delivery:
        assert delivery.upload_status(options()) == status
        again, sink = delivery.open_upload(options(), SCHEMA)
        assert again.status() == status
        send(sink, again, 10, 10)
        again.announce_total(20)
        assert stored(again, 20)
        assert again.complete
    assert ids(killed) == list(range(20))


def refuse(store: MemoryStore, folder: Path, num_rows: int, chunks: int = 1) -> None:
    """Have the store refuse the rows from 10 on of upload `u`, which has 10 rows there."""
    with delivering(store, folder, timing=LONG_SEGMENTS) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert stored(upload, 10)
        store.refuse = lambda batches: ColumnTypeError("not this")
        send(sink, upload, 10, num_rows, chunks)
        assert wait(upload, lambda: upload.failure is not None)
        assert delivery.flush(10)
    store.refuse = lambda batches: None


def resume(store: MemoryStore, folder: Path, first: int, num_rows: int, **fields: Any) -> None:
    with delivering(store, folder) as delivery:
        upload, sink = delivery.open_upload(options(**fields), SCHEMA)
        send(sink, upload, first, num_rows)
        assert wait(upload, lambda: upload.counts()["rows_stored"] == 10 + num_rows)
        assert delivery.flush(10)


def resend(store: MemoryStore, folder: Path) -> dict[str, Any]:
    """Send refused rows again, by the command and a start; returns the upload's status."""
    (refused,) = folder.glob("*/d")
    assert revive_segments(refused) > 0
    with delivering(store, folder) as delivery:
        assert delivery.flush(10)
        return delivery.upload_status(options())


@pytest.mark.parametrize("durability", ["journal", "store"])
@pytest.mark.parametrize(
    ("first", "num_rows", "chunks"), [(10, 5, 1), (13, 4, 1), (15, 5, 1), (10, 10, 1), (10, 10, 2)]
)
def test_refused_rows_that_were_resumed_are_sent_again_once(
    tmp_path: Path, durability: str, first: int, num_rows: int, chunks: int
) -> None:
    # The store knows the resumed rows by other keys: the whole group was stored beside them.
    store = MemoryStore()
    refuse(store, tmp_path, 10, chunks)
    resume(store, tmp_path, first, num_rows, durability=durability)
    if list(tmp_path.glob("*/d/*.rejected")):
        assert resend(store, tmp_path)["rows_durable"] == 20
    assert ids(store) == list(range(20))
    assert files(tmp_path) == []


def test_refused_groups_that_overlap_are_sent_again_once(tmp_path: Path) -> None:
    store = MemoryStore()
    refuse(store, tmp_path, 10)
    with delivering(store, tmp_path, timing=LONG_SEGMENTS) as delivery:
        store.refuse = lambda batches: ColumnTypeError("not this")
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 12, 6)
        assert wait(upload, lambda: upload.failure is not None)
        assert delivery.flush(10)
    assert files(tmp_path) == [".rejected", ".rejected"]
    status = resend(store, tmp_path)  # the store refuses them once more
    assert status["rows_durable"] == 10
    assert files(tmp_path) == [".rejected", ".rejected"]
    store.refuse = lambda batches: None
    assert resend(store, tmp_path)["rows_durable"] == 20
    assert ids(store) == list(range(20))


def test_refused_chunks_that_were_resumed_in_part_are_refused_again(tmp_path: Path) -> None:
    # Which of its stored rows belong to which text is not known, so the client has to send them.
    store = MemoryStore()
    refuse(store, tmp_path, 10, chunks=2)
    resume(store, tmp_path, 10, 5)
    assert resend(store, tmp_path)["rows_durable"] == 15
    assert ids(store) == list(range(15))
    assert files(tmp_path) == [".rejected"]


def test_refused_rows_count_in_the_journal_whether_their_dataset_is_used_or_not(
    tmp_path: Path,
) -> None:
    store = MemoryStore()
    store.refuse = lambda batches: ColumnTypeError("not this")
    timing = DeliveryTiming(committer_linger_s=0.01)
    with delivering(store, tmp_path, timing=timing) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert wait(upload, lambda: upload.failure is not None)
        delivery.close_upload(upload, sink)
        sink.committer.thread.join(30)
        (rejected,) = tmp_path.glob("*/d/*.rejected")
        assert delivery._space is not None
        assert delivery._space.used_bytes == rejected.stat().st_size
    with delivering(store, tmp_path, max_bytes=rejected.stat().st_size) as delivery:
        assert delivery._space is not None
        assert not delivery._space.wait_for_room(0.0)


def test_an_overwrite_comes_after_what_was_accepted_before_it(tmp_path: Path) -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store, tmp_path) as delivery:
        old, sink = delivery.open_upload(options(upload_id="old"), SCHEMA)
        send(sink, old, 0, 10)
        assert durable(old, 10)
        terms = options(mode="overwrite")
        new, sink = delivery.open_upload(terms, SCHEMA)
        send(sink, new, 0, 3)
        assert durable(new, 3)
        new.announce_total(3)
        ending = threading.Thread(target=lambda: delivery.complete_upload(terms, new, sink))
        ending.start()
        ending.join(0.1)
        assert not new.complete
        store.gate.set()
        ending.join(30)
        assert new.complete
        assert ids(store) == [0, 1, 2]
        assert isinstance(old.failure, UploadConflictError)


@pytest.mark.parametrize("anew", [True, False])
def test_recovered_rows_of_a_dataset_that_was_deleted_are_sent_again(
    tmp_path: Path, anew: bool
) -> None:
    # They counted as stored until the next restart.
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        store.down = StoreUnavailableError("away")
        send(sink, upload, 0, 3)
        assert durable(upload, 3)
    store.down = None
    with delivering(store, tmp_path) as delivery:
        assert delivery.flush(30)
        assert ids(store) == [0, 1, 2]
        assert delivery.upload_status(options())["ranges"] == [[0, 2]]
        schema = store.schemas["d"]
        store.delete_dataset("d")
        if anew:
            store.open_writer("d", schema, "append")
        assert delivery.upload_status(options())["ranges"] == []
        upload, sink = delivery.open_upload(options(), SCHEMA)
        assert upload.claim_rows(0, 2) == [(0, 2)]


def test_an_unfinished_overwrite_goes_on_after_a_kill(tmp_path: Path) -> None:
    store = MemoryStore()
    terms = options(mode="overwrite")
    with delivering(store, tmp_path) as delivery:
        old, sink = delivery.open_upload(options(upload_id="old"), SCHEMA)
        send(sink, old, 0, 10)
        assert stored(old, 10)
        store.locked.add(staged_name("d", "u"))
        new, sink = delivery.open_upload(terms, SCHEMA)
        send(sink, new, 0, 3)
        assert durable(new, 3)
    store.locked.clear()
    with delivering(store, tmp_path) as delivery:
        delivery.recover()
        assert delivery.upload_status(options())["ranges"] == [[0, 2]]
        new, sink = delivery.open_upload(terms, SCHEMA)
        assert new.claim_rows(0, 2) == []
        assert ids(store) == list(range(10))
        new.announce_total(3)
        delivery.complete_upload(terms, new, sink)
        assert new.complete
        assert ids(store) == [0, 1, 2]


def test_only_one_server_uses_a_journal(tmp_path: Path) -> None:
    with (
        delivering(MemoryStore(), tmp_path),
        pytest.raises(ConfigError, match="another server"),
        delivering(MemoryStore(), tmp_path),
    ):
        pass
    with delivering(MemoryStore(), tmp_path):
        pass


def test_without_a_journal_it_cannot_be_asked_for() -> None:
    delivery = Delivery({"default": MemoryStore()}, CONFIG, Telemetry())
    with pytest.raises(InvalidCommandError) as caught:
        delivery.open_upload(options(durability="journal"), SCHEMA)
    assert caught.value.allowed == ["store", "memory"]
    delivery.close()


def test_store_durability_passes_the_journal_by(tmp_path: Path) -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(durability="store"), SCHEMA)
        send(sink, upload, 0, 10)
        assert store.waiting.wait(30)
        assert upload.counts()["rows_durable"] == 0
        store.gate.set()
        assert durable(upload, 10)
    assert files(tmp_path) == []


def test_rows_of_one_store_never_go_to_another(tmp_path: Path) -> None:
    one, other = MemoryStore(), MemoryStore()
    other.address = "memory:elsewhere"
    one.gate.clear()
    with delivering(one, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
        one.faults.append(("before", outage()))
        sink.committer.close()
    with delivering(other, tmp_path) as delivery:
        assert delivery.flush(5)
        assert other.batches == {}
    with delivering(one, tmp_path) as delivery:
        assert delivery.flush(10)
        assert ids(one) == list(range(10))


# A segment is not closed for being idle.
LONG_SEGMENTS = DeliveryTiming(segment_idle_s=600.0)


def test_after_a_kill_what_was_stored_is_not_sent_again(tmp_path: Path) -> None:
    # Its key may be gone, for later rows replaced its rows: it was taken for missing, and theirs
    # were lost.
    store = MemoryStore()
    with delivering(store, tmp_path / "home", timing=LONG_SEGMENTS) as delivery:
        upload, sink = delivery.open_upload(options(mode="upsert"), SCHEMA)
        send(sink, upload, 0, 5)
        send(sink, upload, 5, 5)
        assert stored(upload, 10)
        assert delivery.flush(10)
        shutil.copytree(tmp_path / "home", tmp_path / "killed")
    assert ".arrow" in files(tmp_path / "killed")
    del store.batches["d"][0]
    store.appends.clear()
    with delivering(store, tmp_path / "killed") as delivery:
        assert delivery.flush(10)
        assert delivery.upload_status(options())["rows_durable"] == 10
    assert store.appends == []


def test_after_a_kill_rows_that_replace_others_all_go_again_in_their_order(tmp_path: Path) -> None:
    store = MemoryStore()
    store.gate.clear()
    with delivering(store, tmp_path / "home") as delivery:
        upload, sink = delivery.open_upload(options(mode="upsert"), SCHEMA)
        send(sink, upload, 0, 5)
        send(sink, upload, 5, 5)
        assert durable(upload, 10)
        shutil.copytree(tmp_path / "home", tmp_path / "killed")
        store.gate.set()
        assert stored(upload, 10)
    store.batches["d"] = [batch for batch in store.batches["d"] if batch["id"][0].as_py() == 5]
    store.appends.clear()
    with delivering(store, tmp_path / "killed") as delivery:
        assert delivery.flush(10)
    sent = [batch["batch_key"][0].as_py() for batches in store.appends for batch in batches]
    assert sent == ["u:0-4", "u:5-9"]


def test_no_journaled_row_comes_back_into_a_dataset_that_was_emptied(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path, timing=LONG_SEGMENTS) as delivery:
        old, sink = delivery.open_upload(options(upload_id="old"), SCHEMA)
        send(sink, old, 0, 10)
        assert stored(old, 10)
        assert ".arrow" in files(tmp_path)
        terms = options(mode="overwrite")
        new, sink = delivery.open_upload(terms, SCHEMA)
        new.announce_total(0)
        delivery.complete_upload(terms, new, sink)
        assert files(tmp_path) == []


def test_rows_of_an_upload_that_failed_while_the_journal_was_full_are_not_journaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its successor had them already.
    store = MemoryStore()
    store.gate.clear()
    was_full = threading.Event()
    full = JournalSpace.full_error

    def tells(space: JournalSpace) -> JournalFullError:
        was_full.set()
        return full(space)

    monkeypatch.setattr(JournalSpace, "full_error", tells)
    with delivering(store, tmp_path, max_bytes=1000, segment_bytes=1) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 40)
        assert durable(upload, 40)
        released = send(sink, upload, 40, 10)
        assert was_full.wait(30)
        upload.fail(StoreUnavailableError("its connection is gone"))
        store.gate.set()
        assert released.wait(30)
        assert delivery.flush(10)
        assert ids(store) == list(range(40))


def test_rows_that_cannot_be_indexed_are_journaled_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The journal had them and the committer did not get them: they waited for the next start.
    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(DedupeIndex, "_index_rows", fails)
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 5)
        send(sink, upload, 5, 5)
        assert stored(upload, 10)
        assert upload.failure is None


def test_a_journal_writer_that_ends_gives_up_waiting_and_later_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of another schema than the first ones' were forgotten, and with them their memory.
    begun, go_on = threading.Event(), threading.Event()

    def stalls(*_: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        raise ZeroDivisionError

    monkeypatch.setattr(Journal, "append_groups", stalls)
    with delivering(MemoryStore(), tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        released = [send(sink, upload, 0, 5)]
        assert begun.wait(30)
        released.append(send(sink, upload, 5, 5))
        other = pa.record_batch({"id": ["a"]})
        upload.claim_rows(10, 10)
        released.append(threading.Event())
        sink.submit_rows(Rows.from_batch(upload, other, 10, (), released[-1].set))
        (journal_writer, _) = sink._writers
        ending = threading.Thread(target=journal_writer.close)
        ending.start()
        while not journal_writer._queue.stopped:
            ending.join(0.001)
        go_on.set()
        ending.join(30)
        assert [one.is_set() for one in released] == [True, True, True]
        assert journal_writer.idle
        late, _ = delivery.open_upload(options(upload_id="late"), SCHEMA)
        assert send(sink, late, 0, 5).is_set()
        assert late.failure is not None


def test_rows_are_with_the_committer_before_they_are_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows that replace them, sent by who had seen that, could have come before them.
    waiting: list[int] = []
    secure = Upload.secure_rows

    def watched(self: Upload, first: int, last: int) -> None:
        waiting.append(sink.committer.num_waiting_rows)
        secure(self, first, last)

    monkeypatch.setattr(Upload, "secure_rows", watched)
    with delivering(MemoryStore(), tmp_path, SLOW) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
    assert waiting == [10]


def test_a_refused_group_leaves_its_segment_once_its_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The group stayed in its segment until the next start, which counted it as durable again.
    reject, errors = RejectedGroups.add_group, [OSError(28, "No space left on device")]

    def fails_once(*arguments: Any) -> None:
        if errors:
            raise errors.pop()
        reject(*arguments)

    monkeypatch.setattr(RejectedGroups, "add_group", fails_once)
    monkeypatch.setattr("fletcher.delivery.commit_queue._SETTLE_PAUSE_S", 0.01)
    store = MemoryStore()
    store.refuse = lambda batches: ColumnTypeError("not this")
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert wait(upload, lambda: upload.failure is not None)
        assert delivery.flush(10)
    assert files(tmp_path) == [".rejected"]


def open_others(delivery: Delivery, upload_ids: str) -> None:
    for upload_id in upload_ids:
        delivery.close_upload(
            *delivery.open_upload(options(dataset="other", upload_id=upload_id), SCHEMA)
        )


def test_an_upload_is_remembered_until_the_store_has_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Forgotten as soon as they were journaled: its client sent them again, and they came twice.
    monkeypatch.setattr("fletcher.delivery.upload_registry._REMEMBERED", 2)
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
        delivery.close_upload(upload, sink)
        open_others(delivery, "abc")
        again, sink = delivery.open_upload(options(), SCHEMA)
        assert again.claim_rows(0, 9) == []
        delivery.close_upload(again, sink)
        assert delivery.flush(10)
        assert ids(store) == list(range(10))
        open_others(delivery, "de")
        assert [key[2] for key in delivery._uploads._all] == ["d", "e"]


def test_uploads_found_in_the_journal_are_remembered_however_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fletcher.delivery.upload_registry._REMEMBERED", 2)
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        for upload_id in "uvw":
            upload, sink = delivery.open_upload(options(upload_id=upload_id), SCHEMA)
            send(sink, upload, 0, 10)
            assert durable(upload, 10)
    with delivering(store, tmp_path, SLOW) as delivery:
        open_others(delivery, "abc")
        for upload_id in "uvw":
            assert delivery.upload_status(options(upload_id=upload_id))["rows_durable"] == 10


def test_rows_that_are_stored_while_their_failed_upload_is_resumed_count(tmp_path: Path) -> None:
    # They were durable, and never in `rows_stored`: the store had been asked before.
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        failed, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, failed, 0, 10)
        assert durable(failed, 10)
        failed.fail(StoreUnavailableError("its connection is gone"))
        delivery.close_upload(failed, sink)
        look = store.stored_ranges

        def look_too_early(dataset: str, upload_id: str) -> list[tuple[int, int]]:
            found = look(dataset, upload_id)
            sink.flush()
            assert stored(failed, 10)
            return found

        store.stored_ranges = look_too_early  # type: ignore[method-assign]
        again, _ = delivery.open_upload(options(), SCHEMA)
        assert again is not failed
        assert again.counts()["rows_stored"] == again.counts()["rows_durable"] == 10
        assert again.pending == 0


def test_rows_in_the_store_count_as_durable_or_the_client_is_told_to_ask_again(
    tmp_path: Path,
) -> None:
    # The status had the journaled rows alone, and the client took the stored ones for lost.
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
        sink.flush()
        assert stored(upload, 10)
        send(sink, upload, 10, 10)
        assert durable(upload, 20)
    with delivering(store, tmp_path, SLOW) as delivery:
        ask = store.stored_ranges

        def fail(*_: Any) -> Any:
            raise outage()

        store.stored_ranges = fail  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailableError):
            delivery.upload_status(options())
        store.stored_ranges = ask  # type: ignore[method-assign]
        assert delivery.upload_status(options())["ranges"] == [[0, 19]]


def test_an_upload_found_in_the_journal_goes_on_with_the_durability_that_is_asked_for(
    tmp_path: Path,
) -> None:
    # It went on through the journal, and was acknowledged before it was stored.
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(durability="store"), SCHEMA)
        assert stored(upload, 10)
        store.gate.clear()
        store.waiting.clear()
        send(sink, upload, 10, 10)
        assert store.waiting.wait(30)
        assert upload.counts()["rows_durable"] == 10
        store.gate.set()
        assert durable(upload, 20)
        with pytest.raises(UploadConflictError):
            delivery.open_upload(options(durability="journal"), SCHEMA)


def test_an_upload_found_in_the_journal_cannot_go_on_in_another_mode(tmp_path: Path) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        upload, sink = delivery.open_upload(options(mode="upsert"), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
    with delivering(store, tmp_path) as delivery:
        with pytest.raises(UploadConflictError) as caught:
            delivery.open_upload(options(), SCHEMA)
        assert caught.value.field == "upload_id"
        upload, _ = delivery.open_upload(options(mode="upsert"), SCHEMA)
        assert upload.claim_rows(0, 9) == []
        assert upload.connections == 1  # the refused one is gone


def test_rows_that_were_being_journaled_when_their_upload_failed_are_not_taken_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They were journaled twice, and stored twice: nobody waited for the first ones.
    begun, go_on = threading.Event(), threading.Event()
    append = Journal.append_groups

    def slow(self: Journal, *arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return append(self, *arguments)

    monkeypatch.setattr(Journal, "append_groups", slow)
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery, ThreadPoolExecutor(1) as pool:
        failed, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, failed, 0, 5)
        assert begun.wait(30)
        failed.fail(InternalError("a worker failed"))
        delivery.close_upload(failed, sink)
        opening = pool.submit(delivery.open_upload, options(), SCHEMA)
        early, _ = concurrent.futures.wait([opening], timeout=0.1)
        go_on.set()
        upload, sink = opening.result(30)
        assert not early
        assert upload.claim_rows(0, 9) == [(5, 9)]
        assert upload.counts()["rows_durable"] == 5
        assert delivery.flush(30)
        assert ids(store) == list(range(5))


@pytest.mark.parametrize("upload_id", ["u", "copy"])
def test_rows_are_not_durable_after_a_deletion_that_failed_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upload_id: str
) -> None:
    """The rows of `copy` are duplicates, which only the journal knows."""
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        for name in ("u", "copy"):
            one = options(upload_id=name, dedupe="id")
            upload, sink = delivery.open_upload(one, SCHEMA)
            send(sink, upload, 0, 10)
            assert wait(upload, lambda upload=upload: not upload.pending)
            delivery.close_upload(upload, sink)
        asked = options(upload_id=upload_id)
        assert delivery.upload_status(asked)["ranges"] == [[0, 9]]
        delete = store.delete_upload

        def cut_off(dataset: str, upload_id: str) -> int:
            delete(dataset, upload_id)
            raise outage()

        monkeypatch.setattr(store, "delete_upload", cut_off)
        with pytest.raises(StoreUnavailableError):
            delivery.delete_upload(asked)
        assert delivery.upload_status(asked)["ranges"] == []
        monkeypatch.undo()
        assert delivery.delete_upload(asked) == 0
