"""Indexes of LanceDB tables: recall, scores, new rows, and tables that have none."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest

from fletcher.errors import (
    DimensionMismatchError,
    InvalidCommandError,
    StoreUnavailableError,
    UnknownDatasetError,
)
from fletcher.stores.exact_search import APPROXIMATE
from fletcher.stores.filter_parser import parse_filter
from fletcher.stores.lance import indexing
from fletcher.stores.lance.indexes import find_index
from fletcher.stores.lance.indexing import build_indexes, optimize_table
from fletcher.stores.lance.store import LanceStore
from tests.doubles import store_rows as rows

NUM_ROWS = 600


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LanceStore]:
    with closing(LanceStore(tmp_path)) as opened:
        yield opened


def fill(store: LanceStore, count: int = NUM_ROWS, first: int = 0, dtype: str = "float32") -> None:
    writer = store.open_writer("d", rows.schema(32, dtype), "append")
    if count:
        writer.append([rows.batch(first, count, dims=32, dtype=dtype)])
    writer.close()


def score(store: LanceStore, row: int, k: int = 10, filter_: str = "") -> tuple[list[float], bool]:
    """Scores of a search for a stored row, and whether it was approximate."""
    schema = store.read_schema("d")
    assert schema is not None
    found = store.search(
        "d",
        rows.vectors(row, 1, 32)[0],
        k=k,
        columns=["id"],
        filters=[parse_filter(filter_, schema)] if filter_ else [],
    )
    return found["score"].to_pylist(), APPROXIMATE in (found.schema.metadata or {})


def exact_scores(row: int, count: int = NUM_ROWS) -> np.ndarray:
    return np.sort(rows.vectors(0, count, 32) @ rows.vectors(row, 1, 32)[0])[::-1]


@pytest.mark.parametrize("kind", ["ivf_pq", "ivf_rq", "ivf_sq", "ivf_hnsw_sq"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_searches_with_an_index_have_exact_scores_and_high_recall(
    store: LanceStore, kind: str, dtype: str
) -> None:
    fill(store, dtype=dtype)
    report = build_indexes(store, "d", kind)
    assert report.index is not None
    assert report.measured is not None
    assert (report.id_index, report.index.kind.lower()) == (True, kind)
    assert report.measured.recall >= 0.99
    for row in (0, 77, NUM_ROWS - 1):
        found, approximate = score(store, row)
        assert approximate
        # One in some hundred rows may be missing, but scores are those of an exact search.
        exact = exact_scores(row)
        assert np.isclose(found[0], 1, atol=1e-3)
        assert all(np.isclose(exact, one, atol=1e-3).any() for one in found)
    info = store.dataset("d")
    assert info is not None
    assert (info.index, info.num_indexed) == (report.index.kind, NUM_ROWS)


def test_searches_use_the_measured_settings(store: LanceStore) -> None:
    fill(store)
    report = build_indexes(store, "d", "ivf_rq")
    table = lancedb.connect(store.folder).open_table("d")
    found = find_index(table, store.dataset_folder("d"))
    assert found == report.index
    assert found is not None
    assert found.nprobes is not None
    # Settings of another index, or damaged ones, do not count.
    settings = store.dataset_folder("d") / "_fletcher_index.json"
    for text in (settings.read_text().replace(found.name, "other"), "{", ""):
        settings.write_text(text)
        again = find_index(table, store.dataset_folder("d"))
        assert again is not None
        assert again.nprobes is None
        assert len(score(store, 3)[0]) == 10


def test_all_rows_are_found_if_k_or_a_filter_asks_for_them(store: LanceStore) -> None:
    fill(store)
    build_indexes(store, "d", "ivf_rq")
    assert len(score(store, 3, k=10_000)[0]) == NUM_ROWS
    few = score(store, 3, k=10, filter_="id in (id1, id599, nothing)")[0]
    ids = store.scan("d", columns=["id"]).read_all()["id"].to_pylist()
    expected = len({"id1", "id599"} & set(ids))
    assert len(few) == expected


def test_rows_after_the_index_are_found_and_folded_in(store: LanceStore) -> None:
    fill(store)
    build_indexes(store, "d", "ivf_rq")
    fill(store, 50, first=NUM_ROWS)
    new = NUM_ROWS + 7
    assert np.isclose(score(store, new)[0][0], 1, atol=1e-3)
    before, after = optimize_table(store, "d", dt.timedelta(minutes=10))
    assert (before.num_unindexed, after.num_unindexed) == (50, 0)
    assert before.num_rows == after.num_rows == NUM_ROWS + 50
    assert np.allclose(score(store, new)[0], exact_scores(new, NUM_ROWS + 50)[:10], atol=1e-3)


def test_old_versions_are_kept_for_the_stated_time(store: LanceStore) -> None:
    for first in range(3):
        fill(store, 5, first=first * 5)
    _, kept = optimize_table(store, "d", dt.timedelta(minutes=10))
    assert kept.num_versions >= 3
    _, gone = optimize_table(store, "d", dt.timedelta(milliseconds=1))
    assert gone.num_versions < kept.num_versions
    assert gone.num_rows == 15


def test_a_small_dataset_gets_no_index_unless_told(store: LanceStore) -> None:
    fill(store, 20)
    report = build_indexes(store, "d")
    assert (report.index, report.measured, report.id_index) == (None, None, True)
    assert score(store, 3) == (score(store, 3)[0], False)


def test_auto_takes_another_index_if_the_recall_of_the_first_is_low(
    store: LanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 60,000 random vectors of 384 dimensions: IVF_RQ reached 0.95 with all partitions.
    measure = indexing._measure

    def low(table: Any, index: Any, similarity: Any) -> Any:
        settings, measured = measure(table, index, similarity)
        recall = 0.95 if index.kind == "IVF_RQ" else measured.recall
        return settings, replace(measured, recall=recall)

    fill(store)
    monkeypatch.setattr(indexing, "MIN_ROWS", NUM_ROWS)
    assert indexing.build_indexes(store, "d").index.kind == "IVF_RQ"  # type: ignore[union-attr]
    monkeypatch.setattr(indexing, "_measure", low)
    report = build_indexes(store, "d")
    assert report.index is not None
    assert report.measured is not None
    assert report.index.kind == "IVF_SQ"
    assert report.measured.recall >= 0.99
    table = lancedb.connect(store.folder).open_table("d")
    assert find_index(table, store.dataset_folder("d")) == report.index
    assert [one.name for one in table.list_indices() if "vector" in one.columns] == [
        report.index.name
    ]


def test_an_empty_dataset_is_left_alone(store: LanceStore) -> None:
    fill(store, 0)
    report = build_indexes(store, "d")
    assert (report.num_rows, report.index, report.id_index) == (0, None, False)
    before, after = optimize_table(store, "d", dt.timedelta(minutes=10))
    assert before.num_rows == after.num_rows == 0


def test_an_index_is_replaced_and_removed(store: LanceStore) -> None:
    fill(store)
    first = build_indexes(store, "d", "ivf_rq").index
    second = build_indexes(store, "d", "ivf_hnsw_sq").index
    assert first is not None
    assert second is not None
    table = lancedb.connect(store.folder).open_table("d")
    names = [one.name for one in table.list_indices() if "vector" in one.columns]
    assert names == [second.name]
    assert build_indexes(store, "d", "none").index is None
    assert score(store, 3)[1] is False


@pytest.mark.parametrize("output", ["sparse", "multi"])
def test_vectors_without_an_index_are_refused_by_name(store: LanceStore, output: str) -> None:
    batch = rows.list_batch(0, 10, output, "float32")
    writer = store.open_writer("d", batch.schema, "append")
    writer.append([batch])
    writer.close()
    with pytest.raises(InvalidCommandError, match=f"{output} vectors"):
        build_indexes(store, "d")
    assert build_indexes(store, "d", "none").id_index
    optimize_table(store, "d", dt.timedelta(minutes=10))


@pytest.mark.parametrize("dtype", ["int8", "ubinary"])
def test_quantized_vectors_are_refused_by_name(store: LanceStore, dtype: str) -> None:
    fill(store, 20, dtype=dtype)
    with pytest.raises(InvalidCommandError, match=dtype):
        build_indexes(store, "d", "ivf_pq")


@pytest.mark.parametrize("kind", ["ivf_pq", "ivf_rq", "ivf_sq", "ivf_hnsw_sq"])
def test_an_index_of_few_rows_finds_them_all(store: LanceStore, kind: str) -> None:
    fill(store, 10)
    build_indexes(store, "d", kind)
    assert len(score(store, 3, k=11)[0]) == 10


def test_a_dataset_that_is_written_or_missing_is_refused(store: LanceStore) -> None:
    fill(store)
    writer = store.open_writer("d", rows.schema(32, "float32"), "append")
    for action in (build_indexes, lambda *words: optimize_table(*words, dt.timedelta(minutes=1))):
        with pytest.raises(StoreUnavailableError, match="being written"):
            action(store, "d")
        with pytest.raises(UnknownDatasetError):
            action(store, "missing")
    writer.append([rows.batch(NUM_ROWS, 1, dims=32, dtype="float32")])  # the writer is unharmed
    assert sorted(path.name for path in store.folder.iterdir()) == [".d.lock", "d.lance"]


def test_a_lost_index_costs_time_but_no_rows(store: LanceStore) -> None:
    # The index's files are not in the list of files that a version is checked for.
    fill(store)
    build_indexes(store, "d", "ivf_rq")
    shutil.rmtree(store.dataset_folder("d") / "_indices")
    with closing(LanceStore(store.folder)) as again:
        found, approximate = score(again, 3)
    assert np.allclose(found, exact_scores(3)[:10], atol=1e-5)
    assert not approximate


def test_wrong_queries_are_refused_with_an_index_too(store: LanceStore) -> None:
    fill(store)
    build_indexes(store, "d", "ivf_rq")
    with pytest.raises(DimensionMismatchError):
        store.search("d", np.ones(8, np.float32), k=3)
    with pytest.raises(InvalidCommandError, match="NaN"):
        store.search("d", np.full(32, np.nan, np.float32), k=3)
