from __future__ import annotations

import pytest

from fletcher.pipeline.fair_queue import FairQueue


def test_owners_take_turns_and_keep_their_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.put(item[0], item, weight=int(item[1]))
    assert len(queue) == 6
    assert queue.weight == 10
    assert [queue.get() for _ in range(6)] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert not queue
    assert queue.weight == 0
    with pytest.raises(IndexError):
        queue.get()


def test_discard_takes_one_owners_items_out() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "b1", "a2"):
        queue.put(item[0], item)
    assert queue.discard("a") == ["a1", "a2"]
    assert queue.discard("a") == []
    assert queue.weight == 1
    assert queue.get() == "b1"
