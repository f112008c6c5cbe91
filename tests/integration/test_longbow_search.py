"""Searches and filters on a Longbow, against the stand-in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from fletcher.errors import ColumnTypeError, RequestError, UnknownColumnError, UnknownDatasetError
from fletcher.stores.address import open_store
from fletcher.stores.base import Comparison
from fletcher.stores.exact_search import APPROXIMATE
from fletcher.stores.filter_parser import parse_filter
from fletcher.stores.filters import to_expression
from fletcher.stores.flight.longbow_reader import MAX_INDEX_K
from tests.doubles import store_rows as rows

NUM_ROWS = 60
CONDITIONS = [
    "year = 2003",
    "year > 2003 and not (lang in (de, fr))",
    "lang = de or year <= 2001",
    'lang = "it\'s"',
    "flag = true",
    "token_count < 10 and n >= 5",
    "lang is null",
    "lang != de",
    "price > 1e-07",
    "day >= 1970-01-20",
    "lang >= fr and lang < zz",
    "token_count > 100",
]


def table(id_type: pa.DataType) -> pa.Table:
    """Rows with columns of many types, in Longbow's types."""
    numbers = list(range(NUM_ROWS))
    ids = [f"id{one}" for one in numbers] if id_type == pa.utf8() else numbers
    vectors = pa.array(rows.vectors(0, NUM_ROWS).reshape(-1))
    columns = {
        "id": pa.array(ids, id_type),
        "vector": pa.FixedSizeListArray.from_arrays(vectors, 8),
        "timestamp": pa.array(numbers, pa.timestamp("ns")),
        "text": pa.array([f"text {one}" for one in numbers]),
        "year": pa.array([2000 + one % 7 for one in numbers], pa.int32()),
        "n": pa.array([None if one % 5 == 0 else one for one in numbers], pa.int64()),
        "lang": pa.array([("de", "fr", "it's", None)[one % 4] for one in numbers]),
        "flag": pa.array([one % 3 == 0 for one in numbers]),
        "token_count": pa.array(numbers, pa.int32()),
        "price": pa.array([one / 10 for one in numbers], pa.float32()),
        "day": pa.array(numbers, pa.date32()),
    }
    return pa.table(columns).replace_schema_metadata({"fletcher.normalized": "true"})


def nearest(given: pa.Table, query: np.ndarray, k: int) -> list[object]:
    """The right answer: ids by cosine."""
    vectors = np.stack(given["vector"].to_numpy(zero_copy_only=False)) if len(given) else []
    order = np.argsort(-(vectors @ query), kind="stable")[:k] if len(given) else []
    return given["id"].take(pa.array(order, pa.int64())).to_pylist()


@pytest.fixture(params=["utf8", "int64", "uint64"])
def given(request, double):
    found = table({"utf8": pa.utf8(), "int64": pa.int64(), "uint64": pa.uint64()}[request.param])
    for batch in found.to_batches(max_chunksize=17):
        double.store("d", batch)
    return found


@pytest.fixture
def store(double):
    opened = open_store(double.address, timeout_s=20)
    yield opened
    opened.close()


def filtered(given: pa.Table, text: str) -> tuple[list, pa.Table]:
    conditions = [parse_filter(text, given.schema)]
    return conditions, given.filter(to_expression("d", given.schema, conditions))


@pytest.mark.parametrize("text", CONDITIONS)
def test_filters_of_every_kind_are_right(store, given, text):
    conditions, right = filtered(given, text)
    query = rows.vectors(7, 1)[0]
    for _ in range(2):  # the second search may use the index
        found = store.search("d", query, k=4, columns=["id", "year"], filters=conditions)
        assert found["id"].to_pylist() == nearest(right, query, 4)
        assert found.column_names == ["id", "year", "score"]
    read = store.scan("d", columns=["id"], filters=conditions).read_all()
    assert sorted(read["id"].to_pylist()) == sorted(right["id"].to_pylist())


def test_rows_that_are_filtered_here_come_without_warnings(store, given, capfd):
    # Arrow wrote a line for each buffer that lay where it had been received.
    conditions, expected = filtered(given, "year > 2003 or token_count < 10")
    assert store.scan("d", filters=conditions).read_all().num_rows == expected.num_rows
    assert capfd.readouterr().err == ""


def test_two_filters_must_both_be_met(store, given):
    first, _ = filtered(given, "year = 2003")
    second, _ = filtered(given, "lang = de")
    found = store.scan("d", filters=[*first, *second]).read_all()
    right = given.filter(pc.and_(pc.equal(given["year"], 2003), pc.equal(given["lang"], "de")))
    assert sorted(found["id"].to_pylist()) == sorted(right["id"].to_pylist())


