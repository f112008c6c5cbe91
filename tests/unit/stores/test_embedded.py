"""The embedded stores, LanceDB and Parquet, against the `Store` protocol."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lancedb.index import IvfPq

from fletcher.client import dequantize
from fletcher.core.quantization import Ranges
from fletcher.errors import (
    ColumnTypeError,
    ConfigError,
    DimensionMismatchError,
    InvalidCommandError,
    ModelMismatchError,
    RequestError,
    StoreError,
    StoreUnavailableError,
    UnknownColumnError,
    UnknownDatasetError,
)
from fletcher.stores.address import open_store
from fletcher.stores.base import Combination, Comparison, Store
from fletcher.stores.lance.writer import LanceWriter
from fletcher.stores.staging import is_replaced_by, staged_name
from fletcher.util.locks import FileLock
from tests.doubles import store_rows as rows
from tests.doubles.list_search import check_list_search


@pytest.fixture(params=["lance", "parquet"])
def store(request: pytest.FixtureRequest, tmp_path: Path):
    opened = open_store(f"{request.param}:{tmp_path / 'store'}")
    yield opened
    opened.close()


def fill(store: Store, *batches: pa.RecordBatch, mode="append") -> None:
    writer = store.open_writer("d", batches[0].schema, mode)
    writer.append(batches)
    writer.close()


def test_an_opening_that_fails_at_its_end_frees_the_dataset(store, monkeypatch):
    # Its writer was never handed over, and held the dataset's lock until the process ended.
    path = {
        "lance": "fletcher.stores.lance.store.lance_errors",
        "parquet": "fletcher.stores.parquet._disk_errors",
    }[store.scheme]

    @contextlib.contextmanager
    def failing(_dataset):
        yield
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(path, failing)
        with pytest.raises(MemoryError):
            store.open_writer("d", rows.schema(), "append")
    fill(store, rows.batch(0, 10))
    assert store.dataset("d").num_rows == 10


def test_a_lock_that_is_not_released_at_once_frees_the_dataset(store, monkeypatch):
    errors, release = [MemoryError()], FileLock.release

    def failing(lock):
        if errors:
            raise errors.pop()
        release(lock)

    writer = store.open_writer("d", rows.schema(), "append")
    monkeypatch.setattr(FileLock, "release", failing)
    writer.close()
    assert not errors
    fill(store, rows.batch(0, 10))
    assert store.dataset("d").num_rows == 10


def test_rows_come_back_as_they_were_sent(store):
    sent = [rows.batch(0, 100), rows.batch(100, 50, null_rows=(3,))]
    fill(store, *sent)
    assert store.scan("d").read_all().combine_chunks() == pa.Table.from_batches(sent)
    info = store.dataset("d")
    assert info.num_rows == 150
    assert info.num_bytes > 0
    assert info.schema.metadata.items() >= rows.schema().metadata.items()
    assert [one.name for one in store.datasets()] == ["d"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_search_answers_cosines_best_first(store, dtype):
    fill(store, rows.batch(0, 200, dtype=dtype, null_rows=(7,)))
    vectors = rows.vectors(0, 200)
    found = store.search("d", vectors[42] * 3, k=5, columns=["id"])
    cosines = vectors @ vectors[42]
    cosines[7] = -np.inf
    best = np.argsort(-cosines)[:5]
    assert found.column_names == ["id", "score"]
    assert found.column("id").to_pylist() == [f"id{row}" for row in best]
    assert found.schema.field("score").type == pa.float32()
    np.testing.assert_allclose(found.column("score").to_numpy(), cosines[best], atol=2e-3)


@pytest.mark.parametrize("dtype", ["int8", "ubinary"])
def test_quantized_rows_are_searched_with_the_query_in_float32(store, dtype):
    sent = rows.batch(0, 300, dims=64, dtype=dtype, null_rows=(7,))
    fill(store, sent)
    assert store.scan("d").read_all().combine_chunks() == pa.Table.from_batches([sent])
    vectors = rows.vectors(0, 300, 64)
    kept = dequantize(sent)
    cosines = kept @ vectors[42] / np.linalg.norm(kept, axis=1)
    cosines[7] = -np.inf
    best = np.argsort(-cosines)[:5]
    found = store.search("d", vectors[42] * 3, k=5, columns=["id"])
    assert found.column_names == ["id", "score"]
    assert found.column("id").to_pylist() == [f"id{row}" for row in best]
    np.testing.assert_allclose(found.column("score").to_numpy(), cosines[best], atol=1e-5)
    only = [Comparison("id", "=", "id3")]
    assert store.search("d", vectors[42], k=5, filters=only).column("id").to_pylist() == ["id3"]
    assert store.search("d", vectors[0], k=1000, columns=["id"]).num_rows == 299
    alone = store.search("d", vectors[42], k=2, columns=[])  # failed for want of a column
    assert (alone.column_names, alone.num_rows) == (["score"], 2)
    with pytest.raises(DimensionMismatchError, match=r"8 dimensions.*has 64"):
        store.search("d", np.ones(8, np.float32), k=5)


def test_vectors_that_are_read_in_another_way_are_refused(store):
    by_row = rows.batch(0, 3, dtype="int8")
    fill(store, by_row)
    ranges = Ranges.between(np.full(8, -1, np.float32), np.ones(8, np.float32))
    said = {name.encode(): text.encode() for name, text in ranges.metadata().items()}
    by_range = by_row.drop_columns("scale").replace_schema_metadata(
        {**by_row.schema.metadata, **said}
    )
    with pytest.raises(ModelMismatchError, match=r"`fletcher\.quantization` is ranges@.* with row"):
        store.open_writer("d", by_range.schema, "append")
    for dtype in ("float16", "ubinary"):
        with pytest.raises(ColumnTypeError, match=r"`vector` is .* dataset `d` has .*int8"):
            store.open_writer("d", rows.schema(dtype=dtype), "append")
    store.open_writer("d", rows.schema(dtype="int8"), "append").close()


@pytest.mark.parametrize(
    ("output", "dtype"),
    [("sparse", "float32"), ("sparse", "float16"), ("multi", "float16"), ("multi", "int8")],
)
def test_sparse_and_token_vectors_come_back_as_they_were_sent(store, output, dtype):
    batches = [rows.list_batch(first, 30, output, dtype) for first in (0, 30, 60)]
    fill(store, *batches[:2])
    fill(store, batches[2])  # what the store has, it reads back as another type by name
    sent = pa.Table.from_batches(batches).sort_by("id")
    found = store.scan("d").read_all().sort_by("id")
    assert found.schema.metadata[b"fletcher.output"].decode() == output
    for name in {*sent.schema.names} - {"timestamp"}:
        assert found[name].to_pylist() == sent[name].to_pylist(), name
    assert found["vector"].null_count == 12
    assert store.stored_ranges("d", "u") == [(0, 89)]
    check_list_search(store, "d", sent, output)
    for other, kind in (("sparse", "float32"), ("multi", "float32")):
        if (other, kind) != (output, dtype):
            with pytest.raises(ColumnTypeError, match="schema mismatch: `vector` is list"):
                fill(store, rows.list_batch(90, 1, other, kind))
    with pytest.raises(ColumnTypeError, match="schema mismatch: `vector` is fixed_size_list"):
        fill(store, rows.batch(90, 1).replace_schema_metadata(None))


@pytest.mark.parametrize("output", ["sparse", "multi"])
def test_rows_of_several_vectors_are_replaced_and_compacted(tmp_path, output):
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.list_batch(0, 1, output, "float16").schema, "append")
    for first in range(0, 350, 5):
        writer.append([rows.list_batch(first, 5, output, "float16")])
    writer.close()
    again = rows.list_batch(0, 50, output, "float16")
    fill(store, again, mode="upsert")
    found = store.scan("d").read_all()
    assert found.num_rows == 350
    assert store._open_table("d").stats()["fragment_stats"]["num_fragments"] < 40
    vectors = dict(zip(found["id"].to_pylist(), found["vector"].to_pylist(), strict=True))
    for name, vector in zip(again["id"].to_pylist(), again["vector"].to_pylist(), strict=True):
        assert vectors[name] == vector


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_scores_are_of_the_similarity_in_the_metadata(store, metric, dtype):
    plain = rows.batch(0, 30, dims=16, dtype=dtype)
    metadata = {**plain.schema.metadata, b"fletcher.similarity": metric.encode()}
    fill(store, plain.replace_schema_metadata(metadata))
    vectors, query = rows.vectors(0, 30, 16), 3 * rows.vectors(99, 1, 16)[0]
    scores = {
        "cosine": vectors @ query / 3,
        "dot": vectors @ query,
        "euclidean": -np.linalg.norm(vectors - query, axis=1),
        "manhattan": -np.abs(vectors - query).sum(axis=1),
    }[metric]
    best = np.argsort(-scores)[:4]
    found = store.search("d", query, k=4, columns=["id"])
    within = 1e-5 if dtype == "float32" else 0.1
    assert found["score"].to_pylist() == pytest.approx(scores[best], abs=within)
    assert found["id"].to_pylist()[0] == f"id{best[0]}"
    assert b"fletcher.approximate" not in found.schema.metadata


@pytest.mark.parametrize(("metric", "dtype"), [("cosine", "float16"), ("dot", "float32")])
def test_scores_are_exact_with_an_index_too(tmp_path, metric, dtype):
    store = open_store(f"lance:{tmp_path}")
    plain = rows.batch(0, 600, dims=32, dtype=dtype)
    metadata = {**plain.schema.metadata, b"fletcher.similarity": metric.encode()}
    fill(store, plain.replace_schema_metadata(metadata))
    query = rows.vectors(5, 1, 32)[0] + np.float32(0.1)
    exact = store.search("d", query, k=3, columns=["id"])
    config = IvfPq(distance_type=metric, num_partitions=2, num_sub_vectors=2)
    store._open_table("d").create_index("vector", config=config)
    found = store.search("d", query, k=3, columns=["id"])
    assert found.schema.metadata[b"fletcher.approximate"] == b"true"
    assert found["id"][0] == exact["id"][0]
    vectors = rows.vectors(0, 600, 32).astype(dtype).astype(np.float32)
    numbers = [int(name[2:]) for name in found["id"].to_pylist()]
    scores = vectors[numbers] @ query
    if metric == "cosine":
        scores /= np.linalg.norm(vectors[numbers], axis=1) * np.linalg.norm(query)
    assert found["score"].to_pylist() == pytest.approx(scores, abs=1e-6)


def test_rows_without_a_vector_are_kept_and_never_found(store):
    fill(store, rows.batch(0, 4, null_rows=(0, 1)))
    found = store.search("d", rows.vectors(0, 1)[0], k=10, columns=["id"])
    assert sorted(found.column("id").to_pylist()) == ["id2", "id3"]
    assert store.scan("d", columns=["vector"]).read_all().column("vector").null_count == 2


def test_an_empty_dataset_can_be_read_and_searched(store):
    store.open_writer("d", rows.schema(), "append").close()
    assert store.dataset("d").num_rows == 0
    assert store.scan("d").read_all().num_rows == 0
    found = store.search("d", rows.vectors(0, 1)[0], k=3, columns=["id"])
    assert found.num_rows == 0
    assert found.column_names == ["id", "score"]


def test_filters_limit_and_columns(store):
    fill(store, rows.batch(0, 10), rows.batch(10, 10, ids=["o'brien", 'q"uote'] + ["x"] * 8))

    def ids(*filters, **more):
        return store.scan("d", columns=["id"], filters=filters, **more).read_all()["id"].to_pylist()

    assert ids(Comparison("id", "=", "o'brien")) == ["o'brien"]
    assert ids(Comparison("id", "=", "' OR 1=1 --")) == []
    either = Combination("or", (Comparison("id", "=", "id1"), Comparison("id", "=", "id2")))
    assert ids(either) == ["id1", "id2"]
    assert ids(Comparison("id", "=", "x"), limit=3) == ["x"] * 3
    assert ids(Comparison("token_count", ">", 3)) == []
    assert ids(Comparison("token_count", "<=", 3), limit=1) == ["id0"]
    assert len(ids(Comparison("timestamp", "<", "2023-11-14T22:13:20.000000+00:00"))) == 0
    assert len(ids(Comparison("timestamp", ">=", "2023-11-14T22:13:20.000000+00:00"))) == 20
    nested = Combination("or", (Comparison("id", "=", "id3"), Comparison("id", "=", "id4")))
    assert ids(Comparison("token_count", "=", 3), nested) == ["id3", "id4"]
    assert len(ids(Comparison("id", "!=", None))) == 20
    best = store.search("d", rows.vectors(5, 1)[0], k=1, filters=[Comparison("id", "!=", "id5")])
    assert best["id"].to_pylist() != ["id5"]
    with pytest.raises(UnknownColumnError, match="no column `nope`; it has id, vector"):
        ids(Comparison("nope", "=", 1))
    with pytest.raises(UnknownColumnError):
        store.scan("d", columns=["nope"])
    with pytest.raises(ColumnTypeError, match="`token_count`"):
        ids(Comparison("token_count", "=", "3' OR '1'='1"))
    with pytest.raises(ColumnTypeError):
        ids(Comparison("vector", "=", 3))


def test_nonsense_queries_are_refused(store):
    fill(store, rows.batch(0, 10))
    query = rows.vectors(0, 1)[0]
    with pytest.raises(UnknownDatasetError, match="no dataset `other`"):
        store.search("other", query, k=1)
    with pytest.raises(UnknownDatasetError):
        store.scan("other")
    with pytest.raises(UnknownDatasetError):
        store.delete_dataset("other")
    with pytest.raises(DimensionMismatchError, match="7 dimensions, dataset `d` has 8"):
        store.search("d", query[:7], k=1)
    with pytest.raises(InvalidCommandError, match="`k` is 0"):
        store.search("d", query, k=0)
    with pytest.raises(InvalidCommandError, match="NaN"):
        store.search("d", query * np.nan, k=1)
    with pytest.raises(InvalidCommandError, match="zero"):
        store.search("d", query * 0, k=1)
    with pytest.raises(InvalidCommandError, match="`dataset`"):
        store.scan("../d")
    assert store.dataset("other") is None


@pytest.mark.parametrize(
    ("offered", "error"),
    [
        (rows.schema(model="other@1"), ModelMismatchError),
        (rows.schema(dims=9), DimensionMismatchError),
        (rows.schema(dtype="float32"), ColumnTypeError),
        (rows.schema(id_type=pa.int64()), ColumnTypeError),
    ],
)
def test_the_first_write_fixes_model_width_and_types(store, offered, error):
    fill(store, rows.batch(0, 10))
    with pytest.raises(error, match="dataset `d`"):
        store.open_writer("d", offered, "append")
    fill(store, rows.batch(10, 10))  # the refusal holds no lock
    assert store.dataset("d").num_rows == 20


@pytest.mark.parametrize(
    "kind",
    [
        pa.run_end_encoded(pa.int32(), pa.utf8()),
        pa.sparse_union([pa.field("a", pa.int8())]),
        pa.month_day_nano_interval(),
        pa.decimal32(5, 2),
        pa.list_view(pa.int8()),
        pa.list_(pa.dictionary(pa.int8(), pa.utf8())),
        pa.list_(pa.utf8(), 2),
        pa.list_(pa.float32(), 0),
        pa.struct([("a", pa.null())]),
        pa.struct([("a", pa.int8()), ("a", pa.int8())]),
        pa.map_(pa.utf8(), pa.int8(), keys_sorted=True),
        pa.json_(),
    ],
    ids=str,
)
def test_types_that_cannot_be_written_are_refused_before_there_are_rows(store, kind):
    # LanceDB fails on most of them, on some with the first rows: those were tried for ever, and
    # the store, away for all its datasets as it seemed, refused everybody.
    offered = rows.schema().append(pa.field("extra", kind))
    with pytest.raises(ColumnTypeError, match="`extra` is"):
        store.open_writer("d", offered, "append")
    assert store.dataset("d") is None
    fill(store, rows.batch(0, 10))  # the refusal holds no lock


@pytest.mark.parametrize("name", ["", "*", "a.b", "a`b", "a\0b"])
def test_names_that_lance_cannot_find_again_are_refused(tmp_path, name):
    store = open_store(f"lance:{tmp_path}")
    with pytest.raises(InvalidCommandError, match="rename it"):
        store.open_writer("d", rows.schema().append(pa.field(name, pa.int8())), "append")
    assert store.dataset("d") is None
    writer = store.open_writer("d", rows.schema(), "append")
    with pytest.raises(InvalidCommandError, match="rename it"):  # as `fletcher store` adds them
        writer.add_columns([pa.field(name, pa.int8())])
    writer.append([rows.batch(0, 2)])
    writer.close()


@pytest.mark.parametrize("mode", ["append", "upsert"])
def test_slices_of_structs_within_structs_are_stored(tmp_path, mode):
    # LanceDB panics on them: a sliced batch could not be stored.
    inner = [None, {"a": None}, {"a": {"b": 1}}, {"a": {"b": None}}]
    nested = pa.array(inner, pa.struct([("a", pa.struct([("b", pa.int8())]))]))
    store = open_store(f"lance:{tmp_path}")
    batch = rows.batch(0, 4).append_column("extra", nested)
    fill(store, batch.slice(1), mode=mode)
    found = store.scan("d", columns=["extra"]).read_all().column("extra").to_pylist()
    assert sorted(found, key=str) == sorted(inner[1:], key=str)


STAGED = staged_name("d", "new")


def stage(store: Store, *batches: pa.RecordBatch) -> None:
    writer = store.open_writer(STAGED, batches[0].schema, "append")
    for batch in batches:
        writer.append([batch])
    writer.close()


def test_a_staged_dataset_replaces_the_dataset_and_takes_another_model(store):
    fill(store, rows.batch(0, 10), rows.batch(10, 5))
    old = store.incarnation("d")
    reader = store.scan("d", columns=["id"])
    stage(
        store,
        rows.batch(0, 3, dims=9, model="other@1", null_rows=(1,)),
        *(rows.batch(first, 2, dims=9, model="other@1") for first in (3, 5)),
    )
    assert [one.name for one in store.datasets()] == ["d"]
    assert [(one.name, one.num_rows) for one in store.staged_datasets()] == [(STAGED, 7)]
    assert store.dataset("d").num_rows == 15
    store.replace_dataset("d", STAGED)
    assert [path.name for path in store.folder.glob(".*.lock")] == [".d.lock"]
    assert store.dataset("d").num_rows == 7
    assert store.dataset("d").schema.field("vector").type.list_size == 9
    found = store.scan("d").read_all().sort_by("id").column("id").to_pylist()
    assert found == [f"id{row}" for row in range(7)]
    assert store.scan("d").read_all().sort_by("id").column("vector").is_null()[1].as_py()
    assert old != store.incarnation("d")
    assert is_replaced_by(store.incarnation("d"), "new")
    assert store.staged_datasets() == []
    with pytest.raises(UnknownDatasetError):
        store.replace_dataset("d", STAGED)
    fill(store, rows.batch(20, 3, dims=9, model="other@1"))
    assert store.dataset("d").num_rows == 10
    if store.address.startswith("lance"):  # a reader goes on with the old version
        assert len(reader.read_all()) == 15


def test_a_staged_dataset_becomes_one_that_was_dropped(store):
    for first in (0, 10):
        stage(store, rows.batch(first, 3))
        store.replace_dataset("d", STAGED)
        found = store.scan("d").read_all().column("id").to_pylist()
        assert found == [f"id{row}" for row in range(first, first + 3)]
        fill(store, rows.batch(first + 5, 1))
        assert store.dataset("d").num_rows == 4
        store.delete_dataset("d")


def test_a_dataset_with_a_writer_is_not_replaced(store):
    fill(store, rows.batch(0, 10))
    stage(store, rows.batch(0, 3))
    for name in ("d", STAGED):
        writer = store.open_writer(name, rows.schema(), "append")
        with pytest.raises(StoreUnavailableError):
            store.replace_dataset("d", STAGED)
        writer.close()
    assert store.dataset("d").num_rows == 10
    store.replace_dataset("d", STAGED)
    assert store.dataset("d").num_rows == 3


def test_lock_files_of_datasets_that_are_gone_go_too(store):
    # Each kill during an overwrite, and each deletion of an unknown dataset, left one for good.
    fill(store, rows.batch(0, 10))
    for upload in ("killed", "waits"):
        writer = store.open_writer(staged_name("d", upload), rows.schema(), "append")
        writer.append([rows.batch(0, 1)])
        writer.close()
    shutil.rmtree(store.dataset_folder(staged_name("d", "killed")))
    for unknown in ("e", staged_name("d", "unknown")):
        with pytest.raises(UnknownDatasetError):
            store.delete_dataset(unknown)
    with pytest.raises(UnknownDatasetError):
        store.replace_dataset("d", staged_name("d", "unknown"))
    stage(store, rows.batch(0, 3))
    with FileLock(store.folder / f".{staged_name('d', 'made')}.lock"):  # another one is being made
        store.replace_dataset("d", STAGED)
    left = sorted(path.name for path in store.folder.glob(".*.lock"))
    waiting = [staged_name("d", "waits"), staged_name("d", "made")]
    assert left == sorted([".d.lock", *(f".{name}.lock" for name in waiting)])


@pytest.mark.parametrize("at", range(6))
def test_a_replacement_that_was_cut_off_is_finished(tmp_path, monkeypatch, at):
    """A Parquet dataset is whole, old or new, after each step."""
    store = open_store(f"parquet:{tmp_path}")
    fill(store, rows.batch(0, 10))
    stage(store, rows.batch(0, 3))
    calls = itertools.count()

    def cut_off(self, *args, real, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink"):
            patch.setattr(Path, name, functools.partialmethod(cut_off, real=getattr(Path, name)))
        with contextlib.suppress(KeyboardInterrupt):
            store.replace_dataset("d", STAGED)
    again = open_store(f"parquet:{tmp_path}")
    assert [info.name for info in again.datasets()] == ["d"]
    assert again.dataset("d").num_rows in (3, 10)
    if again.staged_datasets():
        again.replace_dataset("d", STAGED)
    writer = again.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(20, 2)])
    writer.close()
    found = again.scan("d").read_all().column("id").to_pylist()
    assert sorted(found) == ["id0", "id1", "id2", "id20", "id21"]
    left = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert left == {"d"}


def test_a_parquet_store_adds_columns(tmp_path):
    """The rows were stored without the column, and nothing said so."""
    store = open_store(f"parquet:{tmp_path}")
    fill(store, rows.batch(0, 3))
    extra = rows.batch(3, 2)
    extra = extra.append_column("url", pa.array(["a", None]))
    fill(store, extra)
    fill(store, rows.batch(5, 1))
    found = store.scan("d").read_all()
    assert found.column("url").to_pylist() == [None, None, None, "a", None, None]
    assert store.dataset("d").num_rows == 6
    # Other programs take the columns from the first file: they left out the column.
    assert pq.read_table(tmp_path / "d")["url"].to_pylist() == found.column("url").to_pylist()
    other = rows.batch(6, 1).append_column("url", pa.array([1]))
    with pytest.raises(ColumnTypeError, match="`url` is int64"):
        fill(store, other)


@pytest.mark.parametrize(
    "kind",
    [pa.timestamp("s"), pa.timestamp("s", "UTC"), pa.time32("s"), pa.timestamp("ns"), pa.float32()],
)
def test_types_that_parquet_gives_back_in_another_form_are_taken_again(tmp_path, kind):
    store = open_store(f"parquet:{tmp_path}")
    number = pa.int64() if kind.bit_width == 64 else pa.int32()
    column = pa.array([1000, 2000, None], number).cast(kind)
    for first in (0, 3, 6):
        fill(store, rows.batch(first, 3).append_column("when", column))
    found = store.scan("d", columns=["when"]).read_all().column("when")
    assert found.cast(kind).to_pylist() == column.to_pylist() * 3


def test_keys_and_ranges_tell_what_is_stored(store):
    writer = store.open_writer("d", rows.schema(), "append")
    assert writer.missing_keys(["u:0-9"]) == ["u:0-9"]
    writer.append([rows.batch(0, 10), rows.batch(10, 5)])
    writer.append([rows.batch(20, 5), rows.batch(0, 10, upload="u_")])
    assert writer.missing_keys(["u:20-24", "u'x:0-1", "u:15-19", "u:0-9"]) == ["u'x:0-1", "u:15-19"]
    writer.close()
    writer.close()
    assert store.stored_ranges("d", "u") == [(0, 14), (20, 24)]
    assert store.stored_ranges("d", "u_") == [(0, 9)]
    assert store.stored_ranges("d", "v") == []
    assert store.stored_ranges("other", "u") == []


def test_delete_dataset(store):
    fill(store, rows.batch(0, 10))
    store.delete_dataset("d")
    assert store.dataset("d") is None
    assert store.datasets() == []
    fill(store, rows.batch(0, 5, dims=16))
    assert store.dataset("d").num_rows == 5


OTHER_PROCESS = """
import sys
import pyarrow as pa
from fletcher.errors import StoreUnavailableError
from fletcher.stores.address import open_store
schema = pa.schema([("id", pa.utf8()), ("batch_key", pa.utf8())])
try:
    open_store(sys.argv[1]).open_writer("d", schema, "append")
    print("opened")
