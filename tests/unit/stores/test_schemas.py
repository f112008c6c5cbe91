"""Checks of rows against what a dataset remembers."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fletcher.core.schema import TIMESTAMP
from fletcher.errors import ColumnTypeError, ModelMismatchError
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
