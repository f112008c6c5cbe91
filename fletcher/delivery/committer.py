"""The only thread that appends a dataset's groups to its store, with retry.

A committer owns the dataset's only writer. It appends the rows of all uploads to the dataset, so
that many small uploads make few large commits. Before a group is first sent, its first and last row
and therefore its `batch_key` are fixed. If an append ends without an answer, the committer asks the
store which keys are missing, and sends only the groups with these keys again.

Some stores may lose rows for a while after they acknowledged them. Such rows are confirmed later,
while the next rows are sent. Rows that cannot be confirmed are in doubt.

A group is refused for good only if the store said so, by a RequestError of `append` or
`open_writer`. An error of any other kind, also an unexpected one, leaves the group in doubt.

Rows come from memory or from the journal. If the store stays unavailable, rows in memory are given
up and their upload fails. Journaled rows wait without limit.

Rows in memory are checked for duplicates before they are first sent. From then until these rows are
settled, the committer holds the right to decide, so that no other thread compares rows with them
while it is unknown whether they will be stored.

`CommitQueue` chooses an action under the committer's lock. The committer carries it out without the
lock.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from fletcher.config.delivery import DeliveryConfig
from fletcher.delivery import actions
from fletcher.delivery.append_size import AppendSize
from fletcher.delivery.breaker import RETRYABLE
from fletcher.delivery.commit_queue import Action, CommitQueue, Outcome
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.group_sender import GroupSender
from fletcher.delivery.groups import Destination, Group, Rows, SentGroups
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.timing import DeliveryTiming
from fletcher.errors import FletcherError, OverloadedError, RequestError
from fletcher.stores.base import WriteMode
from fletcher.util.insist import insist
from fletcher.util.threads import start_thread

log = logging.getLogger(__name__)


class Committer:
    """A dataset's writer and its thread. Thread-safe.

    Args:
        journal: The dataset's journal. If it is None, rows stay in memory until they are stored.
        on_idle: Called on the committer's thread after some idle time. The thread ends if it
            returns True.

    Raises:
        OverloadedError: The thread cannot start.
    """

    def __init__(
        self,
        destination: Destination,
        config: DeliveryConfig,
        timing: DeliveryTiming,
        dedupe_index: DedupeIndex,
        journal: Journal | None,
        on_idle: Callable[[], bool],
    ) -> None:
        self.destination = destination
        self.append_size = AppendSize(config.slow_append_s, timing.retry)
        self._timing = timing
        self._dedupe_index = dedupe_index
        self._sender = GroupSender(destination, dedupe_index, journal)
        self._on_idle = on_idle
        self._changed = threading.Condition()
        self._queue = CommitQueue(
            config,
            destination.dataset,
            destination.breaker,
            self.append_size,
            timing.committer_linger_s,
        )
        # Used on the committer's thread only:
        self._may_decide = False  # whether it holds the right to decide which rows are duplicates
        destination.breaker.add_listener(self._wake)
        try:
            self.thread = start_thread(f"committer-{destination.dataset}", self._run)
        except BaseException:
            destination.breaker.remove_listener(self._wake)
            raise

    def request_opening(self, schema: pa.Schema, mode: WriteMode) -> Future[None]:
        """Request that the dataset is prepared for rows of `schema`.

        The returned future ends when the dataset is ready, or with the error. A caller that stops
        waiting must cancel the future.
        """
        return self._request(actions.Opening(schema, mode))

    def request_replacement(self, staged: actions.Staged) -> Future[None]:
        """Request that a staged dataset replaces the dataset.

        Rows that arrived before are stored first, and replaced. The returned future ends when the
        dataset is replaced, or with the error.
        """
        return self._request(actions.Opening(staged=staged))

    def request_deletion(self, upload_id: str) -> Future[int]:
        """Request that the rows of an upload are deleted.

        The returned future ends with the number of deleted rows, or with the error.
        """
        return self._request(actions.Opening(former=upload_id))

    def _request(self, opening: actions.Opening) -> Future[Any]:
        with self._changed:
            if self._queue.stopped:
                opening.ready.set_exception(actions.shutting_down())
            else:
                self._queue.request_opening(opening)
                opening.ready.add_done_callback(lambda _: self._wake())
                self._changed.notify_all()
        return opening.ready

    def submit_rows(self, rows: Rows) -> None:
        with self._changed:
            stopped = self._queue.stopped
            if not stopped:
                self._queue.waiting.append_rows(rows)
                self._changed.notify_all()
        if stopped:
            self._give_up([rows], actions.shutting_down())

    def flush(self) -> None:
        with self._changed:
            self._queue.request_flush()
            self._changed.notify_all()

    def drop_abandoned(self) -> None:
        """Release the rows of failed uploads, which clients send again."""
        with self._changed:
            abandoned, in_doubt = self._queue.remove_abandoned()
            if in_doubt:  # must precede the release of the right to decide on the other thread
                self._dedupe_index.invalidate()
            self._changed.notify_all()
        for rows in abandoned:
            rows.on_released()

    def close(self) -> None:
        """End the thread after its current action; give up waiting and later rows."""
        with self._changed:
            self._queue.stopped = True
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._queue.idle

    @property
    def num_waiting_rows(self) -> int:
        return self._queue.waiting.num_rows

    def close_writer(self) -> None:
        """Close the dataset's writer. Called on the committer's thread only."""
        self._sender.close_writer()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # The methods below are called on the committer's thread only.

    def _run(self) -> None:
        what = f"`{self.destination.dataset}`: the committer"
        while not isinstance(action := insist(self._next_action, what), actions.Stop):
            try:
                outcome = self._carry_out(action)
            except BaseException:
                with contextlib.suppress(BaseException):
                    log.exception("%s failed", what)
                outcome = insist(functools.partial(self._fail, action), what)
            insist(functools.partial(self._note_outcome, action, outcome), what)
        for step in (
            functools.partial(self.destination.breaker.remove_listener, self._wake),
            functools.partial(self._refuse_openings, action.openings),
            functools.partial(self._give_up, action.rows, actions.shutting_down()),
            self._dedupe_index.invalidate,
            self._release_decision,
            self._sender.close_writer,
        ):
            insist(step, what)

    def _refuse_openings(self, openings: Sequence[actions.Opening]) -> None:
        for opening in openings:
            if not opening.ready.done():
                opening.ready.set_exception(actions.shutting_down())

    def _note_outcome(self, action: Action, outcome: Outcome) -> None:
        with self._changed:
            self._queue.note_outcome(action, outcome, time.monotonic())
            self._changed.notify_all()

    def _next_action(self) -> Action:
        with self._changed:
            while True:
                if self._may_decide and not self._queue.has_decided_groups:
                    self._release_decision()
                action = self._queue.decide(time.monotonic())
                if not isinstance(action, actions.Wait):
                    return action
                self._changed.wait(action.until - time.monotonic())

    def _release_decision(self) -> None:
        if self._may_decide:
            self._dedupe_index.release_decision()
            self._may_decide = False

    def _carry_out(self, action: Action) -> Outcome:
        """The outcome of an action."""
        match action:
            case actions.Open(opening):
                self._open(opening)
            case actions.Append(groups):
                return self._append(groups)
            case actions.Settle(groups, error, sent):
                if sent is not None and (failure := self._confirm(sent)) is not None:
                    return failure
                unsettled = self._settle_groups(groups, error)
                if sent is None:
                    self._dedupe_index.invalidate()
                return unsettled
            case actions.GiveUp(rows, error, in_doubt):
                if in_doubt:
                    self._dedupe_index.invalidate()
                self._give_up(rows, error)
            case actions.Release(rows, in_doubt):
                if in_doubt:
                    self._dedupe_index.invalidate()
                for one in rows:
                    insist(one.on_released, f"`{self.destination.dataset}`: releasing rows")
            case actions.Rest():
                return self._rest()
        return None

    def _fail(self, action: Action) -> Outcome:
        """The outcome of an action that raised an error, perhaps after its work was done."""
        match action:
            case actions.Open(opening):
                if not opening.ready.done():
                    opening.ready.set_exception(actions.unexpected_failure())
            case actions.Append(groups) | actions.Settle(groups, sent=SentGroups()):
                return actions.Failed(len(groups), 0.0, actions.unexpected_failure())
            case actions.Settle(groups):
                return groups
            case actions.GiveUp() | actions.Release():
                return self._carry_out(action)
        return None

    def _rest(self) -> bool:
        try:
            return self._on_idle()
        except BaseException:
            log.exception("`%s`: its threads cannot end", self.destination.dataset)
            return False

    def _open(self, opening: actions.Opening) -> None:
        ready, breaker, dataset = opening.ready, self.destination.breaker, self.destination.dataset
        if not ready.set_running_or_notify_cancel():
            return
        try:
            breaker.require_ready(dataset)
            num_rows = None
            with breaker.guard_call(dataset, proof=False):
                if opening.former is not None:
                    num_rows = self._sender.delete_upload(opening.former)
                elif opening.staged is not None:
                    self._sender.replace_dataset(opening.staged)
                elif opening.schema is not None:
                    self._sender.open_writer(opening.schema, opening.mode)
        except FletcherError as error:
            ready.set_exception(error)
        except BaseException:
            log.exception("cannot open `%s`", dataset)
            ready.set_exception(actions.unexpected_failure())
        else:
            ready.set_result(num_rows)

    def _append(self, groups: Sequence[Group]) -> Outcome:
        """Mark duplicates in uploads with `dedupe`, and send the groups that may be sent."""
        started = time.monotonic()
        num_groups = len(groups)
        try:
            decides = not groups[0].rows[0].journaled and any(group.dedupe_by for group in groups)
            if decides and not self._may_decide:
                self._may_decide = self._dedupe_index.acquire_decision(self._timing.decision_wait_s)
                if not self._may_decide:
                    error = self._dedupe_index.pending_error()
                    return actions.Unavailable(0, time.monotonic() - started, error)
            with self.destination.breaker.guard_call(self.destination.dataset):
                if decides:
                    num_groups = self._dedupe_index.decide_groups(groups)
                sent = self._sender.append_groups(groups[:num_groups])
            return actions.Acknowledged(sent, time.monotonic() - started)
        except RequestError as error:
            return actions.Refused(num_groups, error)
        except BaseException as error:  # noqa: BLE001 - logged by `_failure`
            return self._failure(error, num_groups, time.monotonic() - started)

    def _confirm(self, sent: SentGroups) -> actions.Unavailable | actions.Failed | None:
        """Wait until the store cannot lose groups any more. Returns what failed."""
        try:
            with self.destination.breaker.guard_call(self.destination.dataset):
                self._sender.confirm_groups(sent)
        except BaseException as error:  # noqa: BLE001 - logged by `_failure`
            return self._failure(error, len(sent.groups), 0.0)
        return None

    def _failure(
        self, error: BaseException, num_groups: int, seconds: float
    ) -> actions.Unavailable | actions.Failed:
        self._sender.close_writer()
        if isinstance(error, RETRYABLE):
            self._note_retry(error)
            return actions.Unavailable(num_groups, seconds, error)
        dataset = self.destination.dataset
        log.error("`%s`: rows cannot be stored; trying again", dataset, exc_info=error)
        return actions.Failed(num_groups, seconds, actions.unexpected_failure())

    def _note_retry(self, error: FletcherError) -> None:
        self.destination.telemetry.store_retries.add()
        # Log only the first failure in a row. Log a refusal as too much only if the append had full
        # size, because a store with a low limit refuses again and again.
        news = self.append_size.share == 1 or not isinstance(error, OverloadedError)
        available = self.destination.breaker.held_since(self.destination.dataset) is None
        if news and available and self._queue.failing is None:
            log.warning("`%s`: %s; trying again", self.destination.dataset, error)

    def _settle_groups(self, groups: Sequence[Group], error: RequestError | None) -> list[Group]:
        """Settle groups, and return those that could not be settled."""
        unsettled: list[Group] = []
        for group in groups:
            try:
                null_vectors = error is None and self.destination.store.capabilities.null_vectors
                for rows in group.rows[group.num_settled :]:
                    self._settle_rows(rows, error, null_vectors=null_vectors)
                    group.num_settled += 1
            except BaseException:  # such as a full disk; these rows stay in the journal
                text = "`%s`: rows %d-%d cannot be settled; trying again"
                log.exception(text, self.destination.dataset, group.first, group.last)
                unsettled.append(group)
        return unsettled

    def _settle_rows(self, rows: Rows, error: RequestError | None, *, null_vectors: bool) -> None:
        if error is not None:
            rows.on_refused(error.message)
            rows.upload.fail(error, (rows.first, rows.last))
        else:
            num_stored = rows.num_rows - len(rows.places_not_stored(null_vectors=null_vectors))
            self.destination.telemetry.rows_stored.add(num_stored)
            if not rows.journaled:
                self._dedupe_index.add_rows(rows)
            rows.upload.settle_rows(rows.first, rows.last, stored=num_stored)
        rows.on_released()

    def _give_up(self, taken: Sequence[Rows], error: FletcherError) -> None:
        what = f"`{self.destination.dataset}`: giving up rows"
        for rows in taken:
            if not rows.journaled:
                insist(functools.partial(rows.upload.fail, error), what)
                insist(rows.on_released, what)
