"""Group commit: one thread commits the rows of many upload calls to a dataset.

A commit takes 3 to 10 ms for any number of rows, and adds a fragment to the table. Therefore all
batches that arrive during a commit, from any call, are stored with the next commit.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc

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
from fletcher.stores.schemas import check_compatible, count_batch_keys, new_fields, num_group_rows
from fletcher.storeserver.key_ledger import KeyLedger
from fletcher.storeserver.stored_columns import as_stored
from fletcher.storeserver.submissions import SubmittedCall, SubmittedRows
from fletcher.util.closing import close_for_good
from fletcher.util.insist import insist
from fletcher.util.threads import start_thread

_log = logging.getLogger(__name__)

# Limit of the bytes that wait for a commit, per dataset. A call that sends more is blocked.
MAX_PENDING_BYTES = 64 << 20
MAX_COMMIT_ROWS = 65_536
# Minimum time between two commits, so that more rows share the second one. Once ENOUGH_ROWS wait,
# the second commit starts without delay.
LINGER_S = 0.02
ENOUGH_ROWS = 4096
# After this time without writes, a dataset is compacted and its writer closed.
IDLE_S = 30.0


class GroupCommitter:
    """One dataset's writer, its ledger of keys, and the thread that owns both.

    Raises:
        OverloadedError: The thread cannot start.
    """

    def __init__(self, store: LanceStore, dataset: str) -> None:
        self._store = store
        self._dataset = dataset
        self._writer: LanceWriter | None = None
        self._ledger = KeyLedger()
        self._queue: deque[SubmittedRows | SubmittedCall] = deque()
        self._pending_bytes = 0
        self._pending_rows = 0
        self._changed = threading.Condition()
        self._stopped = False
        self._last_commit = -LINGER_S
        self._thread = start_thread(f"commit-{dataset}", self._loop)

    @property
    def pressure(self) -> float:
        """Pending bytes as a share of `MAX_PENDING_BYTES`."""
        return self._pending_bytes / MAX_PENDING_BYTES

    def submit(
        self, item: SubmittedRows | SubmittedCall, is_cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """Queue rows or a call. Blocks while too many bytes are pending. Thread-safe.

        Raises:
            DrainingError: The committer was stopped.
            StoreUnavailableError: `is_cancelled` returned True.
        """
        with self._changed:
            self._changed.wait_for(
                # An item larger than the limit is accepted when nothing else is pending.
                lambda: (
                    self._stopped
                    or not self._pending_bytes
                    or self._pending_bytes + item.num_bytes <= MAX_PENDING_BYTES
                )
            )
            if self._stopped:
                raise draining()
            if is_cancelled():  # checked last, because the queue keeps the order from here on
                raise StoreUnavailableError("the client of these rows has given up")
            self._queue.append(item)
            self._pending_bytes += item.num_bytes
            self._pending_rows += item.num_rows
            self._changed.notify_all()

    def stop(self) -> None:
        """Refuse new items, and end the thread after the queued items. Thread-safe."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False after the timeout."""
        self._thread.join(max(timeout_s, 0))
        return not self._thread.is_alive()

    # The methods below are called on the commit thread only.

    def missing_keys(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that are not stored, in the same order."""
        self._open_existing()
        return [key for key in keys if not self._ledger.holds(key)]

    def stored_ranges(self, upload_id: str) -> list[tuple[int, int]]:
        """Offsets of an upload's stored rows: sorted, inclusive ranges (first, last)."""
        self._open_existing()
        return self._ledger.ranges(upload_id)

    def delete_rows(self, condition: str) -> int:
        """Delete rows by an SQL condition; return their number.

        The batch keys of deleted rows stay in the ledger, so that rows sent again are recognized as
        a repeat.
        """
        self._open_existing()
        return self._writer.delete_rows(condition) if self._writer else 0

    def delete_upload(self, upload_id: str) -> int:
        """Delete the rows of an upload, and forget its keys; return the number of rows."""
        self._open_existing()
        num_rows = self._writer.delete_upload(upload_id) if self._writer else 0
        self._ledger.forget_upload(upload_id)
        return num_rows

    def delete_dataset(self) -> None:
        """Delete the dataset."""
        self.close_writer()
        self._store.delete_dataset(self._dataset)

    def replace_dataset(self, staged: str) -> None:
        """Replace the dataset by a staged one, which must have no writer."""
        self.close_writer()
        self._store.replace_dataset(self._dataset, staged)

    def close_writer(self) -> None:
        """Close the writer. The next item that needs a writer opens another."""
        writer, self._writer = self._writer, None
        try:
            self._ledger = KeyLedger()
        finally:
            if writer is not None:
                close_for_good(writer.close, f"the writer of dataset {self._dataset}")

    def _loop(self) -> None:
        what = f"the commit thread of dataset {self._dataset}"
        while (items := insist(self._take_items, what)) is not None:
            try:
                self._carry_out(items)
            except BaseException as error:  # noqa: BLE001 - also a panic of LanceDB
                insist(functools.partial(_fail_items, items, error), what)
            with self._changed:
                self._pending_bytes -= sum(item.num_bytes for item in items)
                self._pending_rows -= sum(item.num_rows for item in items)
                self._changed.notify_all()
        insist(self._close_writer_logged, what)

    def _take_items(self) -> list[SubmittedRows | SubmittedCall] | None:
        """Wait for items; [] after some idle time, None at the end."""
        with self._changed:
            while not self._queue and not self._stopped:
                if not self._changed.wait(IDLE_S) and not self._queue:
                    break
            self._linger()
            items = self._next_items()
            for _ in items:
                self._queue.popleft()
            return items if items or not self._stopped else None

    def _carry_out(self, items: list[SubmittedRows | SubmittedCall]) -> None:
        if not items:
            self._close_writer_logged()
        elif isinstance(call := items[0], SubmittedCall):
            call.done.set_result(call.function(self))
        else:
            self._commit([item for item in items if isinstance(item, SubmittedRows)])

    def _linger(self) -> None:
        def is_enough() -> bool:
            urgent = bool(self._queue) and isinstance(self._queue[0], SubmittedCall)
            return urgent or self._pending_rows >= ENOUGH_ROWS or self._stopped

        left = self._last_commit + LINGER_S - time.monotonic()
        if self._queue and left > 0:
            self._changed.wait_for(is_enough, left)

    def _next_items(self) -> list[SubmittedRows | SubmittedCall]:
        """The next call, or as many queued rows of one mode as one commit may carry."""
        items: list[SubmittedRows | SubmittedCall] = []
        rows = 0
        for item in self._queue:
            if isinstance(item, SubmittedCall):
                return items or [item]
            first = items[0] if items else None
            if isinstance(first, SubmittedRows) and (
                item.mode != first.mode or rows + item.num_rows > MAX_COMMIT_ROWS
            ):
                break
            rows += item.num_rows
            items.append(item)
        return items

    def _close_writer_logged(self) -> None:
        close_for_good(self.close_writer, f"the writer of dataset {self._dataset}")

    def _commit(self, groups: list[SubmittedRows]) -> None:
        accepted: list[tuple[SubmittedRows, list[pa.RecordBatch]]] = []
        # Batch keys in this commit, so that a group that two calls send is stored only once.
        taken: set[str] = set()
        for group in groups:
            with _errors_to(group):
                self._prepare_writer(group)
                accepted.append((group, self._new_rows(group, taken)))
        with _errors_to(*(group for group, _ in accepted)):
            try:
                self._store_rows(accepted)
            except RequestError:
                # Some rows were refused. Commit each client's group separately to find out whose.
                for group, rows in accepted:
                    self._commit_alone(group, rows)
        self._last_commit = time.monotonic()

    def _commit_alone(self, group: SubmittedRows, rows: list[pa.RecordBatch]) -> None:
        """Commit a group by itself, after a commit with its `rows` was refused."""
        if not group.whole and group.mode != "upsert":
            for batch in rows:
                group.stream.subtract(count_batch_keys(batch))
        with _errors_to(group):
            self._open_existing()  # the commit of an earlier group may have closed the writer
            self._store_rows([(group, self._new_rows(group, set()))])

    def _store_rows(self, accepted: list[tuple[SubmittedRows, list[pa.RecordBatch]]]) -> None:
        batches = [batch for _, rows in accepted for batch in rows]
        if batches:
            assert self._writer is not None
            try:
                self._writer.write_rows(batches, upsert=accepted[0][0].mode == "upsert")
                for batch in batches:
                    for key in count_batch_keys(batch):
                        self._ledger.add_key(key)
            except RequestError:
                raise
            except BaseException:
                # The rows may be in the table despite the error, for example after a failed sync.
                # The next writer reads the stored keys from the table, and syncs the table's files.
                self._close_writer_logged()
                raise
        for group, rows in accepted:
            group.done.set_result(sum(batch.num_rows for batch in rows))

    def _prepare_writer(self, group: SubmittedRows) -> None:
        """Open a writer for the group if needed, and add new columns.

        The group's batches are converted to the dataset's types, or refused.
        """
        self._open_existing()
        if self._writer is None:
            self._open_writer(group.batches[0].schema, "append")
        assert self._writer is not None
        group.batches = [as_stored(batch, self._writer.schema) for batch in group.batches]
        schema = group.batches[0].schema
        check_compatible(self._dataset, self._writer.schema, schema)
        added = new_fields(self._writer.schema, schema)
        if added:
            self._writer.add_columns(added)

    def _open_writer(self, schema: pa.Schema, mode: WriteMode) -> None:
        self._writer = self._store.open_writer(self._dataset, schema, mode)
        self._ledger = KeyLedger(self._writer.stored_keys())

    def _open_existing(self) -> None:
        self._close_lost_writer()
        if self._writer is None:
            schema = self._store.read_schema(self._dataset)
            if schema is not None:
                self._open_writer(schema, "append")

    def _close_lost_writer(self) -> None:
        """Close the writer, and forget its keys, if its table was deleted."""
        if self._writer is not None and not self._writer.holds_table:
            self._close_writer_logged()

    def _new_rows(self, group: SubmittedRows, taken: set[str]) -> list[pa.RecordBatch]:
        """The group's rows without those whose key is stored or in `taken`.

        The keys of the remaining rows are added to `taken`. An upsert keeps all its rows: it may be
        repeated without harm, and its keys vanish when later rows replace its rows.
        """
        if group.mode == "upsert":
            return group.batches
        new = []
        begun: set[str] = set()
        for batch in group.batches:
            repeats = []
            for key, count in count_batch_keys(batch).items():
                if self._is_repeat(group, key, count, taken):
                    repeats.append(key)
                else:
                    begun.add(key)
                    if not group.whole:
                        group.stream[key] += count
            rows = batch
            if repeats:
                stored = pc.is_in(batch.column("batch_key"), pa.array(repeats, pa.utf8()))
                rows = batch.filter(pc.invert(stored))
            if rows.num_rows:
                new.append(rows)
        taken |= begun
        return new

    def _is_repeat(self, group: SubmittedRows, key: str, count: int, taken: set[str]) -> bool:
        begun = group.stream[key]
        if not begun:
            return key in taken or self._ledger.holds(key)
        # A client that announces no groups may have split a table into batches that share a key. A
        # batch is a repeat only if the key would get more rows with it than the key names.
        num_rows = num_group_rows(key)
        return 0 < num_rows < begun + count


def draining() -> DrainingError:
    """The error for rows that arrive while the server shuts down."""
    return DrainingError("the store is shutting down; send again later", retry_after_ms=1000)


@contextmanager
def _errors_to(*items: SubmittedRows | SubmittedCall) -> Iterator[None]:
    """Context that sets an error of its block as the result of unfinished `items`."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - also a panic of LanceDB
        _fail_items(items, error)


def _fail_items(items: Sequence[SubmittedRows | SubmittedCall], error: BaseException) -> None:
    """Set an error as the result of those items that have none."""
    failure = error
    if not isinstance(error, FletcherError):
        _log.error("a commit failed", exc_info=error)
        failure = InternalError("the store failed to store these rows; its log has the cause")
    for item in items:
        if not item.done.done():
            item.done.set_exception(failure)
