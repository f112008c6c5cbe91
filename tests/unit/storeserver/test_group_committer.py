"""The store server's group commits where a commit fails in doubt."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fletcher.errors import (
    FletcherError,
    OverloadedError,
    RequestError,
    StoreUnavailableError,
)
from fletcher.stores.address import open_store
from fletcher.stores.base import Store, WriteMode
from fletcher.stores.lance import writer as lance_writer
from fletcher.stores.lance.store import LanceStore
from fletcher.stores.lance.writer import LanceWriter
from fletcher.storeserver.group_committer import GroupCommitter
from fletcher.storeserver.ingest import Ingest
from fletcher.storeserver.key_ledger import KeyLedger
from fletcher.storeserver.server import StoreServer
from fletcher.storeserver.submissions import CommitStream, SubmittedRows
from tests.doubles import store_rows as rows


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LanceStore]:
    opened = LanceStore(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def ingest(store: LanceStore) -> Iterator[Ingest]:
    """Rows 0 to 9 are stored."""
    opened = Ingest(store)
    assert submit(opened, rows.batch(0, 10)).result(30) == 10
    yield opened
    assert opened.close(30)


@pytest.fixture
def fail_next_sync(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, the next sync fails, and clears it."""
    armed = threading.Event()
    sync = lance_writer.SyncedFolder.sync_new_files

    def failing(self: Any, *, settled: bool) -> None:
        if armed.is_set():
            armed.clear()
            raise OSError(5, "Input/output error")
        sync(self, settled=settled)

    monkeypatch.setattr(lance_writer.SyncedFolder, "sync_new_files", failing)
    return armed


def submit(ingest: Ingest, batch: pa.RecordBatch) -> Future[int]:
    return ingest.submit_rows("d", SubmittedRows([batch], "append", True, CommitStream()))


def num_rows(store: Store) -> int:
    info = store.dataset("d")
    assert info is not None
    return info.num_rows


def nan(first: int, count: int) -> pa.RecordBatch:
    batch = rows.batch(first, count)
    field = batch.schema.field("vector")
    values = pa.array(np.full(count * field.type.list_size, np.nan, np.float16))
    return batch.set_column(1, field, pa.FixedSizeListArray.from_arrays(values, type=field.type))


