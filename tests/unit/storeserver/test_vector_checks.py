"""Vectors that would make a dataset unsearchable are refused with their row."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from fletcher.errors import ColumnTypeError, RequestError
from fletcher.storeserver.vector_checks import check_vectors
from tests.doubles import store_rows as rows

NAN = float("nan")


def changed(output: str, dtype: str, name: str, *values: Any) -> pa.RecordBatch:
    """Four good rows, of which the last ones get other values in a column."""
    batch = rows.list_batch(0, 4, output, dtype)
    kept = batch[name].to_pylist()[: 4 - len(values)]
    place = batch.schema.get_field_index(name)
    column = pa.array([*kept, *values], batch.schema.field(name).type)
    return batch.set_column(place, batch.schema.field(name), column)


@pytest.mark.parametrize("output", ["sparse", "multi"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_good_rows_slices_and_nothing_pass(output: str, dtype: str) -> None:
    batch = rows.list_batch(0, 30, output, dtype)
    for one in (batch, batch.slice(3, 12), batch.slice(6, 1), batch.slice(0, 0)):
        check_vectors(one)
    check_vectors(changed(output, dtype, "vector", [], None))


@pytest.mark.parametrize(
    ("output", "value"),
    [
        ("sparse", [{"index": 1, "value": NAN}]),
        ("sparse", [{"index": 1, "value": 1.0}, {"index": 2, "value": float("inf")}]),
        ("sparse", [{"index": 30_000, "value": 1.0}]),
        ("sparse", [{"index": -1, "value": 1.0}]),
        ("sparse", [{"index": None, "value": 1.0}]),
        ("sparse", [{"index": 1, "value": None}]),
        ("sparse", [None]),
        ("multi", [[1.0] * 8, [1.0] * 7 + [NAN]]),
        ("multi", [[1.0] * 7 + [None]]),
        ("multi", [None]),
    ],
    ids=str,
)
def test_one_bad_value_is_refused_with_its_row(output: str, value: Any) -> None:
    batch = changed(output, "float32", "vector", None, value, [])
    with pytest.raises(RequestError, match="row 2 of a batch has a null, NaN") as caught:
        check_vectors(batch)
    assert caught.value.field == "vector"
    with pytest.raises(RequestError, match="row 1 of a batch"):
        check_vectors(batch.slice(1))
    check_vectors(batch.slice(0, 2))


@pytest.mark.parametrize(
    ("value", "said"),
    [([0.5], "row 3 of a batch has another number"), ([NAN] * 9, "NaN"), (None, "row 3")],
    ids=str,
)
def test_scales_must_fit_their_vectors(value: Any, said: str) -> None:
    batch = changed("multi", "int8", "vector", [[1] * 8] * 9)
    batch = batch.set_column(
        batch.schema.get_field_index("scale"),
        batch.schema.field("scale"),
        pa.array([*batch["scale"].to_pylist()[:3], value], pa.list_(pa.float32())),
    )
    with pytest.raises(RequestError, match=said):
        check_vectors(batch)
    with pytest.raises(ColumnTypeError, match="`scale` is missing"):
        check_vectors(batch.drop_columns("scale"))
    check_vectors(rows.list_batch(0, 20, "multi", "int8").slice(5, 9))


@pytest.mark.parametrize("output", ["sparse", "multi"])
def test_the_metadata_must_say_what_the_lists_are(output: str) -> None:
    batch = rows.list_batch(0, 4, output, "float32")
    with pytest.raises(ColumnTypeError, match=r"with `fletcher\.output` in the schema metadata"):
        check_vectors(batch.replace_schema_metadata(None))
    other = {b"fletcher.output": b"multi" if output == "sparse" else b"sparse"}
    with pytest.raises(ColumnTypeError, match="`vector` is"):
        check_vectors(batch.replace_schema_metadata({**batch.schema.metadata, **other}))
    with pytest.raises(ColumnTypeError, match="`vector` is"):
        check_vectors(rows.batch(0, 1).replace_schema_metadata(batch.schema.metadata))
    check_vectors(rows.batch(0, 3).replace_schema_metadata(None))
