"""What a dataset holds, as far as uploads ask that leave out rows which are there already.

A row is known when it is on the store's or the journal's disk, so a duplicate of it can be dropped
and acknowledged. Whether a row is one is decided just before it is journaled (or stored, where it
is not journaled), by who holds the right to decide, until it is clear what became of the rows: two
that are on their way at once cannot both pass. What is known earlier than that need not even be
embedded (`screen`).

`id` and `text` drop rows whose id or text is known, `delta` those whose id is known with that text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from fletcher.delivery.dedupe.fingerprints import SIZE, FingerprintMap, fingerprints
from fletcher.delivery.groups import Rows
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.segment import JournaledGroup
from fletcher.errors import (
    FletcherError,
    InvalidCommandError,
    StoreUnavailableError,
    UnknownDatasetError,
)
from fletcher.stores.base import Store
from fletcher.telemetry.tracing import Telemetry

log = logging.getLogger(__name__)

# What a row is known by: its key, and the value that makes it the same row again.
_COLUMNS = {"id": ("id",), "text": ("text",), "delta": ("id", "text")}
_ANY = b"\1"

Entry = tuple[bytes | None, bytes | None]


class DedupeMemory:
    """Bytes that the knowledge of all datasets may take together. Thread-safe.

    Args:
        max_bytes: The limit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> bool:
        """Counts more (or, negative, fewer) bytes; False, and nothing, where they are too many."""
        with self._lock:
            if num_bytes > 0 and self.used_bytes + num_bytes > self.max_bytes:
                return False
            self.used_bytes += num_bytes
            return True


class _Index:
    """Known rows by one kind of key; guarded by Known's lock."""

    def __init__(self, kind: str, space: DedupeMemory) -> None:
        self.kind = kind
        self.stale = True  # what it holds is not all, or not sure: read the store again
        self.doubted = False  # while it was being read
        self.late: list[dict[bytes, bytes]] | None = None  # what came while it was being read
        self._space = space
        self._map = FingerprintMap(SIZE if kind == "delta" else len(_ANY))
        self._counted = 0

    def get(self, keys: Sequence[bytes | None]) -> list[bytes | None]:
        return self._map.get(keys)

    def update(self, entries: Mapping[bytes, bytes]) -> bool:
        """False where there is no memory for more; it is empty and stale then."""
        self._map.update(entries)
        grown = self._map.num_bytes - self._counted
        if self._space.add(grown):
            self._counted += grown
            return True
        self.clear()
        self.stale = True
        return False

    def clear(self) -> None:
        self._space.add(-self._counted)
        self._counted = 0
        self._map = FingerprintMap(SIZE if self.kind == "delta" else len(_ANY))


