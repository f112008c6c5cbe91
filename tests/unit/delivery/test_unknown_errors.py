"""Errors of unknown kinds on the way of a row: in doubt, never final."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fletcher.delivery import actions
from fletcher.delivery.commit_queue import CommitQueue
from fletcher.delivery.committer import Committer
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.group_sender import GroupSender
from fletcher.delivery.groups import Group, Rows
from fletcher.delivery.journal import segment
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.segment import JournaledGroup
from fletcher.delivery.journal.settled_groups import SettledGroups
from fletcher.delivery.journal.writer import JournalWriter
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload
from fletcher.delivery.waiting_rows import WaitingRows
from fletcher.errors import (
    ColumnTypeError,
    InternalError,
    OverloadedError,
    RequestError,
    StoreUnavailableError,
    UnauthorizedError,
)
from tests.doubles.stores import MemoryStore, MemoryWriter, outage
from tests.unit.delivery.test_journaled import (
    CONFIG,
    SCHEMA,
    SLOW,
    delivering,
    durable,
    files,
    ids,
    options,
    send,
    stored,
    wait,
)


class Panic(BaseException):
    """As a panic of a Rust library, which is no Exception."""


ERRORS = [
    MemoryError(),
    pa.ArrowMemoryError("malloc of size 64 failed"),
    pa.ArrowInvalid("Tried reading schema message, was null or length 0"),
    KeyError("x"),
    OSError(5, "Input/output error"),
    OSError(24, "Too many open files"),
    RuntimeError("can't start new thread"),
    InternalError("a defect"),
    UnauthorizedError("the token was changed a moment ago"),
    Panic("called `Option::unwrap()` on a `None` value"),
]


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
    """Have one call of a function raise an error instead of running."""
    call, errors = getattr(owner, name), [error]

    def failing(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


def assert_all_arrive(store: MemoryStore, folder: Path, mode: str = "append") -> None:
    """Forty acknowledged rows come to the store, each once, and the next upload works."""
    with delivering(store, folder) as delivery:
        upload, sink = delivery.open_upload(options(mode=mode), SCHEMA)
        for first in range(0, 40, 10):
            send(sink, upload, first, 10)
        assert durable(upload, 40)
        upload.announce_total(40)
        assert stored(upload, 40)
        assert upload.complete
        assert upload.failure is None
        delivery.close_upload(upload, sink)
        other, sink = delivery.open_upload(options(upload_id="other"), SCHEMA)
        send(sink, other, 100, 5)
        assert stored(other, 5)
        assert delivery.flush(10)
    assert sorted(set(ids(store))) == [*range(40), *range(100, 105)]
    if mode == "append":
        assert len(ids(store)) == 45
    assert files(folder) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda one: type(one).__name__)
def test_an_append_that_fails_once_loses_and_doubles_nothing(
    tmp_path: Path, error: Exception, when: str
) -> None:
    store = MemoryStore()
    store.faults.append((when, error))
    assert_all_arrive(store, tmp_path)


@pytest.mark.parametrize("kind", [actions.Open, actions.Append, actions.Rest])
def test_an_action_that_cannot_be_carried_out_ends_no_committer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    carry_out, failed = Committer._carry_out, []

    def failing(committer: Committer, action: Any) -> Any:
        if isinstance(action, kind) and not failed:
            failed.append(action)
            raise MemoryError
        return carry_out(committer, action)

    monkeypatch.setattr(Committer, "_carry_out", failing)
    if kind is actions.Open:
        with (
            delivering(MemoryStore(), tmp_path) as delivery,
            pytest.raises(StoreUnavailableError, match="unexpected way"),
        ):
            delivery.open_upload(options(), SCHEMA)
    assert_all_arrive(MemoryStore(), tmp_path)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (JournaledGroup, "read_batch"),
        (Group, "to_batch"),
        (Group, "is_recognized"),
        (GroupSender, "append_groups"),
        (SettledGroups, "add_keys"),
        (Journal, "settle_group"),
        (Upload, "settle_rows"),
        (DedupeIndex, "add_rows"),
        (CommitQueue, "decide"),
        (CommitQueue, "note_outcome"),
        (WaitingRows, "take_groups"),
        (WaitingRows, "put_back"),
        (WaitingRows, "append_rows"),
        (Committer, "submit_rows"),
        (Committer, "_append"),
        (Committer, "_settle_groups"),
        (actions.Append, "__init__"),
        (Committer, "_confirm"),
        (GroupSender, "confirm_groups"),
        (actions.Acknowledged, "__init__"),
        (actions.Settle, "__init__"),
        (JournalWriter, "_carry_out"),
        (JournalWriter, "_write"),
        (actions.Write, "__init__"),
    ],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
@pytest.mark.parametrize("mode", ["append", "upsert"])
def test_a_step_that_fails_once_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, mode: str
) -> None:
    monkeypatch.setattr("fletcher.delivery.commit_queue._SETTLE_PAUSE_S", 0.01)
    fail_once(monkeypatch, owner, name, MemoryError())
    assert_all_arrive(MemoryStore(), tmp_path, mode)


@pytest.mark.parametrize("error", [RequestError("Invalid input: no column batch_key"), KeyError()])
def test_a_question_that_the_store_cannot_answer_rejects_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store = MemoryStore()
    store.faults.append(("after", outage()))
    fail_once(monkeypatch, MemoryWriter, "missing_keys", error)
    assert_all_arrive(store, tmp_path)


@pytest.mark.parametrize("answer", [["u:0-99999"], ["u:0-9", "other"]])
def test_an_answer_about_other_groups_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: list[str]
) -> None:
    # Groups that the answer did not name were taken for stored, and lost.
    store, answers = MemoryStore(), [answer]
    ask = MemoryWriter.missing_keys

    def nonsense(self: MemoryWriter, keys: list[str]) -> list[str]:
        return answers.pop() if answers else ask(self, keys)

    monkeypatch.setattr(MemoryWriter, "missing_keys", nonsense)
    store.faults.append(("before", outage()))
    assert_all_arrive(store, tmp_path)


def test_a_dataset_that_somebody_altered_is_opened_again_before_rows_are_refused(
    tmp_path: Path,
) -> None:
    # A column was dropped behind the writer's back: its rows were rejected.
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert stored(upload, 10)
        opened = len(store.opened)
        store.refuse = lambda _: (
            ColumnTypeError("no such column") if len(store.opened) == opened else None
        )
        send(sink, upload, 10, 10)
        assert stored(upload, 20)
        assert upload.failure is None
    assert files(tmp_path) == []


def test_rows_that_a_writer_stored_before_it_refused_others_are_not_stored_again(
    tmp_path: Path,
) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert stored(upload, 10)
        store.faults.append(("after", ColumnTypeError("no such column")))
        send(sink, upload, 10, 10)
        assert stored(upload, 20)
        assert upload.failure is None
    assert ids(store) == list(range(20))


def test_a_group_that_always_fails_stays_journaled_and_delays_no_others(tmp_path: Path) -> None:
    store = MemoryStore()

    def defect(batches: Any) -> Any:
        return KeyError("x") if 3 in pa.Table.from_batches(batches)["id"].to_pylist() else None

    store.refuse = defect
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
        other, sink = delivery.open_upload(options(upload_id="other"), SCHEMA)
        for first in range(100, 150, 10):
            send(sink, other, first, 10)
            assert stored(other, first - 90)
        assert upload.failure is None
    assert ".arrow" in files(tmp_path)
    assert ".rejected" not in files(tmp_path)
    store.refuse = lambda _: None
    with delivering(store, tmp_path) as delivery:
        assert delivery.flush(30)
    assert ids(store) == [*range(10), *range(100, 150)]


def test_rows_in_memory_that_always_fail_end_their_upload_with_a_retryable_error(
    tmp_path: Path,
) -> None:
    store = MemoryStore()
    store.refuse = lambda _: KeyError("x")  # type: ignore[assignment,return-value]
    config = dataclasses.replace(CONFIG, store_retry_s=0.1)
    with delivering(store, tmp_path, config) as delivery:
        upload, sink = delivery.open_upload(options(durability="store"), SCHEMA)
        released = send(sink, upload, 0, 10)
        assert wait(upload, lambda: upload.failure is not None)
        assert upload.failure is not None
        assert upload.failure.code == "store_unavailable"
        assert released.wait(10)


def test_errors_of_releasing_rows_leave_no_upload_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, Upload, "fail", MemoryError())
    store = MemoryStore()
    store.down = outage()
    config = dataclasses.replace(CONFIG, store_retry_s=0.1)
    with delivering(store, tmp_path, config) as delivery:
        upload, sink = delivery.open_upload(options(durability="store"), SCHEMA)
        errors, released = [MemoryError()], threading.Event()

        def release() -> None:
            if errors:
                raise errors.pop()
            released.set()

        upload.claim_rows(0, 0)
        vectors = pa.array([[1.0, 0.0]], SCHEMA.field("vector").type)
        batch = pa.record_batch([pa.array([0], pa.int64()), vectors], schema=SCHEMA)
        sink.submit_rows(Rows.from_batch(upload, batch, 0, (), release))
        assert released.wait(30)
        assert upload.failure is not None


def no_thread_once(monkeypatch: pytest.MonkeyPatch, prefix: str) -> list[str]:
    """Have one start of a thread with that name fail; returns the names of failed starts."""
    start, failed = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(prefix) and not failed:
            failed.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return failed


@pytest.mark.parametrize("prefix", ["committer-", "journal-writer-"])
def test_a_thread_that_cannot_start_once_leaves_the_dataset_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    # The dataset had a thread that never ran, and its uploads waited for ever.
    failed = no_thread_once(monkeypatch, prefix)
    with delivering(MemoryStore(), tmp_path) as delivery, pytest.raises(OverloadedError) as caught:
        upload, sink = delivery.open_upload(options(upload_id="first"), SCHEMA)
        send(sink, upload, 0, 10)
    assert failed == [f"{prefix}d"]
    assert caught.value.retry_after_ms is not None
    assert_all_arrive(MemoryStore(), tmp_path)


def test_a_sink_that_cannot_start_is_not_counted_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
    no_thread_once(monkeypatch, "committer-")
    (path,) = tmp_path.glob("*/d/*.arrow")
    with delivering(store, tmp_path, SLOW) as delivery:  # the server starts
        assert delivery._space is not None
        delivery.open_upload(options(), SCHEMA)
        assert delivery._space.used_bytes == path.stat().st_size
    with delivering(store, tmp_path) as delivery:
        assert delivery.flush(10)
        assert ids(store) == list(range(10))


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), OSError(5, "EIO")])
def test_a_journal_that_cannot_be_read_now_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    # Its file was set aside as damaged, and its acknowledged rows were gone.
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
    (path,) = tmp_path.glob("*/d/*.arrow")
    read = Path.read_bytes

    def fails(one: Path) -> bytes:
        if one == path:
            raise error
        return read(one)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with delivering(store, tmp_path) as delivery:  # the server starts
        with pytest.raises(StoreUnavailableError, match="journal"):
            delivery.open_upload(options(), SCHEMA)
        other, sink = delivery.open_upload(options(dataset="other"), SCHEMA)
        send(sink, other, 0, 1)
        assert stored(other, 1)
        monkeypatch.undo()
        deadline = time.monotonic() + 30  # nobody has to open the dataset again
        while not (delivery.flush(10) and store.appends[1:]):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert delivery.upload_status(options())["rows_durable"] == 10
    assert ids(store) == list(range(10))


def test_want_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path, SLOW) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert durable(upload, 10)
    fail_once(monkeypatch, segment, "_checksum", pa.ArrowMemoryError("malloc of size 64 failed"))
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        assert upload.counts()["rows_durable"] == 10
        assert delivery.flush(10)
    assert ids(store) == list(range(10))


def test_datasets_that_were_written_once_cost_a_start_nothing(tmp_path: Path) -> None:
    # A start took 6 ms and a thread for each of them.
    store = MemoryStore()
    timing = DeliveryTiming(committer_linger_s=0.01)
    with delivering(store, tmp_path, timing=timing) as delivery:
        upload, sink = delivery.open_upload(options(), SCHEMA)
        send(sink, upload, 0, 10)
        assert stored(upload, 10)
        delivery.close_upload(upload, sink)
        sink.committer.thread.join(30)
        assert list(tmp_path.glob("*/d")) == []
        again, sink = delivery.open_upload(options(), SCHEMA)  # and the folder comes back
        send(sink, again, 10, 10)
        assert stored(again, 20)
    folder = next(tmp_path.glob("memory-*"))
    (folder / "replaced").mkdir()
    (folder / "replaced" / "groups.unsent").write_text("u:0-9\n")
    for number in range(200):
        (folder / f"before-{number}").mkdir()
    threads = threading.active_count()
    with delivering(store, tmp_path) as delivery:
        assert delivery._sinks == {}
        assert threading.active_count() == threads
    assert [one.name for one in folder.iterdir()] == ["replaced"]
