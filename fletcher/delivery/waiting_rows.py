"""Rows that wait for a dataset's committer, in the order of sending.

A method that raises an error, such as a MemoryError, changes nothing, because it counts the rows
before it moves them.

This module uses no threads, locks or clocks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fletcher.delivery.groups import Group, Rows, form_groups


class WaitingRows:
    """Waiting rows in the order of sending. Groups that were sent before come first.

    A group set aside waits for its own time and does not delay the others. It was sent by itself,
    and failed with an error of an unknown kind.

    `num_bytes` is the size that all waiting rows have in memory. Rows that are still in the journal
    count as if they were loaded.
    """

    def __init__(self) -> None:
        self.num_rows = self.num_bytes = 0
        self.sent: deque[Group] = deque()  # were sent before, so their rows are fixed
        self.aside: list[Group] = []
        self._new: deque[Rows] = deque()
        self._aside_was_last = False  # after a group set aside, rows in order come first
        self._num_in_memory = 0  # number of `Rows` objects that are not journaled

    def __bool__(self) -> bool:
        return bool(self.sent or self._new or self.aside)

    @property
    def in_order(self) -> bool:
        """Whether rows wait that are not set aside."""
        return bool(self.sent or self._new)

    @property
    def aside_at(self) -> float:
        """Time of the next attempt of a group set aside; infinite if there is none."""
        return min((group.ready_at for group in self.aside), default=math.inf)

    @property
    def decided(self) -> bool:
        """Whether the duplicates in some group are marked already."""
        return any(group.decided for group in (*self.sent, *self.aside))

    def append_rows(self, rows: Rows) -> None:
        self._count([rows], 1)
        self._new.append(rows)

    def put_back(self, groups: Sequence[Group]) -> None:
        """Queue the groups that were taken last again, before all others."""
        self._count([rows for group in groups for rows in group.rows], 1)
        self.sent.extendleft(reversed(groups))

    def set_aside(self, group: Group) -> None:
        """Queue a group that was taken again, until its `ready_at`."""
        self._count(group.rows, 1)
        self.aside.append(group)

    def take_groups(
        self, now: float, *, max_rows: int, max_bytes: int, group_rows: int
    ) -> list[Group]:
        """Take the oldest rows of one kind for one append, and form groups of them.

        Returns at least one group if rows wait in order or a group set aside is ready, even one
        beyond the limits. If an error is raised, all rows are still queued.
        """
        ready = [] if self._aside_was_last and self.in_order else self.aside
        self._aside_was_last = False
        for group in ready:
            if group.ready_at <= now:
                self._count(group.rows, -1)
                self._aside_was_last = True
                self.aside.remove(group)
                return [group]
        if self.sent:
            return self._take_sent(max_rows, max_bytes)
        taken: list[Rows] = []
        num_rows = num_bytes = 0
        for rows in self._new:
            num_rows += rows.num_rows
            num_bytes += rows.num_bytes
            if taken and (
                rows.kind != taken[0].kind
                or rows.revived
                or taken[0].revived
                or num_rows > max_rows
                or num_bytes > max_bytes
            ):
                break
            taken.append(rows)
        groups = form_groups(taken, min(group_rows, max_rows))
        self._count(taken, -1)
        for _ in taken:
            self._new.popleft()
        return groups

    def take_hopeless(self, since: float) -> list[Rows]:
        """Remove groups set aside in memory that have failed since then or before."""
        hopeless = [
            group
            for group in self.aside
            if group.failing_since <= since and not group.rows[0].journaled
        ]
        removed = [rows for group in hopeless for rows in group.rows]
        self._count(removed, -1)
        self.aside = [group for group in self.aside if group not in hopeless]
        return removed

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
        sent: deque[Group] = deque()
        aside: list[Group] = []
        new: deque[Rows] = deque()
        for group in (*self.sent, *self.aside):
            if not group.rows[0].journaled and condition(group.rows[0]):
                removed += group.rows
                in_doubt |= group.in_doubt
            elif group in self.aside:
                aside.append(group)
            else:
                sent.append(group)
        for rows in self._new:
            if not rows.journaled and condition(rows):
                removed.append(rows)
            else:
                new.append(rows)
        self._count(removed, -1)
        self.sent, self.aside, self._new = sent, aside, new
        return removed, in_doubt

    def remove_all(self) -> list[Rows]:
        sent = [*self.sent, *self.aside]
        removed = [*(rows for group in sent for rows in group.rows), *self._new]
        self._count(removed, -1)
        self.sent.clear()
        self.aside.clear()
        self._new.clear()
        return removed

    @property
    def oldest(self) -> float:
        """Arrival time of the rows that are sent next. Requires that rows wait in order."""
        return self.sent[0].rows[0].arrived if self.sent else self._new[0].arrived

    @property
    def oldest_in_memory(self) -> float:
        """Earliest arrival time of rows not journaled; infinite if there are none.

        Groups set aside do not count.
        """
        if not self._num_in_memory:
            return math.inf
        rows = [*(group.rows[0] for group in self.sent), *self._new]
        return min((one.arrived for one in rows if not one.journaled), default=math.inf)

    def any_before(self, moment: float) -> bool:
        """Whether some waiting rows were sent before, or arrived by `moment`."""
        return bool(self.sent or self.aside) or any(rows.arrived <= moment for rows in self._new)

    def _take_sent(self, max_rows: int, max_bytes: int) -> list[Group]:
        taken: list[Group] = []
        num_rows = num_bytes = 0
        for group in self.sent:
            num_rows += group.num_rows
            num_bytes += group.num_bytes
            if taken and (
                group.alone
                or group.rows[0].kind != taken[0].rows[0].kind
                or num_rows > max_rows
                or num_bytes > max_bytes
            ):
                break
            taken.append(group)
            if group.alone:
                break
        self._count([rows for group in taken for rows in group.rows], -1)
        for _ in taken:
            self.sent.popleft()
        return taken

    def _count(self, entries: Iterable[Rows], sign: int) -> None:
        for rows in entries:
            self.num_rows += sign * rows.num_rows
            self.num_bytes += sign * rows.num_bytes
            self._num_in_memory += 0 if rows.journaled else sign
