from __future__ import annotations

import threading

import pytest

from fletcher.errors import DrainingError
from fletcher.pipeline.memory import MemoryBudget


def waits(call: threading.Thread) -> bool:
    call.join(0.05)
    return call.is_alive()


def test_a_stalled_stream_cannot_take_anothers_reserve() -> None:
    budget = MemoryBudget(4000, max_streams=10)  # 100 bytes of reserve each, 2500 in common
    stalled, other = budget.open(), budget.open()
    stalled.acquire(2600)
    other.acquire(100)
    assert budget.statistics() == {"used_bytes": 2700, "total_bytes": 4000}


def test_acquire_waits_for_release() -> None:
    budget = MemoryBudget(4000, max_streams=10)
    first, second = budget.open(), budget.open()
    first.acquire(2600)
    call = threading.Thread(target=second.acquire, args=(200,))
    call.start()
    assert waits(call)
    first.release(1000)
    call.join(5)
    assert not call.is_alive()
    assert second.used_bytes == 200


def test_one_piece_larger_than_everything_passes_alone() -> None:
    budget = MemoryBudget(4000, max_streams=10)
    stream = budget.open()
    stream.acquire(10_000)
    call = threading.Thread(target=stream.acquire, args=(1,))
    call.start()
    assert waits(call)
    stream.release(10_000)
    call.join(5)
    assert not call.is_alive()


def test_a_piece_larger_than_everything_leaves_others_their_reserve() -> None:
    # The overdrawn common part counted against streams that asked for nothing of it.
    budget = MemoryBudget(4000, max_streams=10)
    huge, other = budget.open(), budget.open()
    huge.acquire(10_000)
    call = threading.Thread(target=other.acquire, args=(100,), daemon=True)
    call.start()
    call.join(5)
    assert not call.is_alive()


def test_tables_are_kept_while_there_is_room_and_nobody_waits_for_it() -> None:
    # 256 streams could keep 32 MiB of a dictionary's vectors each, which nothing counted.
    budget = MemoryBudget(8000, max_streams=10)  # of which 1000 bytes for tables
    one, two = budget.open(), budget.open()
    assert one.keep(600)
    assert not two.keep(600)
    assert one.keep(900)  # instead of the 600
    assert not one.keep(1001)
    assert two.keep(600)
    two.close()
    assert not two.keep(10)
    assert one.keep(1000)
    assert budget.statistics()["used_bytes"] == 0


def test_close_gives_everything_back_and_wakes_a_waiting_acquire() -> None:
    budget = MemoryBudget(4000, max_streams=10)
    stream = budget.open()
    stream.acquire(2600)
    caught: list[BaseException] = []

    def acquire() -> None:
        try:
            stream.acquire(1000)
        except DrainingError as error:
            caught.append(error)

    call = threading.Thread(target=acquire)
    call.start()
    assert waits(call)
    stream.close()
    call.join(5)
    assert caught
    assert budget.statistics()["used_bytes"] == 0
    stream.release(3100)  # a late release changes nothing
    assert budget.statistics()["used_bytes"] == 0
    with pytest.raises(DrainingError):
        stream.acquire(1)
