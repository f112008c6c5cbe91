"""Index of a dataset's ids and text hashes, for `dedupe` and `mode=delta`.

A row is indexed when it is on the disk of the store or the journal, so that its duplicates can be
dropped and acknowledged. Duplicates are marked just before rows are journaled, or stored if they
are not journaled, by the thread that holds the right to decide. It holds that right until the rows
are on a disk or given up: of two equal rows that are pending at once, only one may pass. Rows whose
duplicates are indexed when they come in need not even be embedded (`DedupePrefilter`).

`id` and `text` drop rows whose id or text is indexed, `delta` those whose id is indexed with that
text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence

from fletcher.delivery.dedupe.fingerprints import (
    COLUMNS,
    FingerprintMap,
    RowKey,
    keys_to_send,
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
    """Memory limit of the dedupe indexes of all datasets together. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()

    def add_bytes(self, num_bytes: int) -> bool:
        """Count more or (negative) fewer bytes; False, and no change, beyond the limit."""
        with self._lock:
            if num_bytes > 0 and self.used_bytes + num_bytes > self.max_bytes:
                return False
            self.used_bytes += num_bytes
            return True


class _KindIndex:
    """Indexed rows by one kind of key; guarded by the lock of `DedupeIndex`.

    Attributes:
        stale: The content is incomplete or unsure: the store must be read again.
        invalidated: It became stale while it was being read.
        late: Entries that came while it was being read; None: it is not being read.
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
        """False if there is no memory for them; the index is empty and stale then."""
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
    """One dataset's index, empty until the first upload that needs it. Thread-safe."""

    def __init__(
        self, destination: Destination, journal: Journal | None, memory: DedupeMemory
    ) -> None:
        self._store = destination.store
        self._dataset = destination.dataset
        self._telemetry = destination.telemetry
        self._journal = journal
        self._memory = memory
        self._kinds: dict[str, _KindIndex] = {}
        # Acquired in this order. The store is asked under the first two only.
        self._deciding = threading.Lock()
        self._reading = threading.Lock()
        self._lock = threading.Lock()

    def load_kind(self, kind: str) -> _KindIndex:
        """Index the store and the journal by a kind of key, unless that is done.

        Raises:
            InvalidCommandError: The dataset lacks a column, or needs too much memory.
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

    def find_duplicates(self, kind: str, keys: Sequence[RowKey]) -> list[bool]:
        """Whether each row is indexed. Raises as `load_kind`."""
        values = self._find_values(kind, [key for key, _ in keys])
        return [
            value is not None and value == indexed
            for (_, value), indexed in zip(keys, values, strict=True)
        ]

    def acquire_decision(self, wait_s: float) -> bool:
        """Acquire the right to decide; False if another thread holds it for so long."""
        return self._deciding.acquire(timeout=wait_s)

    def release_decision(self) -> None:
        """Release the right, once all marked rows are on a disk, or given up.

        If the store may hold rows that were given up, call `invalidate` before.
        """
        self._deciding.release()

    @contextlib.contextmanager
    def deciding(self, taken: Sequence[Rows], *, wait_s: float) -> Iterator[list[Rows]]:
        """Mark duplicates and hold the right to decide until the block ends.

        The block calls `add_rows` for what it brought to a disk.

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

        The caller holds the right to decide. Groups with a key in common never share an append,
        because one of them might be lost.

        Returns:
            Number of groups, from the first one on, that may be sent together.

        Raises as `load_kind`.
        """
        sent: dict[str, set[bytes]] = {
            group.dedupe_by: set() for group in groups if group.dedupe_by is not None
        }
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
        """Index rows that are on the disk of the journal or the store. Never raises."""
        if rows.num_duplicates:
            self._telemetry.rows_deduplicated.add(rows.num_duplicates)
        try:
            self._index_rows(rows)
        except Exception:
            log.exception("`%s`: rows cannot be indexed; its store is read again", self._dataset)
            self.invalidate()

    def invalidate(self) -> None:
        """Have the store read again before the next decision.

        Called when it is unknown whether the store holds certain rows.
        """
        with self._lock:
            for index in self._kinds.values():
                index.stale = index.invalidated = True

    def close(self) -> None:
        """Release all memory."""
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
                # A replaced row's text is gone, and only the store knows whether others have it.
                if kind == "text" and rows.upload.upsert:
                    index.stale = index.invalidated = True

    def _mark_all(self, taken: Sequence[Rows]) -> list[Rows]:
        """Mark duplicates in rows that reach a disk together; raises as `load_kind`."""
        passed: dict[str, dict[bytes, bytes]] = {}
        return [self._mark_duplicates(rows, passed) for rows in taken]

    def _mark_duplicates(self, rows: Rows, passed: dict[str, dict[bytes, bytes]]) -> Rows:
        """Exclude rows that are indexed or in `passed`; add the others to `passed`."""
        kind = rows.upload.dedupe_by
        if kind is None:
            return rows
        excluded = {*rows.excluded, *rows.failed}  # a failed row may come again, repaired
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

    def _find_values(self, kind: str, keys: Sequence[bytes | None]) -> list[bytes | None]:
        while True:
            index = self.load_kind(kind)
            with self._lock:
                if not index.stale:  # it may have become so just now
                    return index.map.find_values(keys)

    def _read_dataset(self, index: _KindIndex) -> None:
        # The journal first: groups that leave it meanwhile are in the store.
        journaled: dict[bytes, bytes] = {}
        null_vectors = self._store.capabilities.null_vectors
        for group in self._journal.waiting_groups() if self._journal is not None else []:
            journaled.update(_journaled_keys(index.kind, group, null_vectors=null_vectors))
        columns = COLUMNS[index.kind]
        info = self._store.dataset(self._dataset)
        if info is not None:
            missing = [name for name in columns if name not in info.schema.names]
            if missing:
                raise InvalidCommandError(
                    f"dataset `{self._dataset}` has no column `{missing[0]}` to compare rows by; "
                    "leave `dedupe` and delta out",
                    field="dedupe",
                )
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
    excluded = (*group.info.excluded, *(() if null_vectors else group.info.failed))
    try:
        return stored_keys(kind, group.read_batch(), excluded)
    except FletcherError:
        if group.settled:  # and its file deleted, just now
            return {}
        raise
