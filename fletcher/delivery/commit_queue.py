"""Rows that wait for a dataset's committer, and the choice of its next action.

This module uses no threads, locks or clocks. The committer calls the queue under its own lock and
passes the time. No library is used: libraries for state machines add names for states, but here the
state is the set of waiting rows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fletcher.config.delivery import DeliveryConfig
from fletcher.delivery.actions import (
    Append,
    GiveUp,
    Open,
    Opening,
    Refused,
    Reject,
    Release,
    Rest,
    Stop,
    Stored,
    Unavailable,
    Wait,
)
from fletcher.delivery.append_size import AppendSize
from fletcher.delivery.breaker import Breaker
from fletcher.delivery.groups import Group, Rows, form_groups
from fletcher.errors import FletcherError

Action = Wait | Open | Append | Reject | GiveUp | Release | Rest | Stop
Outcome = Stored | Unavailable | Refused | bool | None

# Limit of an append's size. While rows are joined and encoded, memory holds up to four copies of an
# append, which no stream's memory budget counts. Also, a utf8 column holds less than 2 GiB.
_COMMIT_BYTES = 32 << 20


class WaitingRows:
    """Waiting rows in the order of sending. Groups that were sent before come first.

    `num_bytes` is the size that all waiting rows have in memory. Rows that are still in the journal
    count as if they were loaded.
    """

    def __init__(self) -> None:
        self.num_rows = self.num_bytes = 0
        self.sent: deque[Group] = deque()  # were sent before, so their rows are fixed
        self._new: deque[Rows] = deque()
        self._num_in_memory = 0  # number of `Rows` objects that are not journaled

    def __bool__(self) -> bool:
        return bool(self.sent or self._new)

    def append_rows(self, rows: Rows) -> None:
        self._new.append(rows)
        self._count([rows], 1)

    def put_back(self, groups: Sequence[Group]) -> None:
        """Queue the groups that were taken last again, before all others."""
        self.sent.extendleft(reversed(groups))
        for group in groups:
            self._count(group.rows, 1)

    def take_groups(self, *, max_rows: int, max_bytes: int, group_rows: int) -> list[Group]:
        """Take the oldest rows of one kind for one append, and form groups of them.

        Returns at least one group if rows wait, even one beyond the limits.
        """
        if self.sent:
            return self._take_sent(max_rows, max_bytes)
        taken: list[Rows] = []
        num_rows = num_bytes = 0
        while self._new:
            rows = self._new[0]
            num_rows += rows.num_rows
            num_bytes += rows.num_bytes
            if taken and (
                rows.kind != taken[0].kind or num_rows > max_rows or num_bytes > max_bytes
            ):
                break
            taken.append(self._new.popleft())
        self._count(taken, -1)
        return form_groups(taken, min(group_rows, max_rows))

    def remove_in_memory(self, condition: Callable[[Rows], bool]) -> tuple[list[Rows], bool]:
        """Remove the rows that are not journaled and that meet a condition.

        Returns:
            Two values: the removed rows, and whether the store may hold some of them. A group that
            was sent before is removed as a unit if the condition holds for its first entry.
        """
        if not self._num_in_memory:
            return [], False
        removed: list[Rows] = []
        in_doubt = False
        sent, new = self.sent, self._new
        self.sent, self._new = deque(), deque()
        for group in sent:
            if not group.rows[0].journaled and condition(group.rows[0]):
                removed += group.rows
                in_doubt |= group.in_doubt
            else:
                self.sent.append(group)
        for rows in new:
            if not rows.journaled and condition(rows):
                removed.append(rows)
            else:
                self._new.append(rows)
        self._count(removed, -1)
        return removed, in_doubt

    def remove_all(self) -> list[Rows]:
        removed = [rows for group in self.sent for rows in group.rows] + list(self._new)
        self.sent.clear()
        self._new.clear()
        self._count(removed, -1)
        return removed

    @property
    def oldest(self) -> float:
        """Arrival time of the rows that are sent next. Requires that rows wait."""
        return self.sent[0].rows[0].arrived if self.sent else self._new[0].arrived

    @property
    def oldest_in_memory(self) -> float:
        """Earliest arrival time of rows not journaled; infinite if there are none."""
        if not self._num_in_memory:
            return math.inf
        rows = [*(group.rows[0] for group in self.sent), *self._new]
        return min(one.arrived for one in rows if not one.journaled)

    def any_before(self, moment: float) -> bool:
        """Whether some waiting rows were sent before, or arrived by `moment`."""
        return bool(self.sent) or any(rows.arrived <= moment for rows in self._new)

    def _take_sent(self, max_rows: int, max_bytes: int) -> list[Group]:
        taken: list[Group] = []
        num_rows = num_bytes = 0
        while self.sent:
            group = self.sent[0]
            num_rows += group.num_rows
            num_bytes += group.num_bytes
            if taken and (
                group.alone
                or group.rows[0].kind != taken[0].rows[0].kind
                or num_rows > max_rows
                or num_bytes > max_bytes
            ):
                break
            taken.append(self.sent.popleft())
            self._count(group.rows, -1)
            if group.alone:
                break
        return taken

    def _count(self, entries: Iterable[Rows], sign: int) -> None:
        for rows in entries:
            self.num_rows += sign * rows.num_rows
            self.num_bytes += sign * rows.num_bytes
            self._num_in_memory += 0 if rows.journaled else sign


class CommitQueue:
    """State of one committer, and the choice of its next action. Not thread-safe.

    `decide` returns an action, and `note_outcome` takes the action's outcome. All times are from
    `time.monotonic`.

    Args:
        linger_s: Idle time after which the committer offers to end.
    """

    def __init__(
        self, config: DeliveryConfig, breaker: Breaker, append_size: AppendSize, linger_s: float
    ) -> None:
        self.waiting = WaitingRows()
        self.stopped = False  # if True, rows and openings are no longer accepted
        # Time since which all appends have failed, and the last error. None if the last append did
        # not fail.
        self.failing: tuple[float, FletcherError] | None = None
        self._config = config
        self._breaker = breaker
        self._append_size = append_size
        self._linger_s = linger_s
        self._openings: deque[Opening] = deque()
        self._rejected: Reject | None = None
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
        return not (self.waiting or self._rejected or self._holds_rows)

    @property
    def has_decided_groups(self) -> bool:
        """Whether the duplicates in some waiting group are marked already."""
        if self._rejected is not None and self._rejected.group.decided:
            return True
        return any(group.decided for group in self.waiting.sent)

    def decide(self, now: float) -> Action:
        """The next action.

        The caller reports its outcome to `note_outcome`, except that of Wait and Stop.
        """
        action = self._next_action(now)
        self._holds_rows = isinstance(action, Append | Reject | GiveUp | Release)
        if not isinstance(action, Wait):
            self._idle_since = None
        return action

    def note_outcome(self, action: Action, outcome: Outcome, now: float) -> None:
        """Learn the outcome of an action.

        After an append, None means that its groups are lost. After a Rest, the outcome is whether
        the committer ends. The outcome of other actions is None.
        """
        self._holds_rows = False
        if isinstance(action, Rest):
            self.stopped |= bool(outcome)
            return
        if not isinstance(action, Append):
            return
        groups = action.groups
        match outcome:
            case Stored(num_groups, seconds, slow_down):
                full = action.full and num_groups == len(groups)
                self._append_size.note_stored(now, seconds, full=full, slow_down=slow_down)
                self.waiting.put_back(groups[num_groups:])
                self.failing = None
            case Unavailable(num_groups, seconds, error):
                for group in groups[:num_groups]:
                    group.in_doubt = True
                self._append_size.note_failed(now, seconds, error)
                self.waiting.put_back(groups)
                self.failing = (self.failing[0] if self.failing else now - seconds, error)
            case Refused(1, error):
                self._rejected = Reject(groups[0], error)
                self.waiting.put_back(groups[1:])
                self.failing = None
            case Refused(num_groups):
                # Send each group by itself, to find the one that the store refuses. Mark them in
                # doubt, because an unexpected error may have occurred after rows were stored.
                for group in groups[:num_groups]:
                    group.in_doubt = group.alone = True
                self.waiting.put_back(groups)
                self.failing = None

    def _next_action(self, now: float) -> Action:
        if self.stopped:
            return self._stop()
        if self._rejected is not None:
            rejected, self._rejected = self._rejected, None
            return rejected
        if self._can_open():
            return Open(self._openings.popleft())
        if (overdue := self._take_overdue(now)) is not None:
            return overdue
        due_at = self._due_at(now)
        return self._append_due() if due_at <= now else self._wait(due_at, now)

    def _stop(self) -> Stop:
        rejected = self._rejected.group.rows if self._rejected is not None else []
        openings, self._rejected = tuple(self._openings), None
        self._openings.clear()
        return Stop([*rejected, *self.waiting.remove_all()], openings)

    def _append_due(self) -> Append | Release:
        abandoned, in_doubt = self.remove_abandoned()
        if abandoned:
            return Release(abandoned, in_doubt)
        groups = self.waiting.take_groups(
            max_rows=self._append_size.limit(self._config.commit_rows),
            max_bytes=self._append_size.limit(_COMMIT_BYTES),
            group_rows=self._config.group_rows,
        )
        return Append(groups, full=bool(self.waiting))

    def _wait(self, due_at: float, now: float) -> Wait | Rest:
        if self.waiting:
            overdue_at = self._overdue_at(self._failing_since())
            next_at = min(due_at, overdue_at) if overdue_at > now else due_at
            return Wait(min(next_at, now + self._linger_s))
        if self._idle_since is None:
            self._idle_since = now
        rest_at = self._idle_since + self._linger_s
        return Rest() if rest_at <= now else Wait(rest_at)

    def _can_open(self) -> bool:
        """Whether the first opening may be carried out now.

        Rows that arrived before an overwrite was requested are stored first, so that the overwrite
        removes them. The overwrite does not wait for later rows, because the wait might never end.
        Later rows may be stored before or after it.
        """
        if not self._openings:
            return False
        first = self._openings[0]
        return (
            first.mode != "overwrite"
            or first.ready.cancelled()
            or not self.waiting.any_before(first.requested)
        )

    def _due_at(self, now: float) -> float:
        """Time at which the next append is due; infinite if no rows wait."""
        waiting = self.waiting
        if not waiting:
            self._flushing = False
            return math.inf
        max_rows = self._append_size.limit(self._config.commit_rows)
        max_bytes = self._append_size.limit(_COMMIT_BYTES)
        full = waiting.num_rows >= max_rows or waiting.num_bytes >= max_bytes
        ready_at = self._ready_at(now)
        if self._flushing or self._openings or full or waiting.sent:
            return ready_at
        return max(waiting.oldest + self._config.group_delay_s, ready_at)

    def _ready_at(self, now: float) -> float:
        """Earliest start of the next append that breaker and append size allow."""
        if self._breaker.unavailable_since is not None:
            self._was_unavailable = True
            return self._breaker.ready_at(self)
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
        if since is None or self._overdue_at(since) > now or self._ready_at(now) <= now:
            return None
        error = self.failing[1] if self.failing else self._breaker.error_for(self)
        overdue, in_doubt = self.waiting.remove_in_memory(
            lambda rows: max(since, rows.arrived) + retry_s <= now
        )
        if not self.waiting:
            # Let later rows be sent without a pause: only a new append can end the failing state.
            self.failing = None
            self._append_size.resume(now)
        return GiveUp(overdue, error, in_doubt)

    def _failing_since(self) -> float | None:
        """Time since which the store is unavailable, or appends to this dataset fail.

        None if neither is the case.
        """
        since = [self._breaker.unavailable_since, self.failing[0] if self.failing else None]
        return min((one for one in since if one is not None), default=None)
