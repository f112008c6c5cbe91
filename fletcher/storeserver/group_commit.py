"""Group commits: many streams write to a dataset, one thread commits what has gathered.

A commit costs 3 to 10 ms however few rows it has, and leaves a fragment behind. So batches of all
streams that arrive while one commit runs make up the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.schema import parse_batch_key
from fletcher.errors import (
    DrainingError,
    FletcherError,
    InternalError,
    RequestError,
    StoreUnavailableError,
)
from fletcher.stores.base import WriteMode
from fletcher.stores.lance.store import LanceStore
from fletcher.stores.lance.writer import LanceWriter
from fletcher.stores.schemas import check_compatible, new_fields
from fletcher.storeserver.key_ledger import KeyLedger

_log = logging.getLogger(__name__)

# Rows that wait for their commit, per dataset; a stream that brings more blocks.
MAX_PENDING_BYTES = 64 << 20
MAX_COMMIT_ROWS = 65_536
# A commit this soon after another waits for company, unless enough has gathered already.
LINGER_S = 0.02
ENOUGH_ROWS = 4096
# A dataset that nobody wrote to for so long is compacted and let go.
IDLE_S = 30.0


@dataclass
class CommitStream:
    """What one upload call has stored so far under keys that it did not announce the size of."""

    rows: Counter[str] = field(default_factory=Counter)


@dataclass
class _Job:
    batches: list[pa.RecordBatch]
    mode: WriteMode
    whole: bool
    stream: CommitStream
    done: Future[int] = field(default_factory=Future)

    @property
    def num_rows(self) -> int:
        return sum(batch.num_rows for batch in self.batches)

    @property
    def num_bytes(self) -> int:
        return sum(batch.nbytes for batch in self.batches)


@dataclass
class _Call:
    run: Callable[[_GroupCommitter], Any]
    done: Future[Any] = field(default_factory=Future)


class Ingest:
    """The writing side of a store server. Thread-safe.

    Args:
        store: Where rows go; nobody else may write to it meanwhile.
    """

    def __init__(self, store: LanceStore) -> None:
        self._store = store
        self._mutex = threading.Lock()
        self._committers: dict[str, _GroupCommitter] = {}
        self._closed = False

    def submit(
        self,
        dataset: str,
        batches: Sequence[pa.RecordBatch],
        *,
        mode: WriteMode,
        whole: bool,
        stream: CommitStream,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Future[int]:
        """Hands rows over to be stored in one commit; blocks while too much is pending.

        Args:
            dataset: Created on first write.
            batches: Rows of one schema.
            mode: `overwrite` empties the dataset first.
            whole: The rows are all there is of their batch keys, so a known key is a repeat.
                Otherwise the same stream may bring more rows of a key it has begun.
            stream: The call they came by.
            given_up: Whether the client waits no longer. It may have sent these again, and others
                that replaced them: rows that replace, or empty the dataset, are then left out.

        Returns:
            The rows that were stored, repeats not counted, once they are on disk.

        Raises:
            DrainingError: The server is shutting down.
            StoreUnavailableError: The client waits no longer.
        """
        job = _Job(list(batches), mode, whole, stream)
        self._committer(dataset).put(job, given_up if mode != "append" else lambda: False)
        return job.done

    def call(self, dataset: str, run: Callable[[_GroupCommitter], Any]) -> Any:
        """Runs a function on the dataset's own thread, after what was submitted before."""
        call = _Call(run)
        self._committer(dataset).put(call)
        return call.done.result()

    def pressure(self, dataset: str) -> float:
        """How full the dataset's queue is, 0 to 1 and over."""
        with self._mutex:
            committer = self._committers.get(dataset)
        return committer.pressure if committer else 0.0

    def close(self, timeout_s: float) -> bool:
        """Refuses new rows, commits those that were handed over; False if that took too long."""
        with self._mutex:
            self._closed = True
            committers = list(self._committers.values())
        for committer in committers:
            committer.stop()
        deadline = time.monotonic() + timeout_s
        ended = [committer.join(deadline - time.monotonic()) for committer in committers]
        return all(ended)

    def _committer(self, dataset: str) -> _GroupCommitter:
        with self._mutex:
            if self._closed:
                raise _draining()
            if dataset not in self._committers:
                self._committers[dataset] = _GroupCommitter(self._store, dataset)
            return self._committers[dataset]


