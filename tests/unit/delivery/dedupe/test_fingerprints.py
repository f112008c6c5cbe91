"""Keys by which rows are compared, in particular carried columns of delta uploads."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from fletcher.delivery.dedupe.fingerprints import (
    compared_columns,
    delta_kind,
    has_same_text,
    is_delta,
    needed_columns,
    row_keys,
    stored_keys,
    value_bytes,
)

_OWN = pa.schema(
    [
        *[("id", pa.utf8()), ("vector", pa.list_(pa.float32(), 1)), ("timestamp", pa.int64())],
        *[("token_count", pa.int32()), ("truncated", pa.bool_()), ("text", pa.utf8())],
    ]
)

# A carried column's type, a value, and another value.
CHANGES: list[tuple[pa.DataType, Any, Any]] = [
    (pa.utf8(), "u1", "u2"),
    (pa.utf8(), None, ""),
    (pa.int64(), 1, 2),
    (pa.float32(), 1.5, float("nan")),
    (pa.timestamp("ns"), 1_700_000_000_000_000_001, 1_700_000_000_000_000_002),
    (pa.date32(), 1, None),
    (pa.binary(), b"\xff", b"\xfe"),
    (pa.struct([("a", pa.int64()), ("b", pa.list_(pa.utf8()))]), {"a": 1, "b": ["x"]}, {"a": 1}),
    (pa.list_(pa.float32(), 2), [1.0, float("nan")], [1.0, 2.0]),
    (pa.bool_(), True, None),
]


def rows(kind: pa.DataType, *values: Any, carried: bool = False) -> pa.RecordBatch:
    column = pa.array(values, kind)
    number = len(values)
    name = "carried:x" if carried else "x"
    return pa.record_batch({"id": ["a"] * number, "text": ["same"] * number, name: column})


def test_a_delta_upload_compares_its_carried_columns() -> None:
    assert delta_kind(_OWN) == "delta"
    kind = delta_kind(_OWN.append(pa.field("url", pa.utf8())).append(pa.field("a:b", pa.utf8())))
    assert is_delta(kind)
    assert compared_columns(kind) == ["a:b", "url"]
    assert needed_columns(kind) == ("id", "text")
    assert (value_bytes(kind), value_bytes("delta")) == (32, 16)
    assert compared_columns("id") == compared_columns("delta") == []


@pytest.mark.parametrize(("kind", "value", "other"), CHANGES)
def test_a_changed_carried_column_is_a_change(kind: pa.DataType, value: Any, other: Any) -> None:
    # The row counted as stored already, and the old value stayed.
    delta = delta_kind(pa.schema([*_OWN, ("x", kind)]))
    received = row_keys(delta, rows(kind, value, other, value, carried=True))
    assert received[0] == received[2]
    assert received[0] != received[1]
    assert received[0][0] == received[1][0]
    assert has_same_text(received[0][1], received[1][1])
    assert len(received[0][1] or b"") == value_bytes(delta)
    stored = stored_keys(delta, rows(kind, value), ())
    assert stored == {received[0][0]: received[0][1]}


def test_a_dataset_without_the_column_has_nulls_there() -> None:
    delta = delta_kind(pa.schema([*_OWN, ("x", pa.utf8())]))
    without = pa.record_batch({"id": ["a"], "text": ["same"]})
    null, given = row_keys(delta, rows(pa.utf8(), None, "u"))
    assert row_keys(delta, without) == [null]
    assert row_keys(delta, without) != [given]


def test_values_of_two_columns_do_not_run_together() -> None:
    delta = delta_kind(pa.schema([*_OWN, ("x", pa.utf8()), ("y", pa.utf8())]))
    batch = pa.record_batch(
        {"id": ["a", "a"], "text": ["t", "t"], "x": ["1", "1', '2"], "y": ["2', '3", "3"]}
    )
    one, other = row_keys(delta, batch)
    assert one != other


def test_an_id_without_a_text_has_the_text_of_no_row() -> None:
    delta = delta_kind(pa.schema([*_OWN, ("x", pa.utf8())]))
    batch = pa.record_batch({"id": ["a"], "text": pa.array([None], pa.utf8()), "x": ["1"]})
    (indexed,) = stored_keys(delta, batch, ()).values()
    assert len(indexed) == value_bytes(delta)
    ((_, value),) = row_keys(delta, rows(pa.utf8(), "1"))
    assert not has_same_text(value, indexed)
    assert not has_same_text(None, indexed)
    assert not has_same_text(value, None)
