"""A LanceDB table after a power loss that left a commit half on the disk."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from fletcher.errors import InvalidCommandError, StoreUnavailableError
from fletcher.stores.address import open_store
from fletcher.stores.base import Store
from fletcher.stores.lance import repair, synced_folder
from fletcher.stores.lance.repair import (
    find_defect,
    newest_version,
    note_synced,
    set_torn_versions_aside,
)
from fletcher.stores.lance.store import LanceStore
from tests.doubles import store_rows as rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with rows 0 to 99, and 100 to 149 in a commit that was not synced."""
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 100)])
    writer.append([rows.batch(100, 50)])
    store.close()
    note_newest_unsynced(tmp_path)
    return tmp_path


def note_newest_unsynced(folder: Path) -> None:
    table = folder / "d.lance"
    note_synced(table, newest_version(table)[0] - 1)


def manifests(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "d.lance" / "_versions").iterdir())


def newest(folder: Path, pattern: str) -> Path:
    return max((folder / "d.lance").glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def cut(path: Path, num_bytes: int) -> None:
    os.truncate(path, num_bytes)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "an empty manifest": lambda folder: cut(newest(folder, "_versions/*.manifest"), 0),
    "half a manifest": lambda folder: cut(newest(folder, "_versions/*.manifest"), 200),
    "an empty data file": lambda folder: cut(newest(folder, "data/*.lance"), 0),
    "half a data file": lambda folder: cut(newest(folder, "data/*.lance"), 1000),
    "no data file": lambda folder: newest(folder, "data/*.lance").unlink(),
}


def ids(store: Store) -> list[int]:
    found = store.scan("d", columns=["id"]).read_all().column("id").to_pylist()
    return sorted(int(one.removeprefix("id")) for one in found)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("first_use", ["write", "read"])
def test_the_version_before_is_taken_and_goes_on(
    folder: Path, damage: str, first_use: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](folder)
    store = open_store(f"lance:{folder}")
    if first_use == "read":
        before = manifests(folder)
        assert [info.num_rows for info in store.datasets()] == [100]
        assert store.stored_ranges("d", "u") == [(0, 99)]
        assert ids(store) == list(range(100))
        assert manifests(folder) == before  # a read renames nothing
    writer = store.open_writer("d", rows.schema(), "append")
    assert "is incomplete, using an earlier version" in caplog.text
    sent = rows.batch(100, 50)
    assert writer.missing_keys(["u:0-99", "u:100-149"]) == ["u:100-149"]
    writer.append([sent])
    writer.append([rows.batch(150, 10)])
    store.close()
    again = open_store(f"lance:{folder}")
    assert ids(again) == list(range(160))
    again.close()


def test_a_manifest_with_any_end_but_its_own_is_not_whole(folder: Path) -> None:
    manifest = newest(folder, "_versions/*.manifest")
    whole = manifest.read_bytes()
    assert not find_defect(manifest, folder / "d.lance")
    damaged = [whole[:size] for size in range(len(whole))]
    damaged.append(whole[:-16] + b"\xff" * 16)
    damaged += [
        whole[:-16] + struct.pack("<QHH4s", place, 0, 2, b"LANC")
        for place in (len(whole), 1 << 62, (1 << 64) - 1)
    ]
    for data in damaged:
        manifest.write_bytes(data)
        assert find_defect(manifest, folder / "d.lance"), len(data)


def test_a_version_that_cannot_be_read_makes_the_dataset_unavailable(folder: Path) -> None:
    manifest = newest(folder, "_versions/*.manifest")
    manifest.unlink()
    manifest.mkdir()
    store = open_store(f"lance:{folder}")
    for _ in range(2):  # the lock is free again
        with pytest.raises(StoreUnavailableError, match="`d`: LanceDB failed"):
            store.dataset("d")
    store.close()


def test_a_replaced_row_is_the_old_one_again(folder: Path) -> None:
    store = open_store(f"lance:{folder}")
    writer = store.open_writer("d", rows.schema(), "upsert")
    writer.append([rows.batch(20, 10, text="new")])
    store.close()
    deletions = list((folder / "d.lance" / "_deletions").iterdir())
    assert deletions
    note_newest_unsynced(folder)
    for path in deletions:
        path.unlink()
    again = open_store(f"lance:{folder}")
    table = again.scan("d", columns=["id", "text"]).read_all()
    assert table.num_rows == 150
    assert {text.split()[0] for text in table.column("text").to_pylist()} == {"text"}
    again.close()


