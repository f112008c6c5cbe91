"""Index of a dataset's ids and text hashes, for `dedupe` and `mode=delta`.

A row is added to the index once it is on disk, in the store or in the journal. From then on its
duplicates can be dropped and acknowledged.

Duplicates are marked just before rows are journaled, or just before they are stored if they are not
journaled. The thread that marks them holds the right to decide until the rows are on disk or given
up. Therefore only one of two equal pending rows is stored. A row that already duplicates an indexed
row when it arrives need not even be embedded (see `DedupePrefilter`).

The kind of key says which rows are dropped:

- `id`: rows whose id is in the index
- `text`: rows whose text is in the index
- `delta`: rows whose id is in the index with the same text and the same carried columns
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence

from fletcher.delivery.dedupe.fingerprints import (
    FingerprintMap,
    RowKey,
    compared_columns,
    keys_to_send,
    needed_columns,
    row_keys,
    stored_keys,
    value_bytes,
)
from fletcher.delivery.groups import Destination, Group, Rows
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.segment import JournaledGroup
from fletcher.errors import (
    FletcherError,
    InvalidCommandError,
    StoreUnavailableError,
    UnknownDatasetError,
)

log = logging.getLogger(__name__)


class DedupeMemory:
    """Memory limit for the dedupe indexes of all datasets together. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()

    def add_bytes(self, num_bytes: int) -> bool:
        """Add to the bytes in use; a negative number subtracts.

        Returns False and changes nothing if the sum would be over the limit.
        """
        with self._lock:
            if num_bytes > 0 and self.used_bytes + num_bytes > self.max_bytes:
                return False
            self.used_bytes += num_bytes
            return True


class _KindIndex:
    """Index by one kind of key; guarded by the lock of `DedupeIndex`.

    Attributes:
        stale: The content may be incomplete or wrong, so the store must be read again.
        invalidated: The index became stale again while the store was being read.
        late: Entries that were added while the store was being read. None if it is not being read.
    """

    def __init__(self, kind: str, memory: DedupeMemory) -> None:
        self.kind = kind
        self.stale = True
        self.invalidated = False
        self.late: list[dict[bytes, bytes]] | None = None
        self.map = FingerprintMap(value_bytes(kind))
        self._memory = memory
        self._counted = 0

    def add_entries(self, entries: Mapping[bytes, bytes]) -> bool:
        """Add entries; returns False if the memory limit does not allow them.

        The index is then empty and stale.
        """
        self.map.add_entries(entries)
        grown = self.map.num_bytes - self._counted
        if self._memory.add_bytes(grown):
            self._counted += grown
            return True
        self.clear()
        self.stale = True
        return False

    def clear(self) -> None:
        self._memory.add_bytes(-self._counted)
        self._counted = 0
        self.map = FingerprintMap(value_bytes(self.kind))


