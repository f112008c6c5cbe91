"""Vectors of unchanged texts are read back from the store, or the texts are embedded again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fletcher.core.chunking import Chunking
from fletcher.core.quantization import Ranges
from fletcher.core.schema import VectorSpec, output_schema
from fletcher.core.stored_vectors import StoredVectors
from fletcher.delivery.breaker import Breaker
from fletcher.delivery.dedupe.stored_vector_reader import StoredVectorReader
from fletcher.delivery.groups import Destination
from fletcher.errors import StoreUnavailableError, UnknownDatasetError
from fletcher.stores.address import open_store
from fletcher.stores.base import Store
from fletcher.telemetry.tracing import Telemetry
from fletcher.util.backoff import Backoff
from tests.doubles.stores import outage

SPEC = VectorSpec("m@0", 2, "float32", 2, "mean", normalized=False)
VECTORS: dict[str, tuple[VectorSpec, Any, Any]] = {
    "float32": (SPEC, [1.5, 2.0], [3.0, 4.0]),
    "float16": (dataclasses.replace(SPEC, dtype="float16"), [1.5, 2.0], [3.0, 4.0]),
    "int8": (dataclasses.replace(SPEC, dtype="int8"), [1, -127], [3, 4]),
    "ubinary": (dataclasses.replace(SPEC, dtype="ubinary", dims=16), [1, 255], [3, 4]),
    "sparse": (
        dataclasses.replace(SPEC, output="sparse", similarity="dot"),
        [{"index": 1, "value": 2.5}],
        [],
    ),
    "multi": (dataclasses.replace(SPEC, output="multi"), [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"lance:{tmp_path}")
    yield store
    store.close()


def schema_of(spec: VectorSpec, id_type: pa.DataType | None = None) -> pa.Schema:
    return output_schema(spec, id_type=id_type or pa.utf8(), text=True)


def write(store: Store, schema: pa.Schema, *rows: dict[str, Any]) -> None:
    """Rows with the values that tests do not give."""
    usual = {"timestamp": 0, "token_count": 3, "truncated": False, "batch_key": "u:0-1"}
    if "scale" in schema.names:
        usual["scale"] = 0.5
    full = schema.append(pa.field("batch_key", pa.utf8()))
    batch = pa.RecordBatch.from_pylist([usual | row for row in rows], schema=full)
    writer = store.open_writer("d", full, "append")
    writer.append([batch])
    writer.close()


def reader_of(
    store: Store, output: pa.Schema, breaker: Breaker | None = None
) -> StoredVectorReader:
    breaker = breaker or Breaker("default", Backoff(0.1, 1))
    return StoredVectorReader(Destination(store, "d", breaker, Telemetry()), output)


def rows(*pairs: tuple[Any, str]) -> pa.RecordBatch:
    ids, texts = zip(*pairs, strict=True)
    return pa.record_batch({"id": list(ids), "text": list(texts)})


def found(stored: StoredVectors | None) -> dict[int, Any]:
    if stored is None:
        return {}
    return dict(zip(stored.rows.tolist(), stored.columns["vector"].to_pylist(), strict=True))


@pytest.mark.parametrize("kind", VECTORS)
def test_each_kind_of_vector_is_read_exactly(store: Store, kind: str) -> None:
    spec, one, other = VECTORS[kind]
    schema = schema_of(spec)
    write(store, schema, {"id": "a", "text": "x", "vector": one})
    write(store, schema, {"id": "b", "text": "y", "vector": other, "token_count": 7})
    asked = rows(("b", "y"), ("c", "x"), ("a", "x"), ("a", "changed"), ("b", "y"))
    stored = reader_of(store, schema).read_vectors(asked, range(5))
    assert found(stored) == {0: other, 2: one, 4: other}
    assert stored is not None
    assert stored.columns.schema.names[0] == "vector"
    assert ("scale" in stored.columns.schema.names) == (kind == "int8")
    assert stored.columns["token_count"].to_pylist() == [7, 3, 7]
    filled = stored.fill(
        {
            name: pa.nulls(5, schema.field(name).type)
            for name in ("vector", "scale", "token_count", "truncated")
            if name in schema.names
        }
    )
    assert filled["vector"].to_pylist() == [other, None, one, None, other]
    assert filled["vector"].type == spec.arrow_type
    assert found(stored.among(np.array([False, True, True, True, False]))) == {2: one}


def test_only_the_asked_rows_are_looked_for(store: Store) -> None:
    write(store, schema_of(SPEC), {"id": "a", "text": "x", "vector": [1, 2]})
    reader = reader_of(store, schema_of(SPEC))
    assert found(reader.read_vectors(rows(("a", "x"), ("a", "x")), [1])) == {1: [1, 2]}
    assert reader.read_vectors(rows(("a", "x")), []) is None


@pytest.mark.parametrize("value", [7, 2**63 + 1])
def test_ids_may_be_integers(store: Store, value: int) -> None:
    schema = schema_of(SPEC, pa.uint64())
    write(store, schema, {"id": value, "text": "x", "vector": [1, 2]})
    asked = pa.record_batch({"id": pa.array([value], pa.uint64()), "text": ["x"]})
    assert found(reader_of(store, schema).read_vectors(asked, [0])) == {0: [1, 2]}


def test_of_rows_with_one_id_the_one_with_the_text_counts(store: Store) -> None:
    schema = schema_of(SPEC)
    for text, vector in (("old", [1, 2]), ("x", [3, 4]), ("new", [5, 6])):
        write(store, schema, {"id": "a", "text": text, "vector": vector})
    assert found(reader_of(store, schema).read_vectors(rows(("a", "x")), [0])) == {0: [3, 4]}


@pytest.mark.parametrize(
    "change",
    [{"vector": None}, {"truncated": True}, {"truncated": None}, {"token_count": None}],
    ids=str,
)
def test_a_row_that_lacks_something_is_embedded_again(store: Store, change: dict[str, Any]) -> None:
    # Which end of a cut text was cut is not stored.
    schema = schema_of(SPEC)
    good = {"id": "a", "text": "x", "vector": [1, 2]}
    write(store, schema, good, good | {"id": "b"} | change)
    asked = rows(("a", "x"), ("b", "x"))
    assert found(reader_of(store, schema).read_vectors(asked, [0, 1])) == {0: [1, 2]}


@pytest.mark.parametrize("kind", ["float32", "sparse", "multi"])
def test_a_vector_that_is_not_finite_is_made_anew(store: Store, kind: str) -> None:
    spec, one, _ = VECTORS[kind]
    bad = {"float32": [1.0, float("inf")], "sparse": [{"index": 0, "value": float("nan")}]}
    write(store, schema_of(spec), {"id": "a", "text": "x", "vector": one})
    broken = {"id": "b", "text": "x", "vector": bad.get(kind, [[1.0, 2.0], [float("inf"), 0.0]])}
    write(store, schema_of(spec), broken)
    reader = reader_of(store, schema_of(spec))
    assert 1 not in found(reader.read_vectors(rows(("a", "x"), ("b", "x")), [0, 1]))


RANGES = Ranges.between(np.zeros(2, np.float32), np.ones(2, np.float32))
OTHERS: list[dict[str, Any]] = [
    {"model": "m@1"},
    {"layers": 1},
    {"pooling": "cls"},
    {"normalized": True},
    {"prompt": "query: "},
    {"similarity": "dot"},
    {"dtype": "float16"},
    {"chunking": Chunking.from_text("tokens:8:mean")},
    {"dtype": "int8"},
    {"dtype": "int8", "ranges": RANGES},
]


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_vectors_of_another_kind_are_not_taken(store: Store, change: dict[str, Any]) -> None:
    write(store, schema_of(SPEC), {"id": "a", "text": "x", "vector": [1, 2]})
    other = schema_of(dataclasses.replace(SPEC, **change))
    assert reader_of(store, other).read_vectors(rows(("a", "x")), [0]) is None


def test_a_dataset_of_before_does_not_say_which_prompt_it_has(store: Store) -> None:
    schema = schema_of(SPEC)
    said = {key: value for key, value in schema.metadata.items() if key != b"fletcher.prompt"}
    row = {"id": "a", "text": "x", "vector": [1, 2]}
    write(store, schema.with_metadata(said), row)
    assert reader_of(store, schema).read_vectors(rows(("a", "x")), [0]) is None


def test_chunks_are_embedded_again(store: Store) -> None:
    schema = schema_of(dataclasses.replace(SPEC, chunking=Chunking.from_text("tokens:8:none")))
    one = {"id": "a", "text": "x", "vector": [1, 2]}
    write(store, schema, one | {"chunk_index": 0, "chunk_start": 0, "chunk_end": 1})
    assert reader_of(store, schema).read_vectors(rows(("a", "x")), [0]) is None


def failing(error: Exception, after: int) -> Callable[..., pa.RecordBatchReader]:
    def scan(*_: Any, **__: Any) -> pa.RecordBatchReader:
        def batches() -> Iterator[pa.RecordBatch]:
            yield from ()
            raise error

        if not after:
            raise error
        return pa.RecordBatchReader.from_batches(schema_of(SPEC), batches())

    return scan


@pytest.mark.parametrize("error", [outage(), OSError("read"), MemoryError(), RuntimeError()])
@pytest.mark.parametrize("after", [0, 1])
def test_a_store_that_fails_is_not_asked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int
) -> None:
    write(store, schema_of(SPEC), {"id": "a", "text": "x", "vector": [1, 2]})
    reader = reader_of(store, schema_of(SPEC))
    with monkeypatch.context() as patched:
        patched.setattr(store, "scan", failing(error, after))
        assert reader.read_vectors(rows(("a", "x")), [0]) is None
    assert reader.read_vectors(rows(("a", "x")), [0]) is None
    assert found(reader_of(store, schema_of(SPEC)).read_vectors(rows(("a", "x")), [0]))


def test_a_dataset_that_is_still_in_the_journal_is_asked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(store, schema_of(SPEC))
    assert reader.read_vectors(rows(("a", "x")), [0]) is None
    with pytest.raises(UnknownDatasetError):
        store.scan("d")
    write(store, schema_of(SPEC), {"id": "a", "text": "x", "vector": [1, 2]})
    assert found(reader.read_vectors(rows(("a", "x")), [0])) == {0: [1, 2]}


def test_an_unavailable_store_is_not_asked(store: Store) -> None:
    write(store, schema_of(SPEC), {"id": "a", "text": "x", "vector": [1, 2]})
    breaker = Breaker("default", Backoff(60, 60))
    for _ in range(3):
        with pytest.raises(StoreUnavailableError), breaker.guard_call("other"):
            raise StoreUnavailableError("away", field="store")
    assert reader_of(store, schema_of(SPEC), breaker).read_vectors(rows(("a", "x")), [0]) is None


def test_what_is_read_for_an_id_is_bounded(store: Store) -> None:
    # Rows that were appended may have any number of rows per id.
    schema = schema_of(SPEC)
    many = [{"id": "a", "text": str(number), "vector": [1, 2]} for number in range(100)]
    write(store, schema, *many, {"id": "b", "text": "x", "vector": [3, 4]})
    read: list[int] = []
    scan = store.scan

    def counted(*args: Any, **fields: Any) -> pa.RecordBatchReader:
        table = scan(*args, **fields).read_all()
        read.append(table.num_rows)
        return table.to_reader()

    store.scan = counted  # type: ignore[method-assign]
    reader_of(store, schema).read_vectors(rows(("a", "none")), [0])
    assert read == [10]