except StoreUnavailableError as error:
    print(error)
"""


def test_a_second_writer_is_refused_in_this_process_and_in_another(store):
    writer = store.open_writer("d", rows.schema(), "append")
    with pytest.raises(StoreUnavailableError, match="being written"):
        store.open_writer("d", rows.schema(), "append")
    with pytest.raises(StoreUnavailableError, match="being written"):
        store.delete_dataset("d")
    command = [sys.executable, "-c", OTHER_PROCESS, store.address]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "being written" in answer.stdout
    writer.close()
    store.open_writer("d", rows.schema(), "append").close()


@pytest.mark.parametrize("file", ["_common_metadata", "u~0-9.parquet", "u:0-9.parquet"])
def test_a_damaged_parquet_dataset_is_left_out_and_breaks_no_list(tmp_path, file):
    store = open_store(f"parquet:{tmp_path}")
    fill(store, rows.batch(0, 10))
    shutil.copytree(tmp_path / "d", tmp_path / "bad")
    (tmp_path / "bad" / file).write_bytes(b"PAR1 and no more")
    with pytest.raises(StoreUnavailableError, match="`bad` cannot be read") as caught:
        store.dataset("bad")
    assert caught.value.field == "dataset"
    assert str(tmp_path) not in caught.value.message
    assert [info.name for info in store.datasets()] == ["d"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOTDIR])
def test_only_a_full_or_read_only_disk_concerns_the_whole_store(store, code, monkeypatch):
    writer = store.open_writer("d", rows.schema(), "append")
    fault = OSError(code, os.strerror(code))
    monkeypatch.setattr("pyarrow.parquet.write_table", Mock(side_effect=fault))
    monkeypatch.setattr(type(writer), "_add", Mock(side_effect=fault), raising=False)
    with pytest.raises(StoreUnavailableError) as caught:
        writer.append([rows.batch(0, 10)])
    assert caught.value.field == ("store" if code in (errno.ENOSPC, errno.EROFS) else "dataset")
    writer.close()


def test_columns_may_be_added_and_left_out_in_lance(tmp_path):
    store = open_store(f"lance:{tmp_path}")
    fill(store, rows.batch(0, 3))
    wider = rows.batch(3, 2).append_column("lang", pa.array(["de", "en"]))
    fill(store, wider)
    fill(store, rows.batch(5, 1).drop_columns(["text"]))
    table = store.scan("d").read_all()
    assert table["lang"].to_pylist() == [None] * 3 + ["de", "en", None]
    assert table["text"].to_pylist()[-1] is None


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "ubinary"])
def test_upsert_takes_null_vectors(tmp_path, dtype):
    store = open_store(f"lance:{tmp_path}")
    fill(store, rows.batch(0, 4, dtype=dtype), mode="upsert")
    again = rows.batch(3, 4, dtype=dtype, null_rows=(0, 2))
    fill(store, again, mode="upsert")
    table = store.scan("d", columns=["id", "vector"]).read_all().sort_by("id")
    nulls = [vector is None for vector in table["vector"].to_pylist()]
    assert table["id"].to_pylist() == [f"id{row}" for row in range(7)]
    assert nulls == [False] * 3 + [True, False, True, False]


def test_upsert_replaces_by_id_and_the_last_row_wins(tmp_path):
    store = open_store(f"lance:{tmp_path}")
    fill(store, rows.batch(0, 4), mode="upsert")
    again = rows.batch(10, 3, ids=["id1", "new", "id1"], text="late")
    fill(store, again, mode="upsert")
    table = store.scan("d", columns=["id", "text"]).read_all()
    found = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert table.num_rows == 5
    assert found == {
        "id0": "text 0", "id1": "late 12", "id2": "text 2", "id3": "text 3", "new": "late 11",
    }  # fmt: skip


@pytest.mark.parametrize("anew", [True, False])
def test_a_writer_notices_that_its_table_is_gone(tmp_path, anew):
    """Rows went into a table that another program had made, and nobody was told."""
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 5)])
    old = store.incarnation("d")
    shutil.rmtree(tmp_path / "d.lance")
    if anew:
        other = open_store(f"lance:{tmp_path}")
        other._database.create_table("d", schema=rows.schema())
    with pytest.raises(StoreUnavailableError, match="deleted by another program"):
        writer.append([rows.batch(5, 5)])
    writer.close()
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(5, 5)])
    assert store.dataset("d").num_rows == 5
    assert store.incarnation("d") != old


@pytest.mark.parametrize("mode", ["append", "upsert"])
@pytest.mark.parametrize("anew", [True, False])
def test_a_commit_cannot_reach_a_table_that_was_made_anew_meanwhile(
    tmp_path, monkeypatch, anew, mode
):
    """Lance made the folder again, or committed a version without the other program's rows."""
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.schema(), mode)
    write = {"append": "_add", "upsert": "_merge"}[mode]
    original = getattr(LanceWriter, write)

    def deleted_meanwhile(self, *arguments):
        shutil.rmtree(tmp_path / "d.lance")
        if anew:
            theirs = pa.Table.from_batches([rows.batch(100, 3)], rows.schema())
            store._database.create_table("d", theirs)
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LanceWriter, write, deleted_meanwhile)
        with pytest.raises(StoreUnavailableError, match="deleted by another program"):
            writer.append([rows.batch(5, 5)])
    writer._compact()
    writer.close()
    assert (tmp_path / "d.lance").exists() == anew
    writer = store.open_writer("d", rows.schema(), mode)
    writer.append([rows.batch(5, 5)])
    assert store.dataset("d").num_rows == (8 if anew else 5)


