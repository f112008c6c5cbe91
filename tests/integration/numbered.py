"""Rows that tell what became of each of them: numbered ids, texts made of their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from fletcher.stores.address import open_store

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8()})
_WORDS = "debian packages hold programs that people use every day and night".split()


def text_of(row: int) -> str:
    """The text of a row: 1 to 5 words and the number."""
    return " ".join([*_WORDS[row % 7 : row % 7 + row % 5], str(row)])


def rows(first: int, last: int) -> pa.RecordBatch:
    """Rows first to last, the last not included."""
    numbers = range(first, last)
    texts = [text_of(row) for row in numbers]
    return pa.record_batch({"id": pa.array(numbers, pa.int64()), "text": texts}, SCHEMA)


def batches(first: int, last: int, num_rows: int) -> Iterator[pa.RecordBatch]:
    """The same in batches."""
    edges = [*range(first, last, num_rows), last]
    return (rows(one, other) for one, other in itertools.pairwise(edges))


def stored(folder: Path, dataset: str) -> pa.Table:
    """A LanceDB dataset, sorted by id."""
    store = open_store(f"lance:{folder}")
    try:
        return store.scan(dataset).read_all().sort_by("id")
    finally:
        store.close()


def assert_every_row_once(table: pa.Table, num_rows: int) -> None:
    """Rows 0 to num_rows are there, each once, with its own text and a vector."""
    assert table.column("id").to_pylist() == list(range(num_rows))
    assert table.column("text").to_pylist() == [text_of(row) for row in range(num_rows)]
    assert table.column("vector").null_count == 0