class DedupeIndex:
    """What is known of one dataset; nothing until the first upload that asks. Thread-safe.

    Args:
        store: The store, whose columns are read once.
        dataset: The dataset's name.
        journal: The dataset's journal; None: there is none.
        space: Memory for all datasets.
        telemetry: Where dropped rows are counted.
    """

    def __init__(
        self,
        store: Store,
        dataset: str,
        journal: Journal | None,
        space: DedupeMemory,
        telemetry: Telemetry,
    ) -> None:
        self._store = store
        self._dataset = dataset
        self._journal = journal
        self._space = space
        self._telemetry = telemetry
        self._indexes: dict[str, _Index] = {}
        # Taken in this order; the store is asked under the first two alone.
        self._deciding = threading.Lock()
        self._reading = threading.Lock()
        self._lock = threading.Lock()

    def load(self, kind: str) -> None:
        """Reads what the store and the journal hold, unless that is known.

        Raises:
            InvalidCommandError: The dataset has no such column, or is too large.
            StoreUnavailableError: The store does not answer.
        """
        self._index(kind)

    def find(self, kind: str, entries: Sequence[Entry]) -> list[bool]:
        """Which rows are known. Raises as `load` does."""
        values = self._values(kind, [key for key, _ in entries])
        return [
            value is not None and value == known
            for (_, value), known in zip(entries, values, strict=True)
        ]

    def acquire(self, wait_s: float) -> bool:
        """Takes the right to decide; False where another one holds it for so long."""
        return self._deciding.acquire(timeout=wait_s)

    def release(self) -> None:
        """Gives the right back: what was decided is on a disk, or came to nothing, or `doubt`."""
        self._deciding.release()

    @contextlib.contextmanager
    def deciding(self, taken: Sequence[Rows], *, wait_s: float) -> Iterator[list[Rows]]:
        """`decide` with the right to; the body says `add` of what it brought to a disk.

        Raises:
            StoreUnavailableError: Another one holds the right, or the store does not answer.
            InvalidCommandError: As `load`.
        """
        if not any(rows.upload.dedupe_by for rows in taken):
            yield list(taken)
            return
        if not self.acquire(wait_s):
            raise self.undecided()
        try:
            yield self.decide(taken)
        finally:
            self.release()

    def undecided(self) -> StoreUnavailableError:
        """That rows cannot be told from those that another one has on their way."""
        return StoreUnavailableError(
            f"rows that may be duplicates are on their way to `{self._dataset}`, and its store has "
            "not answered; try again later",
            field="dedupe",
        )

    def decide(self, taken: Sequence[Rows]) -> list[Rows]:
        """Rows that come to a disk together or not at all, with duplicates marked as such.

        Raises:
            StoreUnavailableError: The store does not answer.
            InvalidCommandError: As `load`.
        """
        fresh: dict[str, dict[bytes, bytes]] = {}
        return [self._screened(rows, fresh) for rows in taken]

    def add(self, rows: Rows) -> None:
        """Rows are on a disk, the journal's or the store's; never raises, for there they stay."""
        if rows.num_dropped:
            self._telemetry.rows_deduplicated.add(rows.num_dropped)
        try:
            self._learn(rows)
        except Exception:
            log.exception("`%s`: its rows are read again, to be known", self._dataset)
            self.doubt()

    def doubt(self) -> None:
        """Rows may or may not be in the store: before the next decision it is asked."""
        with self._lock:
            for index in self._indexes.values():
                index.stale = index.doubted = True

    def close(self) -> None:
        """Lets everything go."""
        with self._lock:
            for index in self._indexes.values():
                index.clear()
            self._indexes.clear()

    def _learn(self, rows: Rows) -> None:
        with self._lock:
            kinds = [
                index.kind
                for index in self._indexes.values()
                if not index.stale or index.late is not None
            ]
        if not kinds:
            return
        batch = rows.load()
        left_out = rows.left_out(null_vectors=self._store.capabilities.null_vectors)
        entries = {kind: _entries(kind, batch, left_out) for kind in kinds}
        with self._lock:
            for kind in kinds:
                index = self._indexes.get(kind)
                if index is None:  # closed
                    continue
                if index.late is not None:
                    index.late.append(entries[kind])
                elif not index.stale and not index.update(entries[kind]):
                    log.warning("`%s`: no memory for what is known of its rows", self._dataset)
                # A replaced row's text is gone, and only the store can tell whether others have it.
                if kind == "text" and rows.upload.upsert:
                    index.stale = index.doubted = True

    def _screened(self, rows: Rows, fresh: dict[str, dict[bytes, bytes]]) -> Rows:
        """The rows, those marked that are known or in `fresh`; the others come into `fresh`."""
        kind = rows.upload.dedupe_by
        if kind is None:
            return rows
        unsent = {*rows.unsent, *rows.failed}  # what failed may come again, repaired
        entries = entries_of(kind, rows.load())
        known = self.find(kind, entries)
        passed = fresh.setdefault(kind, {})
        num_dropped = rows.num_dropped
        for place, (key, value) in enumerate(entries):
            if place in unsent or key is None or value is None:
                continue
            if passed.get(key) == value or (known[place] and key not in passed):
                unsent.add(place)
                num_dropped += 1
            else:
                passed[key] = value
        rows.upload.note_duplicates(rows.first, num_dropped)
        return dataclasses.replace(rows, unsent=tuple(sorted(unsent)), num_dropped=num_dropped)

    def _values(self, kind: str, keys: Sequence[bytes | None]) -> list[bytes | None]:
        while True:
            index = self._index(kind)
            with self._lock:
                if not index.stale:  # again, just now
                    return index.get(keys)

    def _index(self, kind: str) -> _Index:
        with self._lock:
            index = self._indexes.setdefault(kind, _Index(kind, self._space))
            ready = not index.stale
        if ready:
            return index
        with self._reading:
            with self._lock:
                if not index.stale:  # another one read it
                    return index
                index.clear()
                index.late, index.doubted = [], False
            try:
                self._read(index)
            except BaseException:
                with self._lock:
                    index.clear()
                    index.late = None
                raise
        return index

    def _read(self, index: _Index) -> None:
        # The journal first: what leaves it meanwhile has come to the store.
        journaled: dict[bytes, bytes] = {}
        null_vectors = self._store.capabilities.null_vectors
        for group in self._journal.waiting() if self._journal is not None else []:
            journaled.update(_journaled_entries(index.kind, group, null_vectors=null_vectors))
        columns = _COLUMNS[index.kind]
        info = self._store.dataset(self._dataset)
        if info is not None:
            lacking = [name for name in columns if name not in info.schema.names]
            if lacking:
                raise InvalidCommandError(
                    f"dataset `{self._dataset}` has no column `{lacking[0]}`, by which its rows "
                    "could be known; leave `dedupe` and delta out",
                    field="dedupe",
                )
            try:
                for batch in self._store.scan(self._dataset, columns=columns):
                    entries = _entries(index.kind, batch, ())
                    with self._lock:
                        self._fill(index, entries)
            except UnknownDatasetError:  # no rows yet
                pass
        with self._lock:
            for entries in [journaled, *(index.late or [])]:
                self._fill(index, entries)
            index.late, index.stale = None, index.doubted
            if self._indexes.get(index.kind) is not index:  # closed
                index.clear()

    def _fill(self, index: _Index, entries: Mapping[bytes, bytes]) -> None:
        if not index.update(entries):
            raise InvalidCommandError(
                f"knowing the rows of dataset `{self._dataset}` takes more memory than the "
                f"{self._space.max_bytes} bytes that this server has for it; raise `--max-memory`, "
                "or leave `dedupe` and delta out",
                field="dedupe",
            )