def test_a_table_is_written_where_no_temporary_file_can_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    store = open_store(f"lance:{tmp_path}")
    with contextlib.closing(store.open_writer("d", rows.schema(), "append")) as writer:
        writer.append([rows.batch(0, 5)])
        assert [info.num_rows for info in store.datasets()] == [5]
    assert list(tmp_path.glob(".fletcher-*")) == []


def test_nothing_of_another_programs_damaged_table_is_renamed(tmp_path):
    """Its only version was set aside, and a dataset without its rows took its place."""
    store = open_store(f"lance:{tmp_path}")
    theirs = pa.Table.from_batches([rows.batch(0, 3)], rows.schema())
    store._database.create_table("d", theirs)
    (data,) = (tmp_path / "d.lance" / "data").iterdir()
    data.write_bytes(data.read_bytes()[:100])
    files = sorted(tmp_path.glob("d.lance/**/*"))
    with pytest.raises(StoreUnavailableError, match=f"damaged: data/{data.name} is truncated"):
        store.open_writer("d", rows.schema(), "append")
    assert sorted(tmp_path.glob("d.lance/**/*")) == files


@pytest.mark.parametrize("lost", [True, False])
def test_a_damaged_parquet_file_is_named_and_harms_no_other_dataset(tmp_path, lost):
    """Arrow's own error ended the listing of all datasets."""
    store = open_store(f"parquet:{tmp_path}")
    for name in ("cut", "whole"):
        with contextlib.closing(store.open_writer(name, rows.schema(), "append")) as writer:
            writer.append([rows.batch(0, 5)])
    (path,) = (tmp_path / "cut").glob("*.parquet")
    whole = path.read_bytes()
    path.write_bytes(b"" if lost else whole[:-20])
    assert [info.name for info in store.datasets()] == ["whole"]
    vector = np.ones(rows.schema().field("vector").type.list_size, np.float32)
    for read in (
        lambda: store.dataset("cut"),
        lambda: store.scan("cut").read_all(),
        lambda: store.search("cut", vector, k=1),
    ):
        with pytest.raises(StoreUnavailableError, match=r"u~0-4\.parquet"):
            read()
    path.write_bytes(whole)
    assert store.scan("cut").read_all().num_rows == 5


