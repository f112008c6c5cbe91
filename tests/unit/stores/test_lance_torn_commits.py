"""LanceDB's commits of files that lack their end, because the disk failed at the last write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fletcher.errors import StoreUnavailableError
from fletcher.stores.address import open_store
from fletcher.stores.base import Store
from fletcher.stores.staging import staged_name
from tests.doubles import store_rows as rows

lancedb_table = pytest.importorskip("lancedb.table")


def truncating(folder: Path, step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, after which the newest data file lacks its last 12 bytes."""

    def failing(*args: Any, **named: Any) -> Any:
        result = step(*args, **named)
        path = max(folder.glob("data/*.lance"), key=lambda one: one.stat().st_mtime_ns)
        os.truncate(path, path.stat().st_size - 12)
        return result

    return failing


def texts(store: Store) -> dict[str, str]:
    table = store.scan("d", columns=["id", "text"]).read_all()
    found = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert len(found) == table.num_rows
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with rows 0 to 99 in dataset `d`."""
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 100)])
    writer.close()
    return store


@pytest.mark.parametrize("mode", ["append", "upsert"])
def test_rows_of_a_torn_commit_are_not_stored(
    store: Store, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = texts(store)
    writer = store.open_writer("d", rows.schema(), mode)
    name = "add" if mode == "append" else "_do_merge"
    step = getattr(lancedb_table.LanceTable, name)
    with monkeypatch.context() as patch:
        patch.setattr(lancedb_table.LanceTable, name, truncating(tmp_path / "d.lance", step))
        with pytest.raises(StoreUnavailableError, match=r"`d`: data/.* is truncated"):
            writer.append([rows.batch(100, 50)])
        assert texts(store) == before  # readers get the version before
        writer.close()
    writer = store.open_writer("d", rows.schema(), mode)
    assert writer.missing_keys(["u:0-99", "u:100-149"]) == ["u:100-149"]
    writer.append([rows.batch(100, 50)])
    store.close()
    again = open_store(f"lance:{tmp_path}")
    assert set(texts(again)) == {f"id{row}" for row in range(150)}
    again.close()


def test_rows_stay_when_a_compaction_is_torn(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("fletcher.stores.lance.writer.COMPACT_FRAGMENTS", 3)
    step = truncating(tmp_path / "d.lance", lancedb_table.LanceTable.optimize)
    monkeypatch.setattr(lancedb_table.LanceTable, "optimize", step)
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(100, 50)])
    writer.append([rows.batch(150, 50)])
    writer.close()  # waits for the compaction
    assert "was not compacted: dataset `d`: data/" in caplog.text
    monkeypatch.undo()
    assert set(texts(store)) == {f"id{row}" for row in range(200)}
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(200, 10)])
    assert set(texts(store)) == {f"id{row}" for row in range(210)}
    store.close()


def test_a_torn_replacement_replaces_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = texts(store)
    staged = staged_name("d", "v")
    writer = store.open_writer(staged, rows.schema(), "append")
    writer.append([rows.batch(0, 30, text="new")])
    writer.close()
    database = store._database  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        step = truncating(tmp_path / "d.lance", database.create_table)
        patch.setattr(database, "create_table", step)
        with pytest.raises(StoreUnavailableError, match=r"`d`: data/.* is truncated"):
            store.replace_dataset("d", staged)
    assert texts(store) == before
    store.replace_dataset("d", staged)
    assert len(texts(store)) == 30
    assert all(text.startswith("new") for text in texts(store).values())
    store.close()
