"""A lane's turn to say which rows in memory are duplicates: it lasts as long as one is in doubt.

That is decided before a group is first sent, and the group keeps it. Until all that was decided is
stored, or given up, the lane keeps its turn, so that nobody takes its rows for new ones, nor for
stored ones. Groups with rows in common do not share an append: one might be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fletcher.delivery.dedupe.index import DedupeIndex, keys_of
from fletcher.delivery.groups import Group


class DedupeDecision:
    """What one lane has decided. Not thread-safe: `keep` is called with the lane's lock held."""

    def __init__(self, known: DedupeIndex) -> None:
        self._known = known
        self._taken = False
        self._decided: dict[int, Group] = {}  # by identity, and not settled

    def take(self, wait_s: float) -> bool:
        """Whether it is this lane's turn, now or before so long."""
        self._taken = self._taken or self._known.acquire(wait_s)
        return self._taken

    def decide(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The groups that go now, decided: those before one that has a row in common with them.

        Raises:
            StoreUnavailableError: The store does not say what it holds.
            InvalidCommandError: The dataset has no column to tell by.
        """
        sent: dict[str, set[bytes]] = {
            group.dedupe_by: set() for group in groups if group.dedupe_by is not None
        }
        for place, group in enumerate(groups):
            kind = group.dedupe_by
            if kind is not None and id(group) not in self._decided:
                if not sent[kind].isdisjoint(keys_of(kind, group.rows)):
                    return groups[:place]
                group.rows = self._known.decide(group.rows)
                self._decided[id(group)] = group
            for one in sent:
                sent[one] |= keys_of(one, group.rows)
        return groups

    def settled(self, groups: Iterable[Group]) -> None:
        """The store has them."""
        for group in groups:
            self._decided.pop(id(group), None)

    def keep(self, groups: Iterable[Group]) -> None:
        """These were sent and go again. It is another's turn once nothing is in doubt."""
        lost = self._decided.keys() - {id(group) for group in groups}
        for one in lost:  # given up or refused: the store may have it, and can tell
            del self._decided[one]
        if lost:
            self._known.doubt()
        if self._taken and not self._decided:
            self._taken = False
            self._known.release()
