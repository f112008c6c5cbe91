"""Checks of rows against what a dataset remembers."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from fletcher.core.schema import TIMESTAMP
from fletcher.errors import ColumnTypeError, ModelMismatchError
from fletcher.stores.address import open_store
from fletcher.stores.flight.longbow import longbow_batch, longbow_schema
from fletcher.stores.schemas import check_compatible, conform_batch
from tests.doubles.store_rows import batch, schema

NANOS = pa.timestamp("ns", tz="UTC")
TIME = 1_700_000_000_000_000_001


@pytest.mark.parametrize(
    ("key", "old", "new", "message"),
    [
        ("prompt", "query: ", "passage: ", r"`fletcher\.prompt` is passage: , .* with query: "),
        ("prompt", "", "passage: ", r"`fletcher\.prompt` is passage: , .* with an empty one"),
        ("prompt", "query: ", "", r"`fletcher\.prompt` is empty"),
        ("chunking", "none", "tokens:64:mean", r"`fletcher\.chunking` is tokens:64:mean"),
        ("similarity", "cosine", "dot", r"`fletcher\.similarity` is dot, .* written with cosine"),
    ],
)
def test_a_dataset_remembers_how_its_vectors_were_made(
    key: str, old: str, new: str, message: str
) -> None:
    stored = schema().with_metadata({f"fletcher.{key}": old})
    check_compatible("d", stored, schema().with_metadata({f"fletcher.{key}": old}))
    check_compatible("d", stored, schema().remove_metadata())  # of a version that did not say
    with pytest.raises(ModelMismatchError, match=message):
        check_compatible("d", stored, schema().with_metadata({f"fletcher.{key}": new}))


def _times(value: int, kind: pa.DataType, *, fletcher: bool = True) -> pa.RecordBatch:
    column = pa.array([value, None], pa.int64()).cast(kind)
    metadata = {"fletcher.model": "m@1"} if fletcher else None
    return pa.record_batch([column], pa.schema([("timestamp", kind)], metadata))


@pytest.mark.parametrize(
    ("stored", "offered", "value", "expected"),
    [
        (NANOS, TIMESTAMP, TIME // 1000, TIME // 1000 * 1000),
        (TIMESTAMP, NANOS, TIME, TIME // 1000),  # a journal of an earlier release
        (NANOS, NANOS, TIME, TIME),
        (TIMESTAMP, TIMESTAMP, TIME, TIME),
    ],
)
def test_receipt_times_get_the_unit_of_the_dataset(stored, offered, value, expected) -> None:
    rows = _times(value, offered)
    dataset = pa.schema([("timestamp", stored)])
    check_compatible("d", dataset, rows.schema)
    column = conform_batch(rows, dataset).column("timestamp")
    assert column.type == stored
    assert column.cast(pa.int64()).to_pylist() == [expected, None]


def test_times_of_other_programs_are_kept_exactly_or_refused() -> None:
    dataset = pa.schema([("timestamp", TIMESTAMP)])
    whole = _times(TIME - 1, NANOS, fletcher=False)
    assert conform_batch(whole, dataset).column("timestamp").cast(pa.int64())[0].as_py() == (
        (TIME - 1) // 1000
    )
    with pytest.raises(ColumnTypeError, match=r"`timestamp` is timestamp\[ns, tz=UTC\].*lose data"):
        conform_batch(_times(TIME, NANOS, fletcher=False), dataset)
    beyond = _times(10**17, TIMESTAMP)  # the year 5138
    with pytest.raises(ColumnTypeError, match=r"`timestamp` .*a value does not fit"):
        conform_batch(beyond, pa.schema([("timestamp", NANOS)]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("timestamp", pa.timestamp("us")),
        ("timestamp", pa.timestamp("us", "Europe/Berlin")),
        ("timestamp", pa.timestamp("ms", "UTC")),
        ("timestamp", pa.int64()),
        ("made_at", pa.timestamp("us", "UTC")),
    ],
)
def test_only_receipt_times_have_two_units(name: str, kind: pa.DataType) -> None:
    with pytest.raises(ColumnTypeError, match=f"`{name}` is"):
        check_compatible("d", pa.schema([(name, NANOS)]), pa.schema([(name, kind)]))


def test_other_columns_are_untouched_by_a_dataset_with_nanoseconds() -> None:
    new = batch(0, 3)
    index = new.schema.get_field_index("timestamp")
    dataset = new.schema.set(index, pa.field("timestamp", NANOS))
    found = conform_batch(new, dataset)
    assert found.schema.equals(dataset)
    for name in set(new.schema.names) - {"timestamp"}:
        assert found.column(name).equals(new.column(name)), name


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.timestamp("us", "UTC"), pa.timestamp("ms")])
def test_a_time_that_a_longbow_cannot_hold_is_refused_by_name(kind: pa.DataType) -> None:
    """Arrow's error counted as an unknown one, and the rows were sent again for ever."""
    time = {"s": 253_402_300_799, "ms": 253_402_300_799_000, "us": 253_402_300_799_000_000}
    rows = batch(0, 1, dtype="float32").append_column("until", pa.array([1], kind))
    narrow = longbow_schema(rows.schema)
    assert longbow_batch(rows, narrow).column("until").type == pa.timestamp("ns")
    late = rows.drop_columns(["until"]).append_column("until", pa.array([time[kind.unit]], kind))
    with pytest.raises(ColumnTypeError, match=r"`until` is .* does not fit"):
        longbow_batch(late, narrow)


@pytest.mark.parametrize(
    "kind", [pa.decimal128(5, -2), pa.binary(0), pa.month_day_nano_interval(), pa.decimal32(5, 1)]
)
def test_a_type_that_parquet_cannot_hold_is_refused_by_name(
    kind: pa.DataType, tmp_path: Path
) -> None:
    """Some of them raised an OSError of pyarrow."""
    store = open_store(f"parquet:{tmp_path}")
    with pytest.raises(ColumnTypeError, match="`odd` is"):
        store.open_writer("d", schema().append(pa.field("odd", kind)), "append")
    assert store.dataset("d") is None
