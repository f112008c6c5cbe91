"""LanceDB tables with large rows, whose compaction would take much memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from fletcher.stores.address import open_store
from tests.doubles import store_rows as rows

_NUM_APPENDS = 25


def _num_fragments(folder: Path, appends: int = _NUM_APPENDS) -> int:
    """Number of fragments after some appends of ten rows by a new store."""
    store = open_store(f"lance:{folder}")
    writer = store.open_writer("d", rows.schema(), "append")
    first = store.dataset("d").num_rows
    for number in range(appends):
        writer.append([rows.batch(first + number * 10, 10)])
    writer.close()
    found = store.scan("d", columns=["id"]).read_all()["id"].to_pylist()
    assert sorted(found) == sorted(f"id{row}" for row in range(first + appends * 10))
    stats = store._open_table("d").stats()
    store.close()
    return int(stats["fragment_stats"]["num_fragments"])


@pytest.mark.parametrize(
    ("constants", "compacted"),
    [
        ({}, True),
        ({"LARGE_BYTES": 1}, False),
        ({"HEAVY_BYTES": 1, "HEAVY_ROW_BYTES": 1}, False),
        ({"HEAVY_BYTES": 1 << 20, "HEAVY_ROW_BYTES": 1}, True),  # few bytes
        ({"HEAVY_BYTES": 1, "HEAVY_ROW_BYTES": 1 << 20}, True),  # small rows
        ({"HEAVY_BYTES": 1, "HEAVY_ROW_BYTES": 1, "COMPACT_FRAGMENTS_AT_MOST": 22}, True),
        ({"LARGE_BYTES": 1, "COMPACT_FRAGMENTS_AT_MOST": 22}, True),
        (
            {
                "LARGE_BYTES": 1,
                "HEAVY_BYTES": 1,
                "HEAVY_ROW_BYTES": 1,
                "COMPACT_FRAGMENTS_AT_MOST": 22,
            },
            False,
        ),
    ],
)
def test_large_rows_are_compacted_seldom(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    constants: dict[str, int],
    compacted: bool,
) -> None:
    for name, value in constants.items():
        monkeypatch.setattr(f"fletcher.stores.lance.writer.{name}", value)
    assert (_num_fragments(tmp_path) < _NUM_APPENDS) == compacted


def test_a_writer_counts_the_bytes_that_are_stored_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _num_fragments(tmp_path, 8)
    store = open_store(f"lance:{tmp_path}")
    info = store.dataset("d")
    store.close()
    monkeypatch.setattr("fletcher.stores.lance.writer.HEAVY_ROW_BYTES", 1)
    monkeypatch.setattr("fletcher.stores.lance.writer.HEAVY_BYTES", info.num_bytes)
    monkeypatch.setattr("fletcher.stores.lance.writer.COMPACT_FRAGMENTS", 4)
    assert _num_fragments(tmp_path, 3) == 11
