"""Queue that is fair between streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Queue that serves owners in rotation, and keeps the order of each owner's items.

    Not thread-safe.

    Attributes:
        weight: Total weight of all queued items.
    """

    def __init__(self) -> None:
        self._owners: dict[Hashable, deque[tuple[Item, int]]] = {}
        self.weight = 0

    def __bool__(self) -> bool:
        return bool(self._owners)

    def __len__(self) -> int:
        return sum(len(items) for items in self._owners.values())

    def add_item(self, owner: Hashable, item: Item, weight: int = 1) -> None:
        """Adds an item after its owner's other items."""
        self._owners.setdefault(owner, deque()).append((item, weight))
        self.weight += weight

    def next_item(self) -> Item:
        """Takes the first item of the owner whose turn it is.

        The owner then waits until all other owners were served. Raises IndexError if the queue is
        empty.
        """
        if not self._owners:
            raise IndexError("get from an empty FairQueue")
        owner = next(iter(self._owners))
        items = self._owners.pop(owner)
        item, weight = items.popleft()
        if items:
            self._owners[owner] = items
        self.weight -= weight
        return item

    def take_items(
        self,
        max_weight: float = float("inf"),
        wanted: Callable[[Hashable], bool] = lambda _owner: True,
    ) -> list[Item]:
        """Takes items in rotation, up to a total weight; at least one, if there is one.

        Args:
            max_weight: The first item that would exceed this total ends the taking.
            wanted: Whether an owner takes part. The others keep their items and their turn.
        """
        taken: list[Item] = []
        owners = deque(owner for owner in self._owners if wanted(owner))
        total = 0
        while owners:
            owner = owners.popleft()
            items = self._owners[owner]
            if taken and total + items[0][1] > max_weight:
                break
            item, weight = items.popleft()
            taken.append(item)
            total += weight
            del self._owners[owner]
            if items:  # again, behind all others
                self._owners[owner] = items
                owners.append(owner)
        self.weight -= total
        return taken

    def remove_owner(self, owner: Hashable) -> list[Item]:
        """Removes and returns all items of an owner."""
        items = self._owners.pop(owner, ())
        self.weight -= sum(weight for _, weight in items)
        return [item for item, _ in items]