def test_a_table_that_is_whole_or_being_written_is_left_alone(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = manifests(folder)
    store = open_store(f"lance:{folder}")
    assert ids(store) == list(range(150))
    store.close()
    half = newest(folder, "data/*.lance")
    whole = half.read_bytes()
    cut(half, 1000)  # as its writer would have it for a moment
    lock = LanceStore(folder).lock_dataset("d")
    reader = open_store(f"lance:{folder}")
    assert reader.dataset("d") is not None
    half.write_bytes(whole)
    lock.release()
    assert ids(reader) == list(range(150))
    reader.close()
    assert manifests(folder) == before
    assert "reading an earlier version" in caplog.text


@pytest.mark.parametrize("synced", [None, 2, 3, 7])
@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("lost", [True, False])
def test_a_table_that_lost_an_old_file_is_refused_by_its_name(
    tmp_path: Path, synced: int | None, number: int, lost: bool
) -> None:
    """Six commits went away because a file of the second one was lost."""
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.schema(), "append")
    for first in range(6):
        writer.append([rows.batch(10 * first, 10)])
    fill = store.open_writer("e", rows.schema(), "append")
    fill.append([rows.batch(0, 5)])
    store.close()
    if synced is None:  # a table of another program
        (tmp_path / "d.lance" / "_fletcher_synced").unlink()
    else:
        note_synced(tmp_path / "d.lance", synced)
    files = sorted(
        (tmp_path / "d.lance" / "data").iterdir(), key=lambda path: path.stat().st_mtime_ns
    )
    if lost:
        files[number].unlink()
    else:
        cut(files[number], files[number].stat().st_size - 16)
    before = manifests(tmp_path)
    again = open_store(f"lance:{tmp_path}")
    if synced is not None and synced < 2 + number:  # no version below the damage was synced
        assert again.dataset("d").num_rows == 10 * number
        again.close()
        return
    assert [info.name for info in again.datasets()] == ["e"]
    for use in (
        lambda: again.dataset("d"),
        lambda: again.open_writer("d", rows.schema(), "append"),
        lambda: again.stored_ranges("d", "u"),
    ):
        with pytest.raises(StoreUnavailableError, match=files[number].name):
            use()
    assert manifests(tmp_path) == before
    again.close()


def test_a_dataset_that_is_damaged_can_be_deleted(folder: Path) -> None:
    note_synced(folder / "d.lance", newest_version(folder / "d.lance")[0])
    newest(folder, "data/*.lance").unlink()
    store = open_store(f"lance:{folder}")
    store.delete_dataset("d")
    assert store.dataset("d") is None
    store.close()


def test_foreign_tables_are_left_alone_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import lancedb

    database = lancedb.connect(str(folder))
    database.create_table("my.table", [{"a": 1, "vector": [1.0, 2.0]}])
    database.create_table("other", [{"a": 1, "v": "x"}])
    garbage = folder / "zz.lance" / "_versions" / "1.manifest"
    garbage.parent.mkdir(parents=True)
    garbage.write_bytes(b"garbage" * 10)
    (folder / "d.lance" / "_versions" / "mine.manifest").write_bytes(b"garbage")
    store = open_store(f"lance:{folder}")
    for _ in range(2):
        assert [info.name for info in store.datasets()] == ["d"]
    assert caplog.text.count("`other` is left out") == 1
    assert caplog.text.count("`my.table` is left out") == 1
    with pytest.raises(InvalidCommandError, match="`other` is a LanceDB table that Fletcher did"):
        store.open_writer("other", rows.schema(), "append")
    with pytest.raises(InvalidCommandError, match="`other`"):
        store.delete_dataset("other")
    assert database.open_table("other").count_rows() == 1
    assert garbage.read_bytes() == b"garbage" * 10
    store.close()


def test_a_clone_is_read_and_its_files_are_not_missed(folder: Path) -> None:
    import lancedb

    lancedb.connect(str(folder)).clone_table("c", str(folder / "d.lance"))
    store = open_store(f"lance:{folder}")
    assert [(info.name, info.num_rows) for info in store.datasets()] == [("c", 150), ("d", 150)]
    store.close()


def test_a_table_without_a_whole_version_is_none(folder: Path) -> None:
    for path in (folder / "d.lance" / "_versions").glob("*.manifest"):
        cut(path, 0)
    note_synced(folder / "d.lance", 0)
    store = open_store(f"lance:{folder}")
    assert store.dataset("d") is None
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 10)])
    assert ids(store) == list(range(10))
    store.close()


def test_the_repair_opens_only_files_that_changed_since_the_last_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LanceStore(folder)
    writer = store.open_writer("d", rows.schema(), "append")
    whole = dict(store._whole["d"])
    assert {Path(path).suffix for path in whole} == {".lance"}
    opened: list[str] = []
    is_whole = repair._is_whole

    def note(file: str, **options: bool) -> bool:
        opened.append(file)
        return is_whole(file, **options)

    monkeypatch.setattr(repair, "_is_whole", note)
    set_torn_versions_aside(folder / "d.lance", whole)
    assert opened == []
    writer.append([rows.batch(150, 10)])
    store.close()
    opened.clear()
    set_torn_versions_aside(folder / "d.lance", whole)
    last = Path(*opened)
    content = last.read_bytes()
    for damage, word in ((lambda: cut(last, 100), "truncated"), (last.unlink, "missing")):
        damage()
        with pytest.raises(StoreUnavailableError, match=f"{last.name} is {word}"):
            set_torn_versions_aside(folder / "d.lance", whole)
        last.write_bytes(content)
        set_torn_versions_aside(folder / "d.lance", whole)


@pytest.mark.parametrize("behind", [0, 1])
def test_a_writer_syncs_old_files_only_if_the_newest_version_may_not_be_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    # With 5,000 files this took 0.4 s of processor time, and 27 s on a disk that others used.
    newest = newest_version(folder / "d.lance")[0]
    note_synced(folder / "d.lance", newest - behind)
    synced: list[str] = []
    monkeypatch.setattr(synced_folder, "sync_path", lambda path: synced.append(str(path)))
    store = LanceStore(folder)
    writer = store.open_writer("d", rows.schema(), "append")
    old = {str(path) for path in (folder / "d.lance" / "data").iterdir()}
    assert len(old) == 2
    assert old & set(synced) == (old if behind else set())
    synced.clear()
    writer.append([rows.batch(150, 10)])
    new = {str(path) for path in (folder / "d.lance" / "data").iterdir()} - old
    assert set(synced) & (old | new) == new
    assert newest_version(folder / "d.lance")[0] == newest + 1
    store.close()