READINGS = {
    "dataset": lambda store: store.dataset("d"),
    "incarnation": lambda store: store.incarnation("d"),
    "stored_ranges": lambda store: store.stored_ranges("d", "u"),
    "scan": lambda store: store.scan("d").read_all(),
    "search": lambda store: store.search("d", np.ones(8, np.float32), k=3),
    "delete_dataset": lambda store: store.delete_dataset("d"),
}


@pytest.mark.parametrize("name", READINGS)
def test_a_table_that_goes_away_while_it_is_read_is_unavailable(tmp_path, monkeypatch, name):
    """A call that met it was told of an internal failure, so its client gave up."""
    store = open_store(f"lance:{tmp_path}")
    fill(store, rows.batch(0, 5))
    open_table = store._database.open_table

    def open_and_drop(dataset: str):
        table = open_table(dataset)
        shutil.rmtree(tmp_path / f"{dataset}.lance")
        return table

    monkeypatch.setattr(store._database, "open_table", open_and_drop)
    with pytest.raises((StoreUnavailableError, UnknownDatasetError)):
        READINGS[name](store)
    store.close()


def test_rows_that_go_away_while_they_are_scanned_are_unavailable(tmp_path):
    store = open_store(f"lance:{tmp_path}")
    fill(store, *(rows.batch(5 * number, 5) for number in range(3)))
    reader = store.scan("d")
    for path in (tmp_path / "d.lance" / "data").iterdir():
        path.unlink()
    with pytest.raises(StoreUnavailableError, match="LanceDB failed"):
        reader.read_all()
    store.close()