def entries_of(kind: str, rows: pa.RecordBatch) -> list[Entry]:
    """By row the key that it is known by, None where it has none, and that key's value."""
    if kind == "text":
        return [(key, _ANY) for key in fingerprints(rows.column("text"))]
    ids = fingerprints(rows.column("id"))
    if kind == "id":
        return [(key, _ANY) for key in ids]
    return list(zip(ids, fingerprints(rows.column("text")), strict=True))


def _entries(kind: str, rows: pa.RecordBatch, unsent: Sequence[int]) -> dict[bytes, bytes]:
    """Keys and values of rows on a disk. An id without a text gets one that no text has."""
    if not set(_COLUMNS[kind]) <= set(rows.schema.names):  # an upload without texts
        if "id" not in _COLUMNS[kind]:
            return {}
        texts = pa.nulls(rows.num_rows, pa.utf8())
        rows = pa.record_batch({"id": rows.column("id"), "text": texts})
    left_out = set(unsent)
    return {
        key: value or bytes(SIZE)
        for place, (key, value) in enumerate(entries_of(kind, rows))
        if key is not None and place not in left_out
    }


def keys_of(kind: str, group: Sequence[Rows]) -> set[bytes]:
    """What the rows of a group that are sent are known by."""
    return {key for rows in group for key in _entries(kind, rows.load(), rows.unsent)}


def _journaled_entries(
    kind: str, group: JournaledGroup, *, null_vectors: bool
) -> dict[bytes, bytes]:
    left_out = (*group.info.unsent, *(() if null_vectors else group.info.failed))
    try:
        return _entries(kind, group.load(), left_out)
    except FletcherError:
        if group.settled:  # and its file deleted, just now
            return {}
        raise
