"""Acknowledged rows survive a simulated power cut."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from fletcher.config.delivery import DeliveryConfig, JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.root import JournalSpace
from fletcher.delivery.journal.segment import GroupInfo
from fletcher.delivery.timing import DeliveryTiming
from fletcher.stores.address import open_store
from fletcher.telemetry.tracing import Telemetry
from fletcher.util.durable import sync_path
from tests.faults.powerloss import lose_power, record_syncs

ROWS = pa.record_batch(
    {
        "id": pa.array(range(10)),
        "vector": pa.array([[1.0, 2.0]] * 10, pa.list_(pa.float32(), 2)),
        "batch_key": ["u:0-9"] * 10,
    }
)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("fsync", "fdatasync", "unlink"):
        monkeypatch.setattr(os, name, getattr(os, name))  # so that it is put back
    folder = tmp_path / "power"
    folder.mkdir()
    record_syncs(folder / "syncs")
    return folder / "syncs"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def journal(disk: Path) -> Journal:
    folder = disk / "home" / "journal" / "store" / "dataset"
    space = JournalSpace(1 << 20)
    return Journal(folder, space, segment_bytes=1, retention_s=lambda: 0.0)


def infos(disk: Path) -> list[GroupInfo]:
    return [group.info for group in journal(disk).recover() if not group.settled]


def test_what_is_not_synced_is_gone(notes: Path, disk: Path) -> None:
    (disk / "never").write_text("never")
    with (disk / "short").open("w") as file:
        file.write("kept")
        file.flush()
        os.fsync(file.fileno())
        file.write(" and lost")
    (disk / "old").write_text("")
    folder = os.open(disk, os.O_RDONLY)
    (disk / "never").unlink()
    os.fsync(folder)
    os.close(folder)
    (disk / "old").rename(disk / "new")
    lose_power(notes, [disk])
    assert sorted(path.name for path in disk.iterdir()) == ["old", "short"]
    assert (disk / "short").read_text() == "kept"


def test_a_journaled_group(notes: Path, disk: Path) -> None:
    one = journal(disk)
    info = GroupInfo("u", 0, 9)
    one.append_groups([(info, ROWS)], ROWS.schema)
    lose_power(notes, [disk])
    assert infos(disk) == [info]
    one.close()


def test_a_group_that_was_read_again_and_not_synced_by_its_writer(
    notes: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = GroupInfo("u", 0, 9)
    one = journal(disk)
    with monkeypatch.context() as killed:
        killed.setattr(os, "fsync", lambda _: None)
        one.append_groups([(info, ROWS)], ROWS.schema)
    assert infos(disk) == [info]  # from here on it counts as durable
    lose_power(notes, [disk])
    assert infos(disk) == [info]
    one.close()


def test_what_was_settled_before_a_dataset_is_emptied(notes: Path, disk: Path) -> None:
    one = journal(disk)
    stored, waiting = GroupInfo("u", 0, 9), GroupInfo("u", 10, 19)
    first, _ = one.append_groups([(stored, ROWS), (waiting, ROWS)], ROWS.schema)
    one.settle_group(first)
    one.close()
    one.sync_notes()
    lose_power(notes, [disk])
    assert infos(disk) == [waiting]


def test_what_was_settled_before_rows_that_left_the_journal(notes: Path, disk: Path) -> None:
    # Sent again, it would replace these, which are not there to be sent after it.
    one = journal(disk)
    stored, waiting = GroupInfo("u", 0, 9), GroupInfo("u", 10, 19)
    first, _ = one.append_groups([(stored, ROWS), (waiting, ROWS)], ROWS.schema)
    (later,) = one.append_groups([(GroupInfo("u", 20, 29), ROWS)], ROWS.schema)
    one.close()
    one.settle_group(first)
    one.settle_group(later)
    lose_power(notes, [disk])
    assert infos(disk) == [waiting]


def test_a_segment_that_was_deleted_before_another(notes: Path, disk: Path) -> None:
    one = journal(disk)
    (first,) = one.append_groups([(GroupInfo("u", 0, 9), ROWS)], ROWS.schema)
    one.append_groups([(GroupInfo("u", 10, 19), ROWS)], ROWS.schema)
    one.settle_group(first)
    lose_power(notes, [disk])
    assert infos(disk) == [GroupInfo("u", 10, 19)]
    one.close()


@pytest.mark.parametrize("kind", ["lance", "parquet"])
def test_rows_that_a_store_took(notes: Path, disk: Path, kind: str) -> None:
    address = f"{kind}:{disk / 'data' / 'vectors'}"
    store = open_store(address)
    writer = store.open_writer("d", ROWS.schema, "append")
    writer.append([ROWS])
    lose_power(notes, [disk])
    again = open_store(address)
    assert again.scan("d").read_all().column("id").to_pylist() == list(range(10))
    again.close()
    writer.close()
    store.close()


def test_a_parquet_file_whose_writer_died_before_its_name_was_synced(
    notes: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Found there, it was taken for stored, and the rows left the journal.
    store = open_store(f"parquet:{disk / 'vectors'}")
    store.open_writer("d", ROWS.schema, "append").close()
    with monkeypatch.context() as killed:
        killed.setattr(os, "fsync", lambda _: None)
        writer = store.open_writer("d", ROWS.schema, "append")
        writer.append([ROWS])
        writer.close()
    sync_path(str(disk / "vectors" / "d" / "u~0-9.parquet"))  # that was done
    writer = store.open_writer("d", ROWS.schema, "append")
    assert writer.missing_keys(["u:0-9"]) == []
    lose_power(notes, [disk])
    assert store.scan("d").read_all().num_rows == 10
    writer.close()
    store.close()


@pytest.mark.parametrize("kind", ["lance", "parquet"])
def test_a_dataset_that_was_deleted(notes: Path, disk: Path, kind: str) -> None:
    store = open_store(f"{kind}:{disk}")
    store.open_writer("d", ROWS.schema, "append").close()
    store.delete_dataset("d")
    assert [path for path in disk.iterdir() if path.suffix == ".lock"] == []
    store.close()
    synced = [json.loads(line) for line in notes.read_text().splitlines()]
    last = [note["names"] for note in synced if note["inode"] == disk.stat().st_ino][-1]
    assert list(last) == [".d.lock"]


def test_a_table_whose_creation_was_cut_off(disk: Path) -> None:
    (disk / "d.lance" / "_versions").mkdir(parents=True)
    store = open_store(f"lance:{disk}")
    assert store.dataset("d") is None
    writer = store.open_writer("d", ROWS.schema, "append")
    writer.append([ROWS])
    writer.close()
    info = store.dataset("d")
    assert info is not None
    assert info.num_rows == 10
    store.close()


def test_what_was_settled_before_later_rows_of_another_file_that_replaced_it(
    notes: Path, disk: Path
) -> None:
    # A disk may write the later file's notes and lose the earlier one's.
    one = journal(disk)
    stored, waiting = GroupInfo("u", 0, 9), GroupInfo("u", 10, 19)
    first, _ = one.append_groups([(stored, ROWS), (waiting, ROWS)], ROWS.schema)
    replacing, behind = (GroupInfo("v", first, first + 9, upsert=True) for first in (0, 10))
    second, _ = one.append_groups([(replacing, ROWS), (behind, ROWS)], ROWS.schema)
    one.settle_group(first)
    one.settle_group(second)
    assert [one._segments[0].num_synced, one._segments[1].num_synced] == [1, 0]
    written = second.segment.notes.read_bytes()
    lose_power(notes, [disk])
    second.segment.notes.write_bytes(written)
    assert infos(disk) == [waiting, behind]
    one.close()


@contextmanager
def delivering(disk: Path, vectors: Path) -> Iterator[Delivery]:
    config = DeliveryConfig(
        group_rows=10, commit_rows=100, group_delay_ms=0, store_retry_s=30, store_timeout_s=60
    )
    journals = JournalConfig(
        folder=disk / "home", max_bytes=1 << 30, segment_bytes=1 << 20, retention_s=0
    )
    store = open_store(f"lance:{vectors}")
    open_segments = DeliveryTiming(segment_idle_s=600.0)
    delivery = Delivery({"default": store}, config, Telemetry(), journals, open_segments)
    delivery.recover()
    try:
        yield delivery
    finally:
        delivery.close()


def put(delivery: Delivery, text: str, **options: str) -> None:
    """Upload rows with this text until they are acknowledged and stored."""
    batch = ROWS.drop_columns(["batch_key"]).append_column("text", pa.array([text] * 10))
    command = EmbedCommand(dataset="d", upload_id=text, **options)
    upload, sink = delivery.open_upload(command, batch.schema)
    upload.claim_rows(0, 9)
    released = threading.Event()
    sink.submit_rows(Rows.from_batch(upload, batch, 0, (), released.set))
    with upload.changed:
        assert upload.changed.wait_for(lambda: upload.counts()["rows_durable"] == 10, 30)
    delivery.close_upload(upload, sink)
    assert delivery.flush(30)


@pytest.mark.parametrize("durability", ["store", "journal"])
@pytest.mark.parametrize("mode", ["append", "upsert"])
def test_journaled_rows_that_were_replaced(
    notes: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, mode: str, durability: str
) -> None:
    # The note that they had left the journal was not synced: they were sent again, over newer ones.
    vectors = disk.parent / "vectors"
    with monkeypatch.context() as patched:
        with delivering(disk, vectors) as delivery:
            put(delivery, "old", mode=mode)
            put(delivery, "new", mode="upsert", durability=durability)
            patched.setattr(Journal, "sweep", lambda _: None)  # the power fails here
        lose_power(notes, [disk])
    with delivering(disk, vectors) as delivery:
        assert delivery.flush(30)
        rows = delivery.stores["default"].scan("d").read_all()
        assert rows.column("text").to_pylist() == ["new"] * 10