def test_scores_are_cosines_and_texts_come_along(store, given):
    query = rows.vectors(7, 1)[0] * 3  # the length of a query does not matter
    found = store.search("d", query, k=3)
    vectors = np.stack(found["vector"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(found["score"].to_numpy(), vectors @ query / 3, atol=1e-6)
    assert found["text"][0].as_py() == "text 7"
    assert APPROXIMATE not in (found.schema.metadata or {})


def used_index(store, query, k=3, **more) -> bool:
    found = store.search("d", query, k=k, **more)
    return APPROXIMATE in (found.schema.metadata or {})


@pytest.mark.parametrize("given", ["int64"], indirect=True)
def test_the_index_is_used_once_it_is_known_to_have_all_rows(double, store, given):
    query = rows.vectors(7, 1)[0]
    assert not used_index(store, query)
    assert used_index(store, query)
    found = store.search("d", query, k=3)
    assert found["id"].to_pylist() == nearest(given, query, 3)
    assert found["score"][0].as_py() == pytest.approx(1, abs=1e-6)
    assert not used_index(store, query, filters=filtered(given, "lang = de")[0])
    assert not used_index(store, query, filters=filtered(given, "year = 2003")[0])
    assert not used_index(store, query, k=MAX_INDEX_K + 1)
    double.num_unindexed = 1
    assert not used_index(store, query)
    double.num_unindexed = 0
    double.store("d", given.slice(0, 1).to_batches()[0])
    assert not used_index(store, query), "rows were added that nobody has counted"
    assert used_index(store, query)


@pytest.mark.parametrize("given", ["int64"], indirect=True)
def test_rows_that_come_after_a_search_are_found_by_the_same_search(double, store, given):
    # A Longbow keeps the rows that meet a filter, and never looks for more.
    conditions, _ = filtered(given, "lang = de")
    query = rows.vectors(8, 1)[0]
    for _ in range(2):
        assert store.search("d", query, k=1, filters=conditions)["id"].to_pylist() == [8]
    better = given.slice(8, 1).set_column(0, "id", pa.array([100]))
    for column in ("text", "token_count"):
        better = better.set_column(
            better.schema.get_field_index(column), column, given.slice(0, 1)[column]
        )
    double.store("d", better.to_batches()[0])
    for _ in range(2):
        found = store.search("d", query, k=2, filters=conditions)
        assert sorted(found["id"].to_pylist()) == [8, 100]


@pytest.mark.parametrize("given", ["utf8", "uint64"], indirect=True)
def test_an_index_that_tells_no_ids_is_not_used(store, given):
    query = rows.vectors(7, 1)[0]
    assert not any(used_index(store, query) for _ in range(2))


def test_ids_that_the_index_cuts_off_are_found_by_reading(double, store):
    given = table(pa.int64())
    far = pa.array([one + (1 << 32) for one in range(NUM_ROWS)])
    for batch in given.set_column(0, "id", far).to_batches():
        double.store("d", batch)
    query = rows.vectors(7, 1)[0]
    for _ in range(2):
        found = store.search("d", query, k=2)
        assert found["id"][0].as_py() == 7 + (1 << 32)


@pytest.mark.parametrize("given", ["int64"], indirect=True)
def test_a_deleted_row_is_not_found(double, store, given):
    query = rows.vectors(7, 1)[0]
    double.deleted["d"].add(7)
    for _ in range(2):
        assert 7 not in store.search("d", query, k=3)["id"].to_pylist()
    conditions, _ = filtered(given, "text = 'text 7'")
    assert store.scan("d", filters=conditions).read_all().num_rows == 0


@pytest.mark.parametrize("given", ["utf8", "int64"], indirect=True)
def test_a_dataset_too_large_to_read_is_searched_by_index_or_refused(double, store, given):
    assert store.capabilities
    store._server._reader._max_read_bytes = 2000
    query = rows.vectors(7, 1)[0]
    if given["id"].type == pa.int64():
        assert store.search("d", query, k=1)["id"].to_pylist() == [7]
    else:
        with pytest.raises(RequestError, match="too large for a search"):
            store.search("d", query, k=1)
    conditions, _ = filtered(given, "text = 'text 7' and year >= 2000")
    found = store.search("d", query, k=1, filters=conditions)
    assert found["text"].to_pylist() == ["text 7"]
    assert APPROXIMATE in found.schema.metadata, "filters of a Longbow leave rows out"
    assert store.scan("d", filters=conditions).read_all().num_rows == 1


@pytest.mark.parametrize("given", ["utf8"], indirect=True)
def test_mistakes_are_named_as_on_other_stores(double, store, given):
    query = rows.vectors(7, 1)[0]
    with pytest.raises(UnknownDatasetError):
        store.search("nope", query, k=1)
    with pytest.raises(UnknownDatasetError):
        store.scan("nope", filters=filtered(given, "lang = de")[0])
    with pytest.raises(UnknownColumnError, match="year"):
        store.search("d", query, k=1, columns=["nope"])
    with pytest.raises(ColumnTypeError, match="year"):
        store.search("d", query, k=1, filters=[Comparison("year", "=", "abc")])
    double.types["empty"] = {}
    with pytest.raises(UnknownDatasetError):
        store.search("empty", query, k=1)


def test_a_filter_is_not_inherited_by_the_next_read(store, given):
    conditions, _ = filtered(given, "lang = de")
    store.scan("d", filters=conditions).read_all()
    assert store.scan("d").read_all().num_rows == NUM_ROWS