class _GroupCommitter:
    """One dataset's writer, its ledger of keys, and the thread that owns both."""

    def __init__(self, store: LanceStore, dataset: str) -> None:
        self._store = store
        self._dataset = dataset
        self._writer: LanceWriter | None = None
        self._ledger = KeyLedger()
        self._queue: deque[_Job | _Call] = deque()
        self._pending_bytes = 0
        self._pending_rows = 0
        self._changed = threading.Condition()
        self._stopped = False
        self._last_commit = -LINGER_S
        self._thread = threading.Thread(target=self._loop, name=f"commit-{dataset}", daemon=True)
        self._thread.start()

    @property
    def pressure(self) -> float:
        return self._pending_bytes / MAX_PENDING_BYTES

    def put(self, item: _Job | _Call, given_up: Callable[[], bool] = lambda: False) -> None:
        size = item.num_bytes if isinstance(item, _Job) else 0
        with self._changed:
            self._changed.wait_for(
                # One that is larger than the bound goes alone.
                lambda: (
                    self._stopped
                    or not self._pending_bytes
                    or self._pending_bytes + size <= MAX_PENDING_BYTES
                )
            )
            if self._stopped:
                raise _draining()
            if given_up():  # asked here: from now on all goes in its order
                raise StoreUnavailableError("the client of these rows waits no longer")
            self._queue.append(item)
            self._pending_bytes += size
            self._pending_rows += item.num_rows if isinstance(item, _Job) else 0
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        self._thread.join(max(timeout_s, 0))
        return not self._thread.is_alive()

    # Everything below runs on the committer's own thread.

    def missing_keys(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that are not stored."""
        self._open_existing()
        return [key for key in keys if not self._ledger.holds(key)]

    def stored_ranges(self, upload_id: str) -> list[tuple[int, int]]:
        """Row offsets of an upload that are stored."""
        self._open_existing()
        return self._ledger.ranges(upload_id)

    def delete_rows(self, condition: str) -> int:
        """Removes rows by an SQL condition; their keys stay known, so repeats stay repeats."""
        self._open_existing()
        return self._writer.delete(condition) if self._writer else 0

    def delete_dataset(self) -> None:
        """Removes the dataset."""
        self.let_go()
        self._store.delete_dataset(self._dataset)

    def let_go(self) -> None:
        """Closes the writer; the next row opens another."""
        writer, self._writer = self._writer, None
        self._ledger = KeyLedger()
        if writer is not None:
            writer.close()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stopped:
                    if not self._changed.wait(IDLE_S) and not self._queue:
                        break
                self._linger()
                items = self._take()
                if not items and self._stopped:
                    break
            if not items:
                self._guard(self.let_go)
            elif isinstance(items[0], _Call):
                self._run(items[0])
            else:
                self._commit([item for item in items if isinstance(item, _Job)])
            with self._changed:
                for item in items:
                    if isinstance(item, _Job):
                        self._pending_bytes -= item.num_bytes
                        self._pending_rows -= item.num_rows
                self._changed.notify_all()
        self._guard(self.let_go)

    def _linger(self) -> None:
        def enough() -> bool:
            first = self._queue[0] if self._queue else None
            return isinstance(first, _Call) or self._pending_rows >= ENOUGH_ROWS or self._stopped

        left = self._last_commit + LINGER_S - time.monotonic()
        if self._queue and left > 0:
            self._changed.wait_for(enough, left)

    def _take(self) -> list[_Job | _Call]:
        """The next call, or as many jobs of one mode as make a good commit."""
        items: list[_Job | _Call] = []
        rows = 0
        while self._queue:
            item = self._queue[0]
            if isinstance(item, _Call):
                return items or [self._queue.popleft()]
            first = items[0] if items else None
            if isinstance(first, _Job) and (
                item.mode != first.mode
                or item.mode == "overwrite"
                or rows + item.num_rows > MAX_COMMIT_ROWS
            ):
                break
            rows += item.num_rows
            items.append(self._queue.popleft())
        return items

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception:  # noqa: BLE001 - the thread goes on
            _log.exception("dataset %s could not be let go", self._dataset)

    def _run(self, call: _Call) -> None:
        try:
            call.done.set_result(call.run(self))
        except Exception as error:  # noqa: BLE001 - it belongs to the caller
            call.done.set_exception(_ours(error))

    def _commit(self, jobs: list[_Job]) -> None:
        accepted: list[tuple[_Job, list[pa.RecordBatch]]] = []
        # Keys of this commit, so that two streams which send the same group store it once.
        taken: set[str] = set()
        for job in jobs:
            try:
                self._prepare(job)
                accepted.append((job, self._unknown_rows(job, taken)))
            except Exception as error:  # noqa: BLE001 - one client's, not its neighbours'
                job.done.set_exception(_ours(error))
        try:
            self._store_rows(accepted)
        except RequestError:
            # Somebody's rows are refused: find whose, so that the others are not.
            for job, rows in accepted:
                counted = not job.whole and job.mode != "upsert"
                for batch in rows if counted else ():
                    job.stream.rows.subtract(_keys(batch))
                self._commit_alone(job)
        except Exception as error:  # noqa: BLE001 - theirs, and the thread goes on
            for job, _ in accepted:
                job.done.set_exception(_ours(error))
        self._last_commit = time.monotonic()

    def _commit_alone(self, job: _Job) -> None:
        try:
            self._open_existing()  # the job before may have lost the writer
            self._store_rows([(job, self._unknown_rows(job, set()))])
        except Exception as error:  # noqa: BLE001
            job.done.set_exception(_ours(error))

    def _store_rows(self, accepted: list[tuple[_Job, list[pa.RecordBatch]]]) -> None:
        batches = [batch for _, rows in accepted for batch in rows]
        if batches:
            assert self._writer is not None
            try:
                self._writer.write(batches, upsert=accepted[0][0].mode == "upsert")
            except RequestError:
                raise
            except Exception:
                # The rows may be in the table all the same (only the sync failed, say). The next
                # writer reads there which keys it has, and syncs what it finds.
                self._guard(self.let_go)
                raise
            for batch in batches:
                for key in _keys(batch):
                    self._ledger.add(key)
        for job, rows in accepted:
            job.done.set_result(sum(batch.num_rows for batch in rows))

    def _prepare(self, job: _Job) -> None:
        """Opens the writer for the job's schema, or checks the schema against the open one's."""
        schema = job.batches[0].schema
        if job.mode == "overwrite":
            self.let_go()
            self._open(schema, "overwrite")
        elif self._writer is None:
            self._open(schema, "append")
        assert self._writer is not None
        check_compatible(self._dataset, self._writer.schema, schema)
        added = new_fields(self._writer.schema, schema)
        if added:
            self._writer.add_columns(added)

    def _open(self, schema: pa.Schema, mode: WriteMode) -> None:
        self._writer = self._store.open_writer(self._dataset, schema, mode)
        self._ledger = KeyLedger(self._writer.stored_keys())

    def _open_existing(self) -> None:
        if self._writer is None:
            info = self._store.dataset(self._dataset)
            if info is not None:
                self._open(info.schema, "append")

    def _unknown_rows(self, job: _Job, taken: set[str]) -> list[pa.RecordBatch]:
        """The job's rows without those whose key was stored before; `taken` gets their keys.

        An upsert is idempotent by itself, and its keys vanish with the rows it replaces.
        """
        if job.mode == "upsert":
            return job.batches
        fresh = []
        begun: set[str] = set()
        for batch in job.batches:
            repeats = []
            for key, count in _keys(batch).items():
                if self._repeat(job, key, count, taken):
                    repeats.append(key)
                else:
                    begun.add(key)
                    if not job.whole:
                        job.stream.rows[key] += count
            rows = batch
            if repeats:
                known = pc.is_in(batch.column("batch_key"), pa.array(repeats, pa.utf8()))
                rows = batch.filter(pc.invert(known))
            if rows.num_rows:
                fresh.append(rows)
        taken |= begun
        return fresh

    def _repeat(self, job: _Job, key: str, count: int, taken: set[str]) -> bool:
        begun = job.stream.rows[key]
        if not begun:
            return key in taken or self._ledger.holds(key)
        # A plain client sliced a table, so a key goes on: until all its rows are there.
        parsed = parse_batch_key(key)
        return parsed is not None and begun + count > parsed[2] - parsed[1] + 1


def _keys(batch: pa.RecordBatch) -> dict[str, int]:
    """The batch's keys and how many rows have each."""
    if "batch_key" not in batch.schema.names:
        return {}
    counts = batch.column("batch_key").drop_null().value_counts()
    keys = counts.field("values").to_pylist()
    return dict(zip(keys, np.asarray(counts.field("counts")).tolist(), strict=True))


def _draining() -> DrainingError:
    return DrainingError("the store is shutting down; send again later", retry_after_ms=1000)


def _ours(error: Exception) -> FletcherError:
    if isinstance(error, FletcherError):
        return error
    _log.error("a commit failed", exc_info=error)
    return InternalError("the store failed to keep these rows; its log says why")
