"""Datasets that earlier releases wrote: receipt times in nanoseconds, `:` in names of files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from fletcher.core.schema import TIMESTAMP
from fletcher.errors import ColumnTypeError
from fletcher.stores.address import open_store
from fletcher.stores.base import Comparison, Store, WriteMode
from fletcher.stores.staging import staged_name
from tests.doubles import store_rows

NANOS = pa.timestamp("ns", tz="UTC")
FIRST = 1_700_000_000_000_000  # the receipt time of row 0


@pytest.fixture(params=["lance", "parquet"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"{request.param}:{tmp_path / 'store'}")
    yield opened
    opened.close()


def earlier(rows: pa.RecordBatch) -> pa.RecordBatch:
    """The rows as an earlier release made them: 123 ns later."""
    index = rows.schema.get_field_index("timestamp")
    nanos = pa.array([time * 1000 + 123 for time in times(rows)], NANOS)
    return rows.set_column(index, pa.field("timestamp", NANOS), nanos)


def times(rows: pa.RecordBatch | pa.Table) -> list[int]:
    return rows.column("timestamp").cast(pa.int64()).to_pylist()


def write(
    store: Store, *batches: pa.RecordBatch, to: str = "d", mode: WriteMode = "append"
) -> None:
    with closing(store.open_writer(to, batches[0].schema, mode)) as writer:
        writer.append(batches)


def test_new_rows_in_a_dataset_with_nanoseconds(store: Store) -> None:
    write(store, earlier(store_rows.batch(0, 3)))
    write(store, store_rows.batch(3, 2))
    write(store, earlier(store_rows.batch(5, 1)))
    found = store.scan("d").read_all()
    assert found.schema.field("timestamp").type == NANOS
    assert times(found) == [
        *((FIRST + row) * 1000 + 123 for row in range(3)),
        *((FIRST + row) * 1000 for row in (3, 4)),
        (FIRST + 5) * 1000 + 123,
    ]
    late = [Comparison("timestamp", ">=", "2023-11-14T22:13:20.000003Z")]
    assert store.scan("d", filters=late).read_all()["id"].to_pylist() == ["id3", "id4", "id5"]
    hits = store.search("d", store_rows.vectors(4, 1)[0], k=1, columns=["id", "timestamp"])
    assert (hits["id"].to_pylist(), times(hits)) == (["id4"], [(FIRST + 4) * 1000])


def test_rows_of_an_earlier_journal_in_a_dataset_with_microseconds(store: Store) -> None:
    write(store, store_rows.batch(0, 2))
    write(store, earlier(store_rows.batch(2, 2)))
    found = store.scan("d").read_all()
    assert found.schema.field("timestamp").type == TIMESTAMP
    assert times(found) == [FIRST + row for row in range(4)]


def test_a_replacement_brings_its_own_unit(store: Store) -> None:
    write(store, earlier(store_rows.batch(0, 3)))
    staged = staged_name("d", "u")
    write(store, store_rows.batch(0, 2), to=staged)
    store.replace_dataset("d", staged)
    found = store.scan("d").read_all()
    assert found.schema.field("timestamp").type == TIMESTAMP
    assert times(found) == [FIRST, FIRST + 1]


def test_rows_that_replace_rows_with_nanoseconds(tmp_path: Path) -> None:
    store = open_store(f"lance:{tmp_path}")
    write(store, earlier(store_rows.batch(0, 3)))
    write(store, store_rows.batch(1, 1, upload="v", text="new"), mode="upsert")
    found = store.scan("d").read_all().sort_by("id")
    store.close()
    assert found["text"].to_pylist() == ["text 0", "new 1", "text 2"]
    assert [time % 1000 for time in times(found)] == [123, 0, 123]


def _earlier_names(folder: Path) -> None:
    for path in folder.glob("*~*.parquet"):
        path.rename(path.with_name(path.name.replace("~", ":")))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


def test_names_of_parquet_files_have_no_sign_that_other_programs_read(tmp_path: Path) -> None:
    store = open_store(f"parquet:{tmp_path}")
    write(store, store_rows.batch(0, 3, upload="A-b_1"), store_rows.batch(3, 1, upload="x.0f"))
    assert _names(tmp_path / "d") == ["A-b_1~0-2.parquet", "x.0f~3-3.parquet"]
    writer = store.open_writer("d", store_rows.schema(), "append")
    assert writer.missing_keys(["x.0f:3-3", "x.0f~3-3", "it's:0-1"]) == ["x.0f~3-3", "it's:0-1"]
    writer.close()
    assert store.stored_ranges("d", "A-b_1") == [(0, 2)]
    assert store.stored_ranges("d", "x.0f") == [(3, 3)]
    assert store.stored_ranges("d", "x") == []
    for key in ("a*b:0-0", "u~0-0", "a b:0-0", "u%3A:0-0", ".u:0-0", "", "x" * 201, "a\\b:0-0"):
        with pytest.raises(ColumnTypeError, match=r"`batch_key` is .* file's name"):
            write(store, _keyed(store_rows.batch(9, 1), key))


def _keyed(rows: pa.RecordBatch, key: str) -> pa.RecordBatch:
    index = rows.schema.get_field_index("batch_key")
    return rows.set_column(index, rows.schema.field(index), pa.array([key] * rows.num_rows))


def test_groups_with_names_of_earlier_releases_still_count(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    store = open_store(f"parquet:{tmp_path}")
    write(store, store_rows.batch(0, 3), store_rows.batch(10, 2))
    _earlier_names(folder)
    earlier_names = ["u:0-2.parquet", "u:10-11.parquet"]
    assert _names(folder) == earlier_names
    writer = store.open_writer("d", store_rows.schema(), "append")
    assert writer.missing_keys(["u:0-2", "u:3-9", "u:10-11"]) == ["u:3-9"]
    writer.append([store_rows.batch(0, 3), store_rows.batch(3, 7), store_rows.batch(10, 2)])
    writer.close()
    assert _names(folder) == sorted([*earlier_names, "u~3-9.parquet"])
    assert store.stored_ranges("d", "u") == [(0, 11)]
    found = store.scan("d").read_all()
    assert found["id"].to_pylist() == [f"id{row}" for row in (0, 1, 2, 10, 11, *range(3, 10))]


def test_a_staged_dataset_of_an_earlier_release_replaces_the_dataset(tmp_path: Path) -> None:
    store = open_store(f"parquet:{tmp_path}")
    write(store, store_rows.batch(0, 3))
    staged = staged_name("d", "u")
    write(store, earlier(store_rows.batch(5, 2)), to=staged)
    _earlier_names(tmp_path / "d")
    _earlier_names(tmp_path / staged)
    assert store.stored_ranges(staged, "u") == [(5, 6)]
    store.replace_dataset("d", staged)
    assert _names(tmp_path / "d") == ["u:5-6.parquet"]
    assert store.scan("d").read_all()["id"].to_pylist() == ["id5", "id6"]
    assert store.stored_ranges("d", "u") == [(5, 6)]