def chunks(*texts: tuple[str, int | None], version: str, key: str) -> pa.RecordBatch:
    """Rows of texts, given by id and number of chunks; None for a failed text."""
    made = []
    for name, number in texts:
        places = [None] if number is None else range(number)
        made += [
            {
                "id": name,
                "vector": None if place is None else [float(place or 0)] * 2,
                "chunk_index": place,
                "chunk_start": 0,
                "chunk_end": 1,
                "text": version,
                "batch_key": key,
            }
            for place in places
        ]
    schema = pa.schema(
        [
            *[("id", pa.utf8()), ("vector", pa.list_(pa.float32(), 2))],
            *[("chunk_index", pa.int32()), ("chunk_start", pa.int64()), ("chunk_end", pa.int64())],
            *[("text", pa.utf8()), ("batch_key", pa.utf8())],
        ]
    )
    return pa.RecordBatch.from_pylist(made, schema)


def test_all_chunks_of_a_text_are_replaced(tmp_path):
    """Documents in chunks could not be replaced at all."""
    store = open_store(f"lance:{tmp_path}")
    first = chunks(("a", 3), ("it's", 2), ("c", 1), ("d", None), version="old", key="u:0-3")
    writer = store.open_writer("d", first.schema, "upsert")
    writer.append([first])

    def stored() -> list[tuple[str, int | None, str]]:
        found = store.scan("d").read_all().to_pylist()
        return sorted(((one["id"], one["chunk_index"], one["text"]) for one in found), key=str)

    assert len(stored()) == 7
    # Fewer chunks, more chunks, twice in one append, a failed text replaced and a new one.
    writer.append(
        [
            chunks(("a", 1), ("it's", 4), version="new", key="u:4-5"),
            chunks(("d", 2), ("e", 2), ("e", 1), version="new", key="u:6-8"),
        ]
    )
    expected = [
        ("a", 0, "new"),
        ("c", 0, "old"),
        *[("d", 0, "new"), ("d", 1, "new"), ("e", 0, "new")],
        *[("it's", place, "new") for place in range(4)],
    ]
    assert stored() == sorted(expected, key=str)
    writer.append(
        [chunks(("it's", None), ("d", None), ("d", None), version="failed", key="u:9-11")]
    )
    expected = [one for one in expected if one[0] not in ("it's", "d")]
    expected += [("it's", None, "failed"), ("d", None, "failed")]
    assert stored() == sorted(expected, key=str)
    writer.close()


