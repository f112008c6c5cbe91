from __future__ import annotations

import pytest

from fletcher.pipeline.fair_queue import FairQueue


def test_owners_take_turns_and_keep_their_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.add_item(item[0], item, weight=int(item[1]))
    assert len(queue) == 6
    assert queue.weight == 10
    assert [queue.next_item() for _ in range(6)] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert not queue
    assert queue.weight == 0
    with pytest.raises(IndexError):
        queue.next_item()
