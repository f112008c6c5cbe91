"""Rows that wait for a dataset's committer, and the choice of its next action.

This module uses no threads, locks or clocks. The committer calls the queue under its own lock and
passes the time. No library is used: libraries for state machines add names for states, but here the
state is the set of waiting rows.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from fletcher.config.delivery import DeliveryConfig
from fletcher.delivery.actions import (
    Acknowledged,
    Append,
    Failed,
    GiveUp,
    Open,
    Opening,
    Refused,
    Release,
    Rest,
    Settle,
    Stop,
    Unavailable,
    Wait,
    unexpected_failure,
)
from fletcher.delivery.append_size import AppendSize
from fletcher.delivery.breaker import Breaker
from fletcher.delivery.groups import Group, Rows
from fletcher.delivery.waiting_rows import WaitingRows
from fletcher.errors import FletcherError
from fletcher.util.insist import insist

Action = Wait | Open | Append | Settle | GiveUp | Release | Rest | Stop
Outcome = Acknowledged | Unavailable | Failed | Refused | list[Group] | bool | None

# Limit of an append's size. While rows are joined and encoded, memory holds up to four copies of an
# append, which no stream's memory budget counts. Also, a utf8 column holds less than 2 GiB.
_COMMIT_BYTES = 32 << 20
# Pause before groups are settled once more.
_SETTLE_PAUSE_S = 1.0

_Made = TypeVar("_Made", Append, GiveUp, Release)


class CommitQueue:
    """State of one committer, and the choice of its next action. Not thread-safe.

    `decide` returns an action, and `note_outcome` takes the action's outcome. All times are from
    `time.monotonic`.

    Args:
        dataset: Name of the dataset, as the breaker knows it.
        linger_s: Idle time after which the committer offers to end.
    """

    def __init__(
        self,
        config: DeliveryConfig,
        dataset: str,
        breaker: Breaker,
        append_size: AppendSize,
        linger_s: float,
    ) -> None:
        self.waiting = WaitingRows()
        self.stopped = False  # if True, rows and openings are no longer accepted
        # Time since which all appends have failed, and the last error. None if the last append did
        # not fail.
        self.failing: tuple[float, FletcherError] | None = None
        self._config = config
        self._dataset = dataset
        self._breaker = breaker
        self._append_size = append_size
        self._linger_s = linger_s
        self._openings: deque[Opening] = deque()
        self._settling: list[Settle] = []
        self._flushing = False
        self._holds_rows = False
        self._was_unavailable = False
        self._idle_since: float | None = None

    def request_opening(self, opening: Opening) -> None:
        self._openings.append(opening)

    def request_flush(self) -> None:
        """Have the waiting rows sent now, without waiting for more rows."""
        self._flushing = True

    def remove_abandoned(self) -> tuple[list[Rows], bool]:
        """Remove rows of failed uploads, which clients send again.

        Returns two values: the removed rows, and whether the store may hold some of them.
        """
        return self.waiting.remove_in_memory(lambda rows: rows.abandoned)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self._settling or self._holds_rows)

    @property
    def has_decided_groups(self) -> bool:
        """Whether the duplicates in some waiting group are marked already."""
        return self.waiting.decided or any(group.decided for group in self._settling_groups())

    def decide(self, now: float) -> Action:
        """The next action.

        The caller reports its outcome to `note_outcome`, except that of Wait and Stop.
        """
        action = self._next_action(now)
        self._holds_rows = isinstance(action, Append | Settle | GiveUp | Release)
        if not isinstance(action, Wait):
            self._idle_since = None
        return action

    def note_outcome(self, action: Action, outcome: Outcome, now: float) -> None:
        """Learn the outcome of an action.

        After a Rest, the outcome is whether the committer ends. The outcome of other actions,
        except Append and Settle, is None. May be called once more if it raised an error.
        """
        match action, outcome:
            case Append(groups, full), _:
                self._note_append(groups, outcome, now, full=full)
            case Settle(_, error, sent), list(unsettled):
                if unsettled:
                    again = Settle(unsettled, error, ready_at=now + _SETTLE_PAUSE_S)
                    self._settling.append(again)
                if sent is not None:
                    self.failing = None
            case Settle(groups), _:
                self._note_append(groups, outcome, now, full=False)
            case Rest(), _:
                self.stopped |= bool(outcome)
        self._holds_rows = False

    def _note_append(
        self, groups: list[Group], outcome: Outcome, now: float, *, full: bool
    ) -> None:
        match outcome:
            case Acknowledged(sent, seconds):
                settle = Settle(list(sent.groups), sent=sent, ready_at=sent.ready_at)
                self.waiting.put_back(groups[len(sent.groups) :])
                self._settling.append(settle)
                full &= len(sent.groups) == len(groups)
                self._append_size.note_stored(now, seconds, full=full, slow_down=sent.slow_down)
            case Unavailable(num_groups, seconds, error):
                for group in groups[:num_groups]:
                    group.in_doubt = True
                self.waiting.put_back(groups)
                self._append_size.note_failed(now, seconds, error)
                self.failing = (self.failing[0] if self.failing else now - seconds, error)
            case Failed(num_groups, seconds, error):
                self._put_back_failed(groups, num_groups, now)
                self._append_size.note_failed(now, seconds, error)
                self.failing = (self.failing[0] if self.failing else now - seconds, error)
            case Refused(1, error):
                self._settling.append(Settle(groups[:1], error))
                self.waiting.put_back(groups[1:])
                self.failing = None
            case Refused(num_groups):
                # Send each group by itself, to find the one that the store refuses. Mark them in
                # doubt, because the store may have taken some of them.
                for group in groups[:num_groups]:
                    group.in_doubt = group.alone = True
                self.waiting.put_back(groups)
                self.failing = None

    def _put_back_failed(self, groups: list[Group], num_groups: int, now: float) -> None:
        """Queue groups again after an error of an unknown kind.

        After the second one in a row, each group is sent by itself. A group that fails by itself
        is set aside: one group that always fails delays no others. Rows that replace others stay
        in order.
        """
        for group in groups[:num_groups]:
            group.in_doubt = True
            group.alone |= self.failing is not None
        first = groups[0]
        if num_groups == 1 and first.alone and not first.upsert:
            if not first.num_failures:
                first.failing_since = now
            first.num_failures += 1
            first.ready_at = now + self._append_size.pause_s(first.num_failures)
            self.waiting.set_aside(first)
            groups = groups[1:]
        self.waiting.put_back(groups)

    def _next_action(self, now: float) -> Action:
        for settle in self._settling:
            if settle.ready_at <= now or (self.stopped and settle.sent is not None):
                self._settling.remove(settle)
                return settle
        if self.stopped:
            return self._stop()
        if self._can_open():
            action = Open(self._openings[0])
            self._openings.popleft()
            return action
        if (overdue := self._take_overdue(now)) is not None:
            return overdue
        due_at = self._due_at(now)
        return self._append_due(now) if due_at <= now else self._wait(due_at, now)

    def _stop(self) -> Stop:
        unsettled = [rows for group in self._settling_groups() for rows in group.rows]
        stop = Stop(unsettled, tuple(self._openings))
        stop.rows.extend(self.waiting.remove_all())
        self._settling.clear()
        self._openings.clear()
        return stop

    def _append_due(self, now: float) -> Append | Release:
        abandoned, in_doubt = self.remove_abandoned()
        if abandoned:
            return _made(Release, abandoned, in_doubt)
        groups = self.waiting.take_groups(
            now,
            max_rows=self._append_size.limit(self._config.commit_rows),
            max_bytes=self._append_size.limit(_COMMIT_BYTES),
            group_rows=self._config.group_rows,
        )
        return _made(Append, groups, full=self.waiting.in_order)

    def _wait(self, due_at: float, now: float) -> Wait | Rest:
        due_at = min(due_at, *(one.ready_at for one in self._settling), math.inf)
        if self.waiting or self._settling:
            overdue_at = self._overdue_at(self._failing_since())
            next_at = min(due_at, overdue_at) if overdue_at > now else due_at
            return Wait(min(next_at, now + self._linger_s))
        if self._idle_since is None:
            self._idle_since = now
        rest_at = self._idle_since + self._linger_s
        return Rest() if rest_at <= now else Wait(rest_at)

    def _can_open(self) -> bool:
        """Whether the first opening may be carried out now.

        Rows that arrived before an overwrite or a deletion was requested are stored first, so that
        it removes them. It does not wait for later rows, because the wait might never end. Later
        rows may be stored before or after it.
        """
        if not self._openings:
            return False
        first = self._openings[0]
        return (
            (first.staged is None and first.former is None)
            or first.ready.cancelled()
            or not (
                any(one.sent is not None for one in self._settling)
                or self.waiting.any_before(first.requested)
            )
        )

    def _due_at(self, now: float) -> float:
        """Time at which the next append is due; infinite if no rows wait."""
        waiting = self.waiting
        if any(one.delays_appends for one in self._settling):
            return math.inf
        aside_at = max(waiting.aside_at, self._ready_at(now)) if waiting.aside else math.inf
        if not waiting.in_order:
            self._flushing = False
            return aside_at
        max_rows = self._append_size.limit(self._config.commit_rows)
        max_bytes = self._append_size.limit(_COMMIT_BYTES)
        full = waiting.num_rows >= max_rows or waiting.num_bytes >= max_bytes
        ready_at = self._ready_at(now)
        if self._flushing or self._openings or full or waiting.sent:
            return min(ready_at, aside_at)
        return min(max(waiting.oldest + self._config.group_delay_s, ready_at), aside_at)

    def _ready_at(self, now: float) -> float:
        """Earliest start of the next append that breaker and append size allow."""
        if self._held_since is not None:
            self._was_unavailable = True
            return self._breaker.ready_at(self._dataset)
        if self._was_unavailable:
            self._was_unavailable = False
            self._append_size.resume(now)
        return self._append_size.ready_at

    def _overdue_at(self, since: float | None) -> float:
        """Time at which the oldest rows in memory are given up; infinite for never.

        `since`: time since which the store has failed; None if it has not.
        """
        if since is None:
            return math.inf
        return max(since, self.waiting.oldest_in_memory) + self._config.store_retry_s

    def _take_overdue(self, now: float) -> GiveUp | None:
        """Remove rows in memory that have waited too long for a failing store.

        Returns None if there are no such rows, or if an append may start right now.
        """
        since, retry_s = self._failing_since(), self._config.store_retry_s
        if overdue := self.waiting.take_hopeless(now - retry_s):
            error = self.failing[1] if self.failing else unexpected_failure()
            in_doubt = True
        elif since is None or self._overdue_at(since) > now or self._ready_at(now) <= now:
            return None
        else:
            error = self.failing[1] if self.failing else self._breaker.error_for(self._dataset)
            overdue, in_doubt = self.waiting.remove_in_memory(
                lambda rows: max(since, rows.arrived) + retry_s <= now
            )
        if not self.waiting:
            # Let later rows be sent without a pause: only a new append can end the failing state.
            self.failing = None
            self._append_size.resume(now)
        return _made(GiveUp, overdue, error, in_doubt)

    def _failing_since(self) -> float | None:
        """Start of the time in which the breaker holds the dataset back or appends fail.

        None if neither is the case.
        """
        since = [self._held_since, self.failing[0] if self.failing else None]
        return min((one for one in since if one is not None), default=None)

    def _settling_groups(self) -> list[Group]:
        return [group for one in self._settling for group in one.groups]

    @property
    def _held_since(self) -> float | None:
        return self._breaker.held_since(self._dataset)


def _made(kind: Callable[..., _Made], *fields: Any, **more: Any) -> _Made:
    """An action for rows that were removed from the queue.

    Nothing else holds these rows, so the action is made again until no error is raised.
    """
    return insist(functools.partial(kind, *fields, **more), "the committer's next action")