def test_a_parquet_file_that_goes_away_while_it_is_read_is_an_error_of_the_store(
    tmp_path, monkeypatch
):
    store = open_store(f"parquet:{tmp_path}")
    with contextlib.closing(store.open_writer("d", rows.schema(), "append")) as writer:
        writer.append([rows.batch(0, 5)])
    (path,) = (tmp_path / "d").glob("u*.parquet")
    # Another process replaces the dataset between these two steps.
    monkeypatch.setattr(store, "_files", lambda _: [path.with_name("u~5-9.parquet")])
    with pytest.raises(StoreUnavailableError, match="a file went away"):
        store.scan("d")


def test_parquet_says_that_it_cannot_upsert_or_do_without_keys(tmp_path):
    store = open_store(f"parquet:{tmp_path}")
    with pytest.raises(RequestError, match="upsert"):
        store.open_writer("d", rows.schema(), "upsert")
    with pytest.raises(ColumnTypeError, match="batch_key"):
        store.open_writer("d", rows.schema().remove(6), "append")
    writer = store.open_writer("d", rows.schema(), "append")
    with pytest.raises(ColumnTypeError, match="file's name"):
        writer.append([rows.batch(0, 1, key="../../etc:0-0")])
    writer.append([rows.batch(0, 5)])
    writer.append([rows.batch(0, 5), rows.batch(5, 5)])  # the first is a repeat
    writer.close()
    assert store.dataset("d").num_rows == 10
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert names == ["_common_metadata", "u~0-4.parquet", "u~5-9.parquet"]


