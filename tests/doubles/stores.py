"""A store in memory that fails on request."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from fletcher.core.ranges import RangeSet
from fletcher.core.schema import parse_batch_key
from fletcher.errors import FletcherError, OverloadedError, StoreUnavailableError
from fletcher.stores.base import Appended, DatasetInfo, StoreCapabilities, WriteMode
from fletcher.stores.staging import incarnation_of, with_incarnation

Fault = Callable[[], None]


class MemoryStore:
    """Keeps batches by dataset. Each append plays one of `faults`; `None` means success.

    A fault is ("before" | "after", error): raised before the rows are kept, or after, as when the
    answer is lost. While `down` is set all fails; appends to `locked` datasets, and of more than
    `most_rows`, do.
    """

    address = "memory:"

    def __init__(self, *, null_vectors: bool = True) -> None:
        self.capabilities = StoreCapabilities(
            dtypes=("float32", "float16"),
            null_vectors=null_vectors,
            upsert=True,
            drops_repeated_keys=False,
            durable=True,
        )
        self.batches: dict[str, list[pa.RecordBatch]] = {}
        self.schemas: dict[str, pa.Schema] = {}
        self.appends: list[list[pa.RecordBatch]] = []
        self.faults: deque[tuple[str, Exception] | None] = deque()
        self.refuse: Callable[[Sequence[pa.RecordBatch]], FletcherError | None] = lambda _: None
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.opened: list[WriteMode] = []
        self.replaced: list[str] = []
        self.scans: list[tuple[str, tuple[str, ...]]] = []
        self.slow_down = False
        self.down: FletcherError | None = None
        self.locked: set[str] = set()
        self.most_rows: int | None = None
        self.num_tries = 0

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> MemoryWriter:
        self.opened.append(mode)
        if dataset not in self.batches:
            self.batches[dataset] = []
            self.schemas[dataset] = with_incarnation(dataset, schema)
        return MemoryWriter(self, dataset)

    def dataset(self, name: str) -> DatasetInfo | None:
        if name not in self.batches:
            return None
        return DatasetInfo(name, self.schemas[name], self.rows(name).num_rows)

    def read_schema(self, name: str) -> pa.Schema | None:
        return self.schemas[name] if name in self.batches else None

    def incarnation(self, name: str) -> str | None:
        return incarnation_of(self.schemas[name]) if name in self.batches else None

    def staged_datasets(self) -> list[DatasetInfo]:
        return []

    def replace_dataset(self, name: str, staged: str) -> None:
        self.replaced.append(name)
        if self.down is not None:
            raise self.down
        self.batches[name] = self.batches.pop(staged)
        self.schemas[name] = self.schemas.pop(staged)

    def delete_upload(self, dataset: str, upload_id: str) -> int:
        if self.down is not None:
            raise self.down
        before, kept = self.rows(dataset).num_rows, []
        for batch in self.batches[dataset]:
            keys = [parse_batch_key(key) for key in batch.column("batch_key").to_pylist()]
            kept.append(
                batch.filter(
                    pa.array([key is None or key[0] != upload_id for key in keys], pa.bool_())
                )
            )
        self.batches[dataset] = kept
        return before - self.rows(dataset).num_rows

    def datasets(self) -> list[DatasetInfo]:
        return [info for name in sorted(self.batches) if (info := self.dataset(name))]

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        keys = {parse_batch_key(key) for key in self.keys(dataset)}
        return RangeSet(key[1:] for key in keys if key and key[0] == upload_id).ranges()

    def keys(self, dataset: str) -> list[str]:
        return [
            key
            for batch in self.batches[dataset]
            for key in batch.column("batch_key").unique().to_pylist()
        ]

    def rows(self, dataset: str) -> pa.Table:
        return pa.Table.from_batches(self.batches[dataset], self.schemas[dataset])

    def close(self) -> None:
        self.gate.set()

    def scan(self, dataset: str, *, columns: Sequence[str], **_: Any) -> pa.RecordBatchReader:
        self.scans.append((dataset, tuple(columns)))
        return self.rows(dataset).select(list(columns)).to_reader()

    def search(self, *_: Any, **__: Any) -> Any:
        raise AssertionError

    def delete_dataset(self, name: str) -> None:
        del self.batches[name]


class MemoryWriter:
    def __init__(self, store: MemoryStore, dataset: str) -> None:
        self._store = store
        self._dataset = dataset

    def append(self, batches: Sequence[pa.RecordBatch]) -> Appended:
        store = self._store
        store.waiting.set()
        assert store.gate.wait(30)
        store.num_tries += 1
        if store.down is not None:
            raise store.down
        if self._dataset in store.locked:
            raise StoreUnavailableError("another process writes to it")
        if store.most_rows is not None and sum(one.num_rows for one in batches) > store.most_rows:
            raise OverloadedError("message larger than max")
        fault = store.faults.popleft() if store.faults else None
        if (refusal := store.refuse(batches)) is not None:
            raise refusal
        if fault is not None and fault[0] == "before":
            raise fault[1]
        store.appends.append(list(batches))
        store.batches[self._dataset] += batches
        if fault is not None:
            raise fault[1]
        return Appended(slow_down=store.slow_down)

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        stored = set(self._store.keys(self._dataset))
        return [key for key in batch_keys if key not in stored]

    def close(self) -> None:
        pass


def outage() -> StoreUnavailableError:
    return StoreUnavailableError("the store is out", field="store")
