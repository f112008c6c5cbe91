"""A LanceDB table after a power loss that left a commit half on the disk."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from fletcher.errors import StoreUnavailableError
from fletcher.stores.address import open_store
from fletcher.stores.base import Store
from fletcher.stores.lance.repair import _torn
from fletcher.stores.lance.store import LanceStore
from tests.doubles import store_rows as rows

pytest.importorskip("lancedb")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with rows 0 to 99, and 100 to 149 in a commit of their own."""
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 100)])
    writer.append([rows.batch(100, 50)])
    store.close()
    return tmp_path


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
        assert store.stored_ranges("d", "u") == [(0, 99)]
        assert ids(store) == list(range(100))
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
    assert not _torn(manifest, folder / "d.lance")
    damaged = [whole[:size] for size in range(len(whole))]
    damaged.append(whole[:-16] + b"\xff" * 16)
    damaged += [
        whole[:-16] + struct.pack("<QHH4s", place, 0, 2, b"LANC")
        for place in (len(whole), 1 << 62, (1 << 64) - 1)
    ]
    for data in damaged:
        manifest.write_bytes(data)
        assert _torn(manifest, folder / "d.lance"), len(data)


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
    before = sorted(path.name for path in (folder / "d.lance" / "_versions").iterdir())
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
    assert sorted(path.name for path in (folder / "d.lance" / "_versions").iterdir()) == before
    assert not caplog.records


def test_a_table_without_a_whole_version_is_none(folder: Path) -> None:
    for path in (folder / "d.lance" / "_versions").glob("*.manifest"):
        cut(path, 0)
    store = open_store(f"lance:{folder}")
    assert store.dataset("d") is None
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 10)])
    assert ids(store) == list(range(10))
    store.close()