@pytest.mark.parametrize("mode", ["append", "upsert"])
def test_a_nan_is_refused_and_the_table_stays_whole(tmp_path, mode):
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.schema(), mode)
    good = rows.batch(0, 2)
    values = np.full(16, np.nan, np.float16)
    field = good.schema.field("vector")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type)
    bad = good.set_column(1, field, vectors)
    with pytest.raises(RequestError, match="`vector` holds NaN") as caught:
        writer.append([good, bad])
    assert "/" not in caught.value.message
    writer.append([good])
    writer.close()
    assert store.dataset("d").num_rows == 2


def carried(kind: pa.DataType, values: list, first: int = 0) -> pa.RecordBatch:
    """Rows with a carried column `x` and a null vector in the second row."""
    batch = rows.batch(first, len(values), null_rows=(1,))
    place = batch.schema.get_field_index("batch_key")
    return batch.add_column(place, pa.field("x", kind), pa.array(values, kind))


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (pa.list_(pa.float16(), 2), [np.float16(1), np.float16("nan")]),
        (pa.list_(pa.float32(), 3), [1.0, float("nan"), float("inf")]),
        (pa.list_(pa.float64(), 1), [float("nan")]),
        (pa.list_(pa.float32()), [float("nan")]),
        (pa.struct([("a", pa.list_(pa.float32(), 1))]), {"a": [float("nan")]}),
        (pa.float32(), float("nan")),
    ],
)
@pytest.mark.parametrize("mode", ["append", "upsert"])
def test_nan_in_a_carried_column_is_stored(store, kind, bad, mode):
    if mode == "upsert" and store.address.startswith("parquet"):
        pytest.skip("a Parquet store does not replace rows")
    sent = [carried(kind, [bad, None, bad]), carried(kind, [bad, bad], first=3)]
    writer = store.open_writer("d", sent[0].schema, mode)
    for batch in sent:
        writer.append([batch])
    writer.close()
    read = ["id", "vector", "x"]
    found = store.scan("d", columns=read).read_all().sort_by("id")
    expected = pa.Table.from_batches(sent).select(read)
    # NaN is unequal to itself, but its text is not.
    assert str(found.to_pylist()) == str(expected.to_pylist())


@pytest.mark.parametrize(
    "name",
    ["_distance", "_rowid", "_score", "_relevance_score", "_rowaddr", "_ROWID", "_rowoffset"],
)
def test_a_column_of_lancedb_itself_is_refused_by_name(tmp_path, name):
    store = open_store(f"lance:{tmp_path}")
    schema = rows.schema().append(pa.field(name, pa.float64()))
    with pytest.raises(InvalidCommandError, match=name):
        store.open_writer("d", schema, "append")
    assert store.dataset("d") is None
    store.close()


_DEEP = pa.struct([("f", pa.list_(pa.list_(pa.int32())))])


@pytest.mark.parametrize(
    ("kind", "readable"),
    [
        (pa.list_(_DEEP), False),
        (pa.list_(pa.struct([("b", pa.list_(pa.list_(pa.utf8())))])), False),
        (pa.struct([("g", pa.list_(_DEEP))]), False),
        (functools.reduce(lambda kind, _: pa.list_(kind), range(60), pa.int8()), False),
        (_DEEP, True),
        (pa.list_(pa.struct([("f", pa.list_(pa.int32()))])), True),
        (pa.map_(pa.utf8(), pa.list_(pa.list_(pa.float64()))), True),
    ],
)
def test_a_nested_column_is_refused_unless_it_reads_back(tmp_path, kind, readable):
    """Such rows were acknowledged, stored, and made the dataset unreadable."""
    store = open_store(f"lance:{tmp_path}")
    schema = rows.schema().append(pa.field("x", kind))
    if readable:
        store.open_writer("d", schema, "append").close()
    else:
        with pytest.raises(ColumnTypeError, match="LanceDB cannot read back"):
            store.open_writer("d", schema, "append")
    store.close()


