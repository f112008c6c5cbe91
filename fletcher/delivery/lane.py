"""One dataset's way into its store: groups of rows, one append at a time, retried until it is done.

A lane owns the dataset's only writer and the only thread that touches it. Rows of all uploads to
the dataset meet here, so that many small uploads still make few large commits. A group's extent,
and with it its `batch_key`, is fixed before it is first sent; when a send ends in doubt the store
is asked which keys it lacks, and only these go again.

Rows come from memory or from the journal. Those in memory are given up when the store stays away
too long, and their client is told; those in the journal wait for it, however long that takes.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import pyarrow as pa

from fletcher.delivery.known import Known
from fletcher.delivery.rows import (
    Rows,
    WriterKind,
    groups_of,
    key_of,
    keyed_batch,
    writer_kind,
)
from fletcher.errors import FletcherError, InternalError, StoreUnavailableError
from fletcher.stores.base import DatasetWriter, Store, WriteMode
from fletcher.telemetry import Telemetry

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 10.0
_LINGER_S = 5.0
# What is joined and encoded for an append is in memory up to four times, beside what the streams'
# allowances count; utf8 columns hold less than 2 GiB, too.
_COMMIT_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class DeliveryConfig:
    """How rows are grouped and how long a store may be away.

    Attributes:
        group_rows: Rows of one group at most.
        commit_rows: Rows of one append at most, over all groups in it.
        group_delay_s: What a row may wait for its group to fill.
        store_retry_s: How long an append is tried before its uploads get an error.
        max_known_bytes: Memory for what is known of all datasets' rows, to drop duplicates.
    """

    group_rows: int
    commit_rows: int
    group_delay_s: float
    store_retry_s: float
    max_known_bytes: int = 64 << 20


class Lane:
    """A dataset's writer and its thread.

    Args:
        store: The store.
        dataset: The dataset's name.
        config: Groups and retries.
        telemetry: Where counts, durations and spans go.
        known: What the dataset holds.
        on_idle: Asked when the lane has had no user for a while; True lets it end.
    """

    def __init__(
        self,
        store: Store,
        dataset: str,
        config: DeliveryConfig,
        telemetry: Telemetry,
        known: Known,
        on_idle: Callable[[Lane], bool],
    ) -> None:
        self.store = store
        self.dataset = dataset
        self.users = 0  # guarded by Delivery
        self._config = config
        self._telemetry = telemetry
        self._known = known
        self._on_idle = on_idle
        self._changed = threading.Condition()
        self._pending: deque[tuple[Rows, float]] = deque()
        self._num_pending_rows = 0
        self._in_append = False
        self._hurried = False
        self._openings: deque[tuple[pa.Schema, WriteMode, Future[None]]] = deque()
        self._closing = threading.Event()
        self._writer: DatasetWriter | None = None
        self._written: WriterKind | None = None  # what the writer was opened for
        self.thread = threading.Thread(target=self._run, name=f"lane-{dataset}", daemon=True)
        self.thread.start()

    def open(self, schema: pa.Schema, mode: WriteMode) -> Future[None]:
        """Makes the dataset ready for rows of `schema`; the future fails where it cannot be."""
        ready: Future[None] = Future()
        with self._changed:
            if self._closing.is_set():
                ready.set_exception(_shutting_down())
            else:
                self._openings.append((schema, mode, ready))
                self._changed.notify_all()
        return ready

    def put(self, rows: Rows) -> None:
        """Queues rows; never blocks, the streams' allowances bound what can be here."""
        with self._changed:
            closing = self._closing.is_set()
            if not closing:
                self._pending.append((rows, time.monotonic()))
                self._num_pending_rows += rows.num_rows
                self._changed.notify_all()
        if closing:
            self._give_up([rows], _shutting_down())

    def hurry(self) -> None:
        """Somebody waits for the rows that are here: don't wait for more."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def drop_failed(self) -> None:
        """Lets go of the rows of failed uploads: their clients were told, and send them again."""
        with self._changed:
            failed = [rows for rows, _ in self._pending if rows.dropped]
            if failed:
                self._pending = deque(
                    (rows, since) for rows, since in self._pending if not rows.dropped
                )
                self._num_pending_rows -= sum(rows.num_rows for rows in failed)
                self._changed.notify_all()
        for rows in failed:
            rows.released()

    def close(self) -> None:
        """Ends the lane after its current append; what is queued, and what comes, is given up."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Nothing is queued or being stored."""
        with self._changed:
            return not self._pending and not self._in_append

    def depth(self) -> int:
        """Rows that wait."""
        return self._num_pending_rows

    def _run(self) -> None:
        while self._step():
            pass
        self.close()
        self._give_up(self._take_all(), _shutting_down())
        self._close_writer()

    def _step(self) -> bool:
        """Does the next thing there is to do; False ends the thread."""
        with self._changed:
            # Not wait_for: what there is to wait for changes with what arrives.
            while not self._something_to_do() and self._changed.wait(self._patience()):
                pass
            if self._closing.is_set():
                return False
            opening = self._openings.popleft() if self._can_open() else None
            group = [] if opening or not self._due() else self._take()
            self._in_append = bool(group)
        if opening is not None:
            self._open(*opening)
        elif group:
            try:
                self._store(group)
            except Exception:
                log.exception("`%s`: delivery failed", self.dataset)
                for rows in group:
                    rows.upload.fail(InternalError("delivery failed; the log has more"))
        elif not self._pending and self._on_idle(self):
            return False
        with self._changed:
            self._in_append = False
            self._changed.notify_all()
        return True

    def _something_to_do(self) -> bool:
        return bool(self._closing.is_set() or self._can_open() or self._due())

    def _can_open(self) -> bool:
        """What was accepted before a dataset is emptied goes there first, to be emptied with it."""
        return bool(self._openings) and not (self._openings[0][1] == "overwrite" and self._pending)

    def _due(self) -> bool:
        if not self._pending:
            self._hurried = False
            return False
        age = time.monotonic() - self._pending[0][1]
        full = self._num_pending_rows >= self._config.commit_rows
        asked = self._hurried or bool(self._openings)
        return asked or full or age >= self._config.group_delay_s

    def _patience(self) -> float:
        if not self._pending:
            return _LINGER_S
        return max(0.0, self._pending[0][1] + self._config.group_delay_s - time.monotonic())

    def _take(self) -> list[Rows]:
        """The oldest rows that fit one append: of one kind, not too many."""
        taken: list[Rows] = []
        num_rows = num_bytes = 0
        kind = self._pending[0][0].kind
        while self._pending:
            rows = self._pending[0][0]
            num_rows += rows.num_rows
            num_bytes += rows.num_bytes
            too_many = num_rows > self._config.commit_rows or num_bytes > _COMMIT_BYTES
            if rows.kind != kind or (taken and too_many):
                break
            self._pending.popleft()
            self._num_pending_rows -= rows.num_rows
            if rows.dropped:
                rows.released()
                continue
            taken.append(rows)
        return taken

    def _take_all(self) -> list[Rows]:
        with self._changed:
            taken = [rows for rows, _ in self._pending]
            self._pending.clear()
            self._num_pending_rows = 0
            for _, _, ready in self._openings:
                ready.set_exception(_shutting_down())
            self._openings.clear()
        return taken

    def _open(self, schema: pa.Schema, mode: WriteMode, ready: Future[None]) -> None:
        try:
            self._use(schema, mode)
        except FletcherError as error:
            ready.set_exception(error)
        except Exception:
            log.exception("cannot open `%s`", self.dataset)
            ready.set_exception(InternalError(f"`{self.dataset}` cannot be opened"))
        else:
            ready.set_result(None)

    def _use(self, schema: pa.Schema, mode: WriteMode) -> DatasetWriter:
        wanted = writer_kind(schema, upsert=mode == "upsert")
        if self._writer is None or self._written != wanted or mode == "overwrite":
            self._close_writer()
            stored = schema.append(pa.field("batch_key", pa.utf8()))
            self._writer = self.store.open_writer(self.dataset, stored, mode)
            self._written = wanted
            if mode == "overwrite":
                self._known.doubt()
        return self._writer

    def _store(self, taken: Sequence[Rows]) -> None:
        if taken[0].journaled:  # decided then
            self._store_all(taken)
        else:
            with self._known.deciding(taken) as decided:
                self._store_all(decided)

    def _store_all(self, taken: Sequence[Rows]) -> None:
        groups = groups_of(taken, self._config.group_rows)
        error = self._append_all(groups) if groups else None
        if error is not None and len(groups) > 1 and not isinstance(error, StoreUnavailableError):
            # One of the uploads is at fault: find out which, the others go on. An error of an
            # unexpected kind may have come after rows were stored.
            for group in groups:
                self._settle([group], self._append_all([group], doubtful=True))
        elif groups:
            self._settle(groups, error)

    def _settle(self, groups: Sequence[list[Rows]], error: FletcherError | None) -> None:
        if isinstance(error, StoreUnavailableError) and groups[0][0].journaled:
            self._put_back([rows for group in groups for rows in group])
            return
        null_vectors = error is None and self.store.capabilities.null_vectors
        for rows in (rows for group in groups for rows in group):
            if error is not None:
                rows.upload.fail(error)
                rows.refused(error.message)
            else:
                stored = rows.num_rows - len(rows.left_out(null_vectors=null_vectors))
                self._telemetry.rows_stored.add(stored)
                if not rows.journaled:
                    self._known.add(rows)
                rows.upload.settle(rows.first, rows.last, stored=stored)
            rows.released()
        if error is not None:
            self._known.doubt()

    def _put_back(self, taken: Sequence[Rows]) -> None:
        """Rows of the journal wait in their place until the store is back."""
        now = time.monotonic()
        with self._changed:
            for rows in reversed(taken):
                self._pending.appendleft((dataclasses.replace(rows, doubtful=True), now))
                self._num_pending_rows += rows.num_rows

    def _give_up(self, taken: Sequence[Rows], error: FletcherError) -> None:
        for rows in taken:
            if not rows.journaled:
                rows.upload.fail(error)
                rows.released()

    def _append_all(
        self, groups: Sequence[list[Rows]], *, doubtful: bool = False
    ) -> FletcherError | None:
        """Stores the groups (those that are not there, where in doubt); None, or why it cannot."""
        keyed: dict[str, pa.RecordBatch] = {}
        (schema, _, upsert), _ = groups[0][0].kind
        doubtful = doubtful or any(rows.doubtful for group in groups for rows in group)
        deadline = time.monotonic() + self._config.store_retry_s
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                if not keyed:
                    nulls = self.store.capabilities.null_vectors
                    keyed = {key_of(one): keyed_batch(one, null_vectors=nulls) for one in groups}
                writer = self._use(schema, "upsert" if upsert else "append")
                keys = writer.missing_keys(list(keyed)) if doubtful else list(keyed)
                doubtful = True
                batches = [keyed[key] for key in keys if keyed[key].num_rows]
                num_rows = sum(batch.num_rows for batch in batches)
                with (
                    self._telemetry.stage_duration.time(stage="append"),
                    self._telemetry.span("append", rows=num_rows, groups=len(batches)),
                ):
                    if batches:
                        writer.append(batches)
            except StoreUnavailableError as error:
                if self._closing.is_set() or time.monotonic() + backoff_s > deadline:
                    return error
                self._telemetry.store_retries.add()
                log.warning("`%s`: %s; trying again", self.dataset, error)
                self._close_writer()
                # Full jitter: https://aws.amazon.com/builders-library (timeouts, retries, backoff).
                self._closing.wait(random.uniform(backoff_s / 2, backoff_s))  # noqa: S311
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            except FletcherError as error:
                return error
            except Exception:
                log.exception("`%s`: the store failed", self.dataset)
                return InternalError("storing failed in an unexpected way; the log has more")
            else:
                return None

    def _close_writer(self) -> None:
        writer, self._writer, self._written = self._writer, None, None
        if writer is not None:
            try:
                writer.close()
            except Exception:
                log.exception("closing `%s`", self.dataset)


def _shutting_down() -> StoreUnavailableError:
    return StoreUnavailableError("the server is shutting down")