class DedupeIndex:
    """One dataset's index. Thread-safe.

    The index is empty until the first upload that needs it.
    """

    def __init__(
        self, destination: Destination, journal: Journal | None, memory: DedupeMemory
    ) -> None:
        self._store = destination.store
        self._dataset = destination.dataset
        self._telemetry = destination.telemetry
        self._journal = journal
        self._memory = memory
        self._kinds: dict[str, _KindIndex] = {}
        # Locks, in the order in which a thread acquires them. The store is never called under the
        # third one.
        self._deciding = threading.Lock()
        self._reading = threading.Lock()
        self._lock = threading.Lock()

    def load_kind(self, kind: str) -> _KindIndex:
        """The index by one kind of key, read from store and journal if stale.

        Raises:
            InvalidCommandError: The dataset lacks a column, or its index needs too much memory.
            StoreUnavailableError: The store does not answer.
        """
        with self._lock:
            index = self._kinds.setdefault(kind, _KindIndex(kind, self._memory))
            ready = not index.stale
        if ready:
            return index
        with self._reading:
            with self._lock:
                if not index.stale:  # another thread read it
                    return index
                index.clear()
                index.late, index.invalidated = [], False
            try:
                self._read_dataset(index)
            except BaseException:
                with self._lock:
                    index.clear()
                    index.late = None
                raise
        return index

    def find_values(self, kind: str, keys: Sequence[RowKey]) -> list[bytes | None]:
        """Indexed value of each row's key, or None. Raises the errors of `load_kind`."""
        wanted = [key for key, _ in keys]
        while True:
            index = self.load_kind(kind)
            with self._lock:
                if not index.stale:  # the index may have become stale after `load_kind`
                    return index.map.find_values(wanted)

    def find_duplicates(self, kind: str, keys: Sequence[RowKey]) -> list[bool]:
        """Whether each row is a duplicate. Raises the errors of `load_kind`."""
        return [
            value is not None and value == indexed
            for (_, value), indexed in zip(keys, self.find_values(kind, keys), strict=True)
        ]

    def acquire_decision(self, wait_s: float) -> bool:
        """Acquire the right to decide; False if it is not free within `wait_s`."""
        return self._deciding.acquire(timeout=wait_s)

    def release_decision(self) -> None:
        """Release the right to decide, once all marked rows are on disk or given up.

        If the store may hold rows that were given up, call `invalidate` first.
        """
        self._deciding.release()

    @contextlib.contextmanager
    def deciding(self, taken: Sequence[Rows], *, wait_s: float) -> Iterator[list[Rows]]:
        """Mark duplicates and hold the right to decide until the block ends.

        Inside the block, call `add_rows` for all rows that are then on disk.

        Raises:
            StoreUnavailableError: Another thread holds the right, or the store does not answer.
            InvalidCommandError: As `load_kind`.
        """
        if not any(rows.upload.dedupe_by for rows in taken):
            yield list(taken)
            return
        if not self.acquire_decision(wait_s):
            raise self.pending_error()
        try:
            yield self._mark_all(taken)
        finally:
            self.release_decision()

    def decide_groups(self, groups: Sequence[Group]) -> int:
        """Mark duplicates in groups that are not decided yet.

        The caller holds the right to decide. Two groups with a common key are never sent in the
        same append, because one of them might be lost. Returns how many groups, from the first one
        on, may be sent together. Raises as `load_kind`.
        """
        sent: dict[str, set[bytes]] = {one.dedupe_by: set() for one in groups if one.dedupe_by}
        for place, group in enumerate(groups):
            kind = group.dedupe_by
            if kind is not None and not group.decided:
                if not sent[kind].isdisjoint(keys_to_send(kind, group.rows)):
                    return place
                group.rows = self._mark_all(group.rows)
                group.decided = True
            for one in sent:
                sent[one] |= keys_to_send(one, group.rows)
        return len(groups)

    def pending_error(self) -> StoreUnavailableError:
        """Error for rows that may be duplicates of pending rows."""
        return StoreUnavailableError(
            f"rows that may be duplicates are pending for `{self._dataset}`, and its store has not "
            "answered; try again later",
            field="dedupe",
        )

    def add_rows(self, rows: Rows) -> None:
        """Index rows that are on disk, in the journal or the store. Never raises."""
        if rows.num_duplicates:
            self._telemetry.rows_deduplicated.add(rows.num_duplicates)
        try:
            self._index_rows(rows)
        except BaseException:
            self.invalidate()
            with contextlib.suppress(BaseException):
                text = "`%s`: rows cannot be indexed; its store is read again"
                log.exception(text, self._dataset)

    def invalidate(self) -> None:
        """Mark the index as stale, so that the store is read before the next decision.

        Called when it is unknown whether the store has certain rows.
        """
        with self._lock:
            for index in self._kinds.values():
                index.stale = index.invalidated = True

    def close(self) -> None:
        with self._lock:
            for index in self._kinds.values():
                index.clear()
            self._kinds.clear()

    def _index_rows(self, rows: Rows) -> None:
        with self._lock:
            kinds = [
                index.kind
                for index in self._kinds.values()
                if not index.stale or index.late is not None
            ]
        if not kinds:
            return
        batch = rows.load_batch()
        null_vectors = self._store.capabilities.null_vectors
        excluded = rows.places_not_stored(null_vectors=null_vectors)
        entries = {kind: stored_keys(kind, batch, excluded) for kind in kinds}
        with self._lock:
            for kind in kinds:
                index = self._kinds.get(kind)
                if index is None:  # closed
                    continue
                if index.late is not None:
                    index.late.append(entries[kind])
                elif not index.stale and not index.add_entries(entries[kind]):
                    log.warning("`%s`: no memory to index its rows", self._dataset)
                # The text of a replaced row is gone, unless another row has it, too. Only the store
                # can tell, so read it again.
                if kind == "text" and rows.upload.upsert:
                    index.stale = index.invalidated = True

    def _mark_all(self, taken: Sequence[Rows]) -> list[Rows]:
        """Mark duplicates in rows that are written together. Raises as `load_kind`."""
        passed: dict[str, dict[bytes, bytes]] = {}
        return [self._mark_duplicates(rows, passed) for rows in taken]

    def _mark_duplicates(self, rows: Rows, passed: dict[str, dict[bytes, bytes]]) -> Rows:
        """Exclude rows that duplicate an indexed row or a row in `passed`.

        Adds the keys of all other rows to `passed`.
        """
        kind = rows.upload.dedupe_by
        if kind is None:
            return rows
        excluded = {*rows.excluded, *rows.failed}  # a failed row may be sent again, repaired
        keys = row_keys(kind, rows.load_batch())
        indexed = self.find_duplicates(kind, keys)
        new = passed.setdefault(kind, {})
        num_duplicates = rows.num_duplicates
        for place, (key, value) in enumerate(keys):
            if place in excluded or key is None or value is None:
                continue
            if new.get(key) == value or (indexed[place] and key not in new):
                excluded.add(place)
                num_duplicates += 1
            else:
                new[key] = value
        rows.upload.note_duplicates(rows.first, num_duplicates)
        return dataclasses.replace(
            rows, excluded=tuple(sorted(excluded)), num_duplicates=num_duplicates
        )

    def _read_dataset(self, index: _KindIndex) -> None:
        # Read the journal before the store: groups that leave the journal meanwhile are then found
        # in the store.
        journaled: dict[bytes, bytes] = {}
        null_vectors = self._store.capabilities.null_vectors
        for group in self._journal.waiting_groups() if self._journal is not None else []:
            journaled.update(_journaled_keys(index.kind, group, null_vectors=null_vectors))
        columns = list(needed_columns(index.kind))
        schema = self._store.read_schema(self._dataset)
        if schema is not None:
            missing = [name for name in columns if name not in schema.names]
            if missing:
                raise InvalidCommandError(
                    f"dataset `{self._dataset}` has no column `{missing[0]}` to compare rows by; "
                    "leave `dedupe` and delta out",
                    field="dedupe",
                )
            compared = compared_columns(index.kind)
            columns += [name for name in compared if name in schema.names]
            with contextlib.suppress(UnknownDatasetError):  # no rows yet
                for batch in self._store.scan(self._dataset, columns=columns):
                    entries = stored_keys(index.kind, batch, ())
                    with self._lock:
                        self._fill(index, entries)
        with self._lock:
            for entries in [journaled, *(index.late or [])]:
                self._fill(index, entries)
            index.late, index.stale = None, index.invalidated
            if self._kinds.get(index.kind) is not index:  # closed
                index.clear()

    def _fill(self, index: _KindIndex, entries: Mapping[bytes, bytes]) -> None:
        if not index.add_entries(entries):
            raise InvalidCommandError(
                f"an index of dataset `{self._dataset}` takes more memory than the "
                f"{self._memory.max_bytes} bytes that this server has for it; raise "
                "`--max-memory`, or leave `dedupe` and delta out",
                field="dedupe",
            )


def _journaled_keys(kind: str, group: JournaledGroup, *, null_vectors: bool) -> dict[bytes, bytes]:
    sends_failed = null_vectors and not group.info.upsert
    excluded = (*group.info.excluded, *(() if sends_failed else group.info.failed))
    try:
        return stored_keys(kind, group.read_batch(), excluded)
    except FletcherError:
        if group.settled:  # its file was deleted a moment ago
            return {}
        raise