def test_misaligned_buffers_are_taken(tmp_path):
    good = rows.batch(0, 50)
    raw = b"\0" + good.column("vector").values.buffers()[1].to_pybytes()
    values = pa.Array.from_buffers(pa.float16(), 400, [None, pa.py_buffer(raw).slice(1)])
    assert values.buffers()[1].address % 2
    kind = good.schema.field("vector").type
    odd = good.set_column(
        1, good.schema.field(1), pa.FixedSizeListArray.from_arrays(values, type=kind)
    )
    store = open_store(f"lance:{tmp_path}")
    fill(store, odd)
    assert store.scan("d").read_all().combine_chunks() == pa.Table.from_batches([good])


def test_many_appends_are_compacted_and_no_row_is_lost(tmp_path):
    store = open_store(f"lance:{tmp_path}")
    writer = store.open_writer("d", rows.schema(), "append")
    for number in range(70):
        writer.append([rows.batch(number * 10, 10)])
    writer.close()
    table = store.scan("d", columns=["id"]).read_all()
    assert sorted(table["id"].to_pylist()) == sorted(f"id{row}" for row in range(700))
    assert (
        len(list((tmp_path / "d.lance" / "data").iterdir())) > 70
    )  # old versions are kept a while
    fragments = store._open_table("d").stats()["fragment_stats"]["num_fragments"]
    assert fragments < 40
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compact")]


@pytest.mark.parametrize(
    "address",
    [
        "", "lance", "lance:", "http://x:1", "grpc://", "grpc://host", "grpc://host:99999", "/data",
        "grpc://host:1?meta=x", "grpc://host:1?meta=0", "grpc://host:1?color=red", "s3://bucket",
        "grpc://host:1/path", "grpc://host:1?profile=other", "grpc://user@host:1",
    ],
)  # fmt: skip
def test_bad_addresses_are_refused_with_what_is_allowed(address):
    with pytest.raises(ConfigError) as caught:
        open_store(address)
    assert caught.value.field == "store"
    assert caught.value.allowed


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("/data", "lance:/data"),
        ("lanc:data", "did you mean lance?"),
        ("lance:", "a folder is missing: lance:./vectors"),
        ("grpc://host", r"expected .*grpc://HOST:PORT"),
        ("grpc://host:1?color=red", r"\?meta=PORT"),
    ],
)
def test_a_bad_address_names_the_remedy(address, remedy):
    with pytest.raises(ConfigError, match=remedy):
        open_store(address)


def test_a_store_that_is_not_there_is_named_with_the_remedy():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"grpc://127.0.0.1:{deaf.getsockname()[1]}"
        store = open_store(address)
        with pytest.raises(StoreUnavailableError) as caught:
            store.dataset("d")
        store.close()
    assert caught.value.message == (
        f"the store {address} does not answer: connection refused; check its address and that it "
        "runs"
    )


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for scheme in ("lance", "parquet"):
        with pytest.raises(StoreError, match="cannot be made"):
            open_store(f"{scheme}:{tmp_path / 'file'}")


@pytest.mark.parametrize("scheme", ["lance", "parquet"])
@pytest.mark.parametrize("name", ["a\nb", "tab\t", "\x7f", "\udcff\udcfe"])
def test_a_folder_whose_name_cannot_be_used_is_refused(tmp_path, scheme, name):
    """LanceDB failed with an error of its own, and bytes that are not UTF-8 with another."""
    with pytest.raises(StoreError, match="give `store` or `home` another folder"):
        open_store(f"{scheme}:{tmp_path / name}")
    odd = "ünï c%20' $?*"
    open_store(f"{scheme}:{tmp_path / odd}").close()


def test_a_missing_lancedb_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(StoreError, match=r"pip install 'longbow-fletcher\[lance\]'"):
        open_store(f"lance:{tmp_path}")


def test_a_parquet_append_keeps_the_file_of_a_key_that_is_sent_again(tmp_path):
    """Nothing noticed an append that wrote every group anew."""
    store = open_store(f"parquet:{tmp_path}")
    fill(store, rows.batch(0, 3))
    (path,) = (tmp_path / "d").glob("u*.parquet")
    before = (path.stat().st_ino, path.read_bytes())
    other = rows.batch(0, 3, text="another")
    fill(store, other, rows.batch(3, 2))
    assert (path.stat().st_ino, path.read_bytes()) == before
    assert sorted(store.scan("d").read_all().column("id").to_pylist()) == [
        f"id{row}" for row in range(5)
    ]


def keyed(upload_id: str, first: int, number: int) -> pa.RecordBatch:
    batch = rows.batch(first, number)
    keys = pa.array([f"{upload_id}:{first}-{first + number - 1}"] * number, pa.utf8())
    return batch.set_column(batch.schema.get_field_index("batch_key"), "batch_key", keys)


@pytest.mark.parametrize("upload_id", ["u", "u_x", "u-x", "U", "u.00ff00ff00ff00ff00ff00ff"])
def test_only_the_rows_of_an_upload_are_deleted(store: Store, upload_id: str) -> None:
    others = ["u", "u_x", "u-x", "ux", "U", "v", "u.00ff00ff00ff00ff00ff00ff", "u.0"]
    fill(store, *[keyed(one, 3 * place, 3) for place, one in enumerate(others)])
    fill(store, keyed(upload_id, 100, 5))
    assert store.delete_upload("missing", upload_id) == 0
    assert store.delete_upload("d", upload_id) == 8
    left = store.scan("d").read_all().column("batch_key").to_pylist()
    assert {key.partition(":")[0] for key in left} == {*others} - {upload_id}
    assert len(left) == 3 * (len(others) - 1)
    assert store.delete_upload("d", upload_id) == 0
    assert store.stored_ranges("d", upload_id) == []
    fill(store, keyed(upload_id, 0, 3))
    assert store.stored_ranges("d", upload_id) == [(0, 2)]


def test_rows_are_not_deleted_under_a_writer(store: Store) -> None:
    fill(store, keyed("u", 0, 3))
    writer = store.open_writer("d", keyed("u", 0, 3).schema, "append")
    with pytest.raises(StoreUnavailableError, match="being written"):
        store.delete_upload("d", "u")
    writer.close()
    assert store.delete_upload("d", "u") == 3