@pytest.fixture
def refuse_thread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prefixes of threads that cannot start once; the start removes the prefix."""
    refused: list[str] = []
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if refused and thread.name.startswith(refused[0]):
            refused.pop()
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    return refused


def test_a_commit_thread_that_cannot_start_refuses_the_call_alone(
    store: LanceStore, refuse_thread: list[str]
) -> None:
    ingest = Ingest(store)
    refuse_thread.append("commit-")
    with pytest.raises(OverloadedError, match="try again later"):
        submit(ingest, rows.batch(0, 10))
    assert refuse_thread == []
    assert submit(ingest, rows.batch(0, 10)).result(30) == 10
    assert ingest.close(30)


def test_a_compaction_that_cannot_start_costs_no_row_and_starts_later(
    store: LanceStore, refuse_thread: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rows were stored, the append failed, and the writer could not be closed.
    monkeypatch.setattr(lance_writer, "COMPACT_FRAGMENTS", 2)
    writer = store.open_writer("d", rows.schema(), "append")
    refuse_thread.append("compact-")
    for first in range(0, 30, 10):
        writer.append([rows.batch(first, 10)])
    assert refuse_thread == []
    assert writer._compaction is not None  # the third append started it
    writer.close()
    assert num_rows(store) == 30


@pytest.mark.parametrize("name", ["acks", "shutdown"])
def test_other_threads_of_the_store_server_may_not_start_once(
    tmp_path: Path, refuse_thread: list[str], name: str
) -> None:
    server = StoreServer(tmp_path / "served", host="127.0.0.1", port=0, meta_port=0)
    refuse_thread.append(name)
    with contextlib.closing(open_store(f"{server.address}?meta={server.meta_port}")) as client:
        if name == "acks":
            with pytest.raises(OverloadedError):
                client.open_writer("d", rows.schema(), "append")
        writer = client.open_writer("d", rows.schema(), "append")
        writer.append([rows.batch(0, 10)])
        assert client.dataset("d").num_rows == 10
    assert server.close(30)
    assert refuse_thread == []


def test_rows_that_were_stored_though_their_commit_failed_are_repeats(
    store: LanceStore, ingest: Ingest, fail_next_sync: threading.Event
) -> None:
    fail_next_sync.set()
    with pytest.raises(StoreUnavailableError):
        submit(ingest, rows.batch(10, 10)).result(30)
    assert not fail_next_sync.is_set()
    assert submit(ingest, rows.batch(10, 10)).result(30) == 0
    assert submit(ingest, rows.batch(20, 10)).result(30) == 10
    assert num_rows(store) == 30


class Panic(BaseException):
    """As a panic of LanceDB, which is no Exception."""


@pytest.mark.parametrize("error", [MemoryError(), KeyError("x"), Panic()])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (GroupCommitter, "_linger"),
        (GroupCommitter, "_next_items"),
        (GroupCommitter, "_carry_out"),
        (GroupCommitter, "_commit"),
        (GroupCommitter, "_store_rows"),
        (GroupCommitter, "_new_rows"),
        (GroupCommitter, "close_writer"),
        (LanceWriter, "close"),
        (LanceWriter, "write_rows"),
        (KeyLedger, "add_key"),
        (KeyLedger, "__init__"),
    ],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
def test_a_step_that_fails_once_doubles_no_row_and_ends_no_thread(
    store: LanceStore,
    ingest: Ingest,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: BaseException,
) -> None:
    step, errors = getattr(owner, name), [error]

    def failing(*args: Any, **named: Any) -> Any:
        if errors:
            raise errors.pop()
        return step(*args, **named)

    monkeypatch.setattr(owner, name, failing)
    with contextlib.suppress(FletcherError):
        submit(ingest, rows.batch(10, 10)).result(30)
    submit(ingest, rows.batch(10, 10)).result(30)
    assert submit(ingest, rows.batch(20, 10)).result(30) == 10
    assert num_rows(store) == 30


@pytest.mark.parametrize("mode", ["upsert"])
def test_rows_whose_client_waits_no_longer_replace_nothing(
    store: LanceStore, ingest: Ingest, mode: WriteMode
) -> None:
    # It has sent them again, perhaps, and newer ones since, which these would replace.
    late = SubmittedRows([rows.batch(0, 5)], mode, True, CommitStream())
    with pytest.raises(StoreUnavailableError):
        ingest.submit_rows("d", late, lambda: True)
    assert submit(ingest, rows.batch(10, 10)).result(30) == 10
    assert num_rows(store) == 20
    late = SubmittedRows([rows.batch(20, 10)], "append", True, CommitStream())
    assert ingest.submit_rows("d", late, lambda: True).result(30) == 10


def test_a_commit_in_doubt_does_not_harm_its_neighbours(
    store: LanceStore, ingest: Ingest, fail_next_sync: threading.Event
) -> None:
    held, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert go_on.wait(30)

    holder = threading.Thread(target=ingest.call_committer, args=("d", hold))
    holder.start()
    assert held.wait(30)
    # One commit, which the second refuses: each is tried alone, and the first fails in doubt.
    jobs = [submit(ingest, one) for one in (rows.batch(10, 10), nan(20, 4), rows.batch(30, 10))]
    fail_next_sync.set()
    go_on.set()
    holder.join(30)
    with pytest.raises(StoreUnavailableError):
        jobs[0].result(30)
    with pytest.raises(RequestError, match="NaN"):
        jobs[1].result(30)
    assert jobs[2].result(30) == 10
    assert submit(ingest, rows.batch(10, 10)).result(30) == 0
    assert num_rows(store) == 30


def test_a_group_is_known_again_after_its_neighbours_rows_were_refused(
    store: LanceStore, ingest: Ingest
) -> None:
    # Its rows were taken back from a count that they had never been in; then it was no repeat.
    held, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert go_on.wait(30)

    holder = threading.Thread(target=ingest.call_committer, args=("d", hold))
    holder.start()
    assert held.wait(30)
    stream = CommitStream()

    def send() -> Future[int]:
        again = SubmittedRows([rows.batch(10, 10)], "append", True, stream)
        return ingest.submit_rows("d", again)

    first, refused = send(), submit(ingest, nan(20, 4))
    go_on.set()
    holder.join(30)
    assert first.result(30) == 10
    with pytest.raises(RequestError, match="NaN"):
        refused.result(30)
    assert send().result(30) == 0
    assert num_rows(store) == 20


@pytest.mark.parametrize("anew", [False, True])
def test_groups_of_a_dataset_that_another_program_dropped_are_no_repeats(
    store: LanceStore, ingest: Ingest, anew: bool
) -> None:
    # They were acknowledged and dropped, as the keys in memory were those of the lost table.
    shutil.rmtree(store.folder / "d.lance")
    if anew:
        store._connect(store.folder).create_table("d", schema=rows.schema())
    keys = rows.batch(0, 10).column("batch_key").unique().to_pylist()
    assert ingest.call_committer("d", lambda one: one.missing_keys(keys)) == keys
    assert ingest.call_committer("d", lambda one: one.stored_ranges("up")) == []
    assert submit(ingest, rows.batch(0, 10)).result(30) == 10
    assert submit(ingest, rows.batch(0, 10)).result(30) == 0
    assert num_rows(store) == 10
