"""The rows that wait in a lane: those that were sent in vain, as the groups they were, then others.

Not thread-safe: a lane guards its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from fletcher.delivery.groups import Group, Rows, groups_of


class Backlog:
    """Rows in the order in which they go.

    Attributes:
        num_rows: How many wait.
        num_bytes: What they take in memory, or as they are read from the journal.
    """

    def __init__(self) -> None:
        self.num_rows = self.num_bytes = 0
        self._num_in_memory = 0  # entries, of those that are not journaled
        self._sent: deque[Group] = deque()
        self._new: deque[Rows] = deque()

    def __bool__(self) -> bool:
        return bool(self._sent or self._new)

    def put(self, rows: Rows) -> None:
        """Queues rows that were not sent yet."""
        self._new.append(rows)
        self._count([rows], 1)

    def put_back(self, groups: Iterable[Group]) -> None:
        """Queues groups again, before all others, that were taken last."""
        for group in reversed(list(groups)):
            self._sent.appendleft(group)
            self._count(group.rows, 1)

    def take(self, *, max_rows: int, max_bytes: int, group_rows: int) -> list[Group]:
        """The oldest rows that fit one append, of one kind; one group at least, whatever its size.

        Rows of failed uploads are let go.
        """
        if self._sent:
            return self._take_sent(max_rows, max_bytes)
        taken: list[Rows] = []
        num_rows = num_bytes = 0
        while self._new:
            rows = self._new[0]
            too_many = num_rows + rows.num_rows > max_rows or num_bytes + rows.num_bytes > max_bytes
            if taken and (rows.kind != taken[0].kind or too_many):
                break
            self._new.popleft()
            self._count([rows], -1)
            if rows.dropped:
                rows.released()
                continue
            num_rows += rows.num_rows
            num_bytes += rows.num_bytes
            taken.append(rows)
        return groups_of(taken, min(group_rows, max_rows))

    def remove(self, condition: Callable[[Rows], bool]) -> list[Rows]:
        """Takes out the rows in memory that meet a condition: a sent group by its first rows."""
        if not self._num_in_memory:
            return []
        removed: list[Rows] = []
        sent, new = self._sent, self._new
        self._sent, self._new = deque(), deque()
        for group in sent:
            if not group.rows[0].journaled and condition(group.rows[0]):
                removed += group.rows
            else:
                self._sent.append(group)
        for rows in new:
            if not rows.journaled and condition(rows):
                removed.append(rows)
            else:
                self._new.append(rows)
        self._count(removed, -1)
        return removed

    def clear(self) -> list[Rows]:
        """Takes out all rows."""
        removed = [rows for group in self._sent for rows in group.rows] + list(self._new)
        self._sent.clear()
        self._new.clear()
        self._count(removed, -1)
        return removed

    @property
    def again(self) -> bool:
        """What goes next was sent before."""
        return bool(self._sent)

    @property
    def oldest(self) -> float:
        """When the rows that go next arrived; there must be some."""
        return self._sent[0].rows[0].arrived if self._sent else self._new[0].arrived

    @property
    def sent(self) -> Iterable[Group]:
        """The groups that were sent before."""
        return self._sent

    def has_before(self, moment: float) -> bool:
        """Whether rows wait that arrived by then, or that were sent in vain."""
        return bool(self._sent) or any(rows.arrived <= moment for rows in self._new)

    def oldest_in_memory(self) -> float | None:
        """When the first of the rows that are not journaled arrived, if there are such."""
        if not self._num_in_memory:
            return None
        rows = [*(group.rows[0] for group in self._sent), *self._new]
        return min(one.arrived for one in rows if not one.journaled)

    def _take_sent(self, max_rows: int, max_bytes: int) -> list[Group]:
        taken: list[Group] = []
        num_rows = num_bytes = 0
        while self._sent:
            group = self._sent[0]
            num_rows += group.num_rows
            num_bytes += group.num_bytes
            if taken and (
                group.alone
                or group.rows[0].kind != taken[0].rows[0].kind
                or num_rows > max_rows
                or num_bytes > max_bytes
            ):
                break
            self._sent.popleft()
            self._count(group.rows, -1)
            if group.rows[0].dropped:
                num_rows -= group.num_rows
                num_bytes -= group.num_bytes
                for rows in group.rows:
                    rows.released()
                continue
            taken.append(group)
            if group.alone:
                break
        return taken

    def _count(self, entries: Iterable[Rows], sign: int) -> None:
        for rows in entries:
            self.num_rows += sign * rows.num_rows
            self.num_bytes += sign * rows.num_bytes
            self._num_in_memory += 0 if rows.journaled else sign
