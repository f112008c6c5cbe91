"""Datasets that earlier releases wrote: receipt times in nanoseconds, `:` in names of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from fletcher.core.schema import TIMESTAMP
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
    writer = store.open_writer(to, batches[0].schema, mode)
    writer.append(batches)
    writer.close()


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
