"""One dataset's way into its store: groups of rows, one append at a time, retried until it is done.

A lane owns the dataset's only writer and the only thread that touches it. Rows of all uploads to
the dataset meet here, so that many small uploads still make few large commits. A group's extent,
and with it its `batch_key`, is fixed before it is first sent; when a send ends in doubt the store
is asked which keys it lacks, and only these go again. The store's breaker says whether to send at
all, the lane's pace how much at once.

Rows come from memory or from the journal. Those in memory are given up when the store stays away
too long, and their client is told; those in the journal wait for it, however long that takes.

Which rows in memory are duplicates is decided before they are first sent, in the lane's turn.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pyarrow as pa

from fletcher.config.delivery import DeliveryConfig
from fletcher.delivery.append_size import AppendSize
from fletcher.delivery.appender import Appender
from fletcher.delivery.backlog import Backlog
from fletcher.delivery.breaker import PASSING, Breaker
from fletcher.delivery.dedupe.decision import DedupeDecision
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.groups import Group, Rows
from fletcher.errors import FletcherError, InternalError, OverloadedError, StoreUnavailableError
from fletcher.stores.base import Store, WriteMode
from fletcher.telemetry.tracing import Telemetry

log = logging.getLogger(__name__)

_LINGER_S = 5.0
# How long the lane waits at once for the right to decide; an outbox has it for a sync or two.
_TURN_S = 0.2
# What is joined and encoded for an append is in memory up to four times, beside what the streams'
# allowances count; utf8 columns hold less than 2 GiB, too.
_COMMIT_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class _Opening:
    """Somebody waits for the dataset to be ready, or has given that up (`ready.cancelled`)."""

    schema: pa.Schema
    mode: WriteMode
    ready: Future[None] = field(default_factory=Future)
    asked: float = field(default_factory=time.monotonic)


class Committer:
    """A dataset's writer and its thread.

    Args:
        store: The store.
        dataset: The dataset's name.
        config: Groups and retries.
        breaker: The store's.
        telemetry: Where counts, durations and spans go.
        known: What the dataset holds.
        appender: The dataset's; the lane's thread alone uses it.
        on_idle: Asked when the lane has had nothing to do for a while; True lets it end.
    """

    def __init__(
        self,
        store: Store,
        dataset: str,
        config: DeliveryConfig,
        breaker: Breaker,
        telemetry: Telemetry,
        known: DedupeIndex,
        appender: Appender,
        on_idle: Callable[[], bool],
    ) -> None:
        self.store = store
        self.dataset = dataset
        self.pace = AppendSize(config.slow_append_s)
        self._config = config
        self._breaker = breaker
        self._telemetry = telemetry
        self._known = known
        self._appender = appender
        self._on_idle = on_idle
        self._changed = threading.Condition()
        self._backlog = Backlog()
        self._in_append = False
        self._hurried = False
        self._openings: deque[_Opening] = deque()
        self._closing = threading.Event()
        self._failing: tuple[float, FletcherError] | None = None  # since when, and why last
        self._was_away = False
        self._turn = DedupeDecision(known)
        breaker.watch(self._wake)
        self.thread = threading.Thread(target=self._run, name=f"lane-{dataset}", daemon=True)
        self.thread.start()

    def open(self, schema: pa.Schema, mode: WriteMode) -> Future[None]:
        """Makes the dataset ready for rows of `schema`; the future fails where it cannot be.

        Who waits no longer cancels it: then the dataset is not emptied later, unasked.
        """
        opening = _Opening(schema, mode)
        with self._changed:
            if self._closing.is_set():
                opening.ready.set_exception(_shutting_down())
            else:
                self._openings.append(opening)
                opening.ready.add_done_callback(lambda _: self._wake())
                self._changed.notify_all()
        return opening.ready

    def submit_rows(self, rows: Rows) -> None:
        """Queues rows; never blocks, the streams' allowances bound what can be here."""
        with self._changed:
            closing = self._closing.is_set()
            if not closing:
                self._backlog.put(rows)
                self._changed.notify_all()
        if closing:
            self._give_up([rows], _shutting_down())

    def flush(self) -> None:
        """Somebody waits for the rows that are here: don't wait for more."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def drop_failed(self) -> None:
        """Lets go of the rows of failed uploads: their clients were told, and send them again."""
        with self._changed:
            failed = self._backlog.remove(lambda rows: rows.dropped)
            if not self._in_append:
                self._turn.keep(self._backlog.sent)
            self._changed.notify_all()
        for rows in failed:
            rows.released()

    def close(self) -> None:
        """Ends the lane after its current append; what is queued, and what comes, is given up."""
        self._closing.set()
        self._wake()

    @property
    def idle(self) -> bool:
        """Nothing is queued or being stored."""
        with self._changed:
            return not self._backlog and not self._in_append

    def depth(self) -> int:
        """Rows that wait."""
        return self._backlog.num_rows

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while self._step():
            pass
        self.close()
        self._breaker.unwatch(self._wake)
        self._give_up(self._take_all(), _shutting_down())
        with self._changed:
            self._turn.keep(self._backlog.sent)
        self._appender.close()

    def _step(self) -> bool:
        """Does the next thing there is to do; False ends the thread."""
        with self._changed:
            # Not wait_for: what there is to wait for changes with what arrives.
            while (wait_s := self._wait_s()) > 0 and self._changed.wait(wait_s):
                pass
            if self._closing.is_set():
                return False
            opening = self._openings.popleft() if self._can_open() else None
            overdue, reason = self._take_overdue()
            groups = [] if opening or overdue or self._due_in_s() > 0 else self._take()
            self._in_append = bool(groups or overdue)
            more = bool(self._backlog)
            idle = not more and not self._in_append
        if opening is not None:
            self._open(opening)
        elif overdue:
            self._give_up(overdue, reason)
        elif groups:
            try:
                self._store(groups, full=more)
            except Exception:
                log.exception("`%s`: delivery failed", self.dataset)
                for rows in (rows for group in groups for rows in group.rows):
                    rows.upload.fail(InternalError("delivery failed; the log has more"))
        elif idle and self._on_idle():
            return False
        with self._changed:
            self._turn.keep(self._backlog.sent)
            self._in_append = False
            self._changed.notify_all()
        return True

    # What follows up to `_take_all` is called with the lock held.

    def _wait_s(self) -> float:
        """How long there is nothing to do."""
        if self._closing.is_set() or self._can_open():
            return 0.0
        return min(self._due_in_s(), self._overdue_in_s(), _LINGER_S)

    def _can_open(self) -> bool:
        """What was accepted before emptying was asked for goes there first, to be emptied with it.

        What came later goes before or after: waiting for it, too, might never end.
        """
        if not self._openings:
            return False
        first = self._openings[0]
        return (
            first.mode != "overwrite"
            or first.ready.cancelled()
            or not self._backlog.has_before(first.asked)
        )

    def _due_in_s(self) -> float:
        """Seconds until rows are to be sent; infinite where there are none."""
        if not self._backlog:
            self._hurried = False
            return math.inf
        rows, size = self.pace.limit(self._config.commit_rows), self.pace.limit(_COMMIT_BYTES)
        full = self._backlog.num_rows >= rows or self._backlog.num_bytes >= size
        if self._hurried or self._openings or full or self._backlog.again:
            return self._delay_s()
        filled = self._backlog.oldest + self._config.group_delay_s - time.monotonic()
        return max(filled, self._delay_s())

    def _delay_s(self) -> float:
        """What the store makes everybody wait, or this lane alone."""
        if self._breaker.away_since is not None:
            self._was_away = True
            return self._breaker.delay_s(self)
        if self._was_away:
            self._was_away = False
            self.pace.resume()
        return self.pace.delay_s()

    def _overdue_in_s(self) -> float:
        """Seconds until rows in memory are given up; infinite where they are not."""
        since, oldest = self._failing_since(), self._backlog.oldest_in_memory()
        if since is None or oldest is None:
            return math.inf
        return max(since, oldest) + self._config.store_retry_s - time.monotonic()

    def _take_overdue(self) -> tuple[list[Rows], FletcherError]:
        """Rows whose time is over, and why they are given up."""
        reason = self._failing[1] if self._failing else self._breaker.error(self)
        since = self._failing_since()
        # What may be tried right now is tried, though its time be over.
        if since is None or self._overdue_in_s() > 0 or self._delay_s() == 0:
            return [], reason
        latest = time.monotonic() - self._config.store_retry_s
        overdue = self._backlog.remove(lambda rows: max(since, rows.arrived) <= latest)
        if not self._backlog:
            # What comes next is tried afresh, for nothing would end the waiting but a try.
            self._failing = None
            self.pace.resume()
        return overdue, reason

    def _failing_since(self) -> float | None:
        """Since when the store has not taken rows: this lane's, or anybody's."""
        since = [self._breaker.away_since, self._failing[0] if self._failing else None]
        return min((one for one in since if one is not None), default=None)

    def _take(self) -> list[Group]:
        return self._backlog.take(
            max_rows=self.pace.limit(self._config.commit_rows),
            max_bytes=self.pace.limit(_COMMIT_BYTES),
            group_rows=self._config.group_rows,
        )

    def _take_all(self) -> list[Rows]:
        with self._changed:
            for opening in self._openings:
                if opening.ready.set_running_or_notify_cancel():
                    opening.ready.set_exception(_shutting_down())
            self._openings.clear()
            return self._backlog.clear()

    def _open(self, opening: _Opening) -> None:
        ready = opening.ready
        if not ready.set_running_or_notify_cancel():
            return
        try:
            self._breaker.check(self)
            with self._breaker.call(self, proof=False):
                self._appender.use(opening.schema, opening.mode)
        except FletcherError as error:
            ready.set_exception(error)
        except Exception:
            log.exception("cannot open `%s`", self.dataset)
            ready.set_exception(InternalError(f"`{self.dataset}` cannot be opened"))
        else:
            ready.set_result(None)

    def _store(self, groups: Sequence[Group], *, full: bool) -> None:
        started, taken = time.monotonic(), groups
        asking = not groups[0].rows[0].journaled and any(group.dedupe_by for group in groups)
        if asking:
            with self._changed:
                self._turn.keep((*self._backlog.sent, *groups))
            if not self._turn.take(_TURN_S):
                self._failed(groups, self._known.undecided(), started)
                return
        try:
            with self._breaker.call(self):
                groups = self._decide(taken) if asking else taken
                slow_down = self._appender.append(groups)
        except PASSING as error:
            self._telemetry.store_retries.add()
            self._appender.close()
            self._failed(groups, error, started)
            return
        except FletcherError as error:
            self._refused(groups, error)
        except Exception:
            log.exception("`%s`: the store failed", self.dataset)
            text = "storing failed in an unexpected way; the log has more"
            self._refused(groups, InternalError(text))
        else:
            self.pace.stored(
                time.monotonic() - started, full=full and groups is taken, slow_down=slow_down
            )
            self._settle(groups, None)
        self._failing = None

    def _decide(self, groups: Sequence[Group]) -> Sequence[Group]:
        going = self._turn.decide(groups)
        if len(going) < len(groups):
            with self._changed:
                self._backlog.put_back(groups[len(going) :])
        return going

    def _failed(self, groups: Sequence[Group], error: FletcherError, started: float) -> None:
        """The store may have taken the groups, or not: they go again when it is back."""
        # Once, and a store that never takes a full append says so once for all.
        news = self.pace.share == 1 or not isinstance(error, OverloadedError)
        if news and self._failing is None and self._breaker.away_since is None:
            log.warning("`%s`: %s; trying again", self.dataset, error)
        self._failing = (self._failing[0] if self._failing else started, error)
        for group in groups:
            group.doubtful = True
        with self._changed:
            self.pace.failed(time.monotonic() - started, error)
            self._backlog.put_back(groups)

    def _refused(self, groups: Sequence[Group], error: FletcherError) -> None:
        if len(groups) == 1:
            self._settle(groups, error)
            return
        # One of the uploads is at fault: find out which, the others go on. An error of an
        # unexpected kind may have come after rows were stored.
        for group in groups:
            group.doubtful = group.alone = True
        with self._changed:
            self._backlog.put_back(groups)

    def _settle(self, groups: Sequence[Group], error: FletcherError | None) -> None:
        null_vectors = error is None and self.store.capabilities.null_vectors
        for rows in (rows for group in groups for rows in group.rows):
            try:
                self._settle_rows(rows, error, null_vectors=null_vectors)
            except Exception:  # such as a full disk: these stay in the journal, the others go on
                log.exception(
                    "`%s`: rows %d-%d cannot be settled", self.dataset, rows.first, rows.last
                )
        if error is not None:
            self._known.doubt()
        else:
            self._turn.settled(groups)

    def _settle_rows(self, rows: Rows, error: FletcherError | None, *, null_vectors: bool) -> None:
        if error is not None:
            rows.upload.fail(error)
            rows.refused(error.message)
        else:
            stored = rows.num_rows - len(rows.left_out(null_vectors=null_vectors))
            self._telemetry.rows_stored.add(stored)
            if not rows.journaled:
                self._known.add(rows)
            rows.upload.settle_rows(rows.first, rows.last, stored=stored)
        rows.released()

    def _give_up(self, taken: Sequence[Rows], error: FletcherError) -> None:
        for rows in taken:
            if not rows.journaled:
                rows.upload.fail(error)
                rows.released()
                self._known.doubt()  # it may have been sent


def _shutting_down() -> StoreUnavailableError:
    return StoreUnavailableError("the server is shutting down")
