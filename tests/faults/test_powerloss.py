"""What is said to survive a power loss does: everything that was not synced is taken away."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from fletcher.delivery.journal import GroupInfo, Journal, JournalSpace
from fletcher.stores.address import open_store
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
    one.append([(info, ROWS)], ROWS.schema)
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
        one.append([(info, ROWS)], ROWS.schema)
    assert infos(disk) == [info]  # from here on it counts as durable
    lose_power(notes, [disk])
    assert infos(disk) == [info]
    one.close()


def test_what_was_settled_before_a_dataset_is_emptied(notes: Path, disk: Path) -> None:
    one = journal(disk)
    stored, waiting = GroupInfo("u", 0, 9), GroupInfo("u", 10, 19)
    first, _ = one.append([(stored, ROWS), (waiting, ROWS)], ROWS.schema)
    one.settle(first)
    one.forget_settled()
    lose_power(notes, [disk])
    assert infos(disk) == [waiting]


def test_what_was_settled_before_rows_that_left_the_journal(notes: Path, disk: Path) -> None:
    # Sent again, it would replace these, which are not there to be sent after it.
    one = journal(disk)
    stored, waiting = GroupInfo("u", 0, 9), GroupInfo("u", 10, 19)
    first, _ = one.append([(stored, ROWS), (waiting, ROWS)], ROWS.schema)
    (later,) = one.append([(GroupInfo("u", 20, 29), ROWS)], ROWS.schema)
    one.close()
    one.settle(first)
    one.settle(later)
    lose_power(notes, [disk])
    assert infos(disk) == [waiting]


def test_a_segment_that_was_deleted_before_another(notes: Path, disk: Path) -> None:
    one = journal(disk)
    (first,) = one.append([(GroupInfo("u", 0, 9), ROWS)], ROWS.schema)
    one.append([(GroupInfo("u", 10, 19), ROWS)], ROWS.schema)
    one.settle(first)
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
