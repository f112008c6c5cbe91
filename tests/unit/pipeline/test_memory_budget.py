from __future__ import annotations

import contextlib
import threading

import pytest

from fletcher.errors import CancelledError, DrainingError, FletcherError
from fletcher.pipeline.memory_budget import Allowance, MemoryBudget


def waits(call: threading.Thread) -> bool:
    call.join(0.05)
    return call.is_alive()


def test_a_stalled_stream_cannot_take_anothers_reserve() -> None:
    budget = MemoryBudget(4000, max_streams=10)  # 100 bytes of reserve each, 1750 in common
    stalled, other = budget.open_allowance(), budget.open_allowance()
    stalled.acquire(1850)
    other.acquire(100)
    assert budget.statistics() == {"used_bytes": 1950, "total_bytes": 4000}


def test_acquire_waits_for_release() -> None:
    budget = MemoryBudget(4000, max_streams=10)
    first, second = budget.open_allowance(), budget.open_allowance()
    first.acquire(1850)
    call = threading.Thread(target=second.acquire, args=(200,))
    call.start()
    assert waits(call)
    first.release_bytes(1000)
    call.join(30)
    assert not call.is_alive()
    assert second.used_bytes == 200


def test_one_piece_larger_than_everything_passes_alone() -> None:
    budget = MemoryBudget(4000, max_streams=10)
    stream = budget.open_allowance()
    stream.acquire(10_000)
    call = threading.Thread(target=stream.acquire, args=(1,))
    call.start()
    assert waits(call)
    stream.release_bytes(10_000)
    call.join(30)
    assert not call.is_alive()


def test_a_piece_larger_than_everything_leaves_others_their_reserve() -> None:
    # The overdrawn common part counted against streams that asked for nothing of it.
    budget = MemoryBudget(4000, max_streams=10)
    huge, other = budget.open_allowance(), budget.open_allowance()
    huge.acquire(10_000)
    call = threading.Thread(target=other.acquire, args=(100,), daemon=True)
    call.start()
    call.join(30)
    assert not call.is_alive()


def test_tables_are_kept_while_there_is_room_and_nobody_waits_for_it() -> None:
    # 256 streams could keep 32 MiB of a dictionary's vectors each, which nothing counted.
    budget = MemoryBudget(8000, max_streams=10)  # of which 1000 bytes for tables
    one, two = budget.open_allowance(), budget.open_allowance()
    assert one.keep_table(600)
    assert not two.keep_table(600)
    assert one.keep_table(900)  # instead of the 600
    assert not one.keep_table(1001)
    assert two.keep_table(600)
    two.close()
    assert not two.keep_table(10)
    assert one.keep_table(1000)
    assert budget.statistics()["used_bytes"] == 0


def test_of_rows_that_are_kept_the_oldest_always_becomes_whole() -> None:
    # They were not counted, 256 MiB for each stream. Counted one by one, streams could fill the
    # room with the beginnings of rows, and each would wait for the others.
    budget = MemoryBudget(8000, max_streams=10)  # of which 1500 bytes for rows, 1125 for one
    old, new = budget.open_allowance(), budget.open_allowance()
    old.grow_row(200)
    new.grow_row(375)  # beside what the older one may still need
    call = threading.Thread(target=new.grow_row, args=(376,), daemon=True)
    call.start()
    assert waits(call)
    old.grow_row(old.max_row_bytes)
    row_bytes = old.complete_row()
    assert row_bytes == 1125
    assert waits(call)  # until it is stored
    old.grow_row(0)  # of a row that failed nothing is kept
    old.release_bytes(0, row_bytes)
    call.join(30)
    assert not call.is_alive()
    assert budget.statistics()["used_bytes"] == 376
    new.grow_row(0)
    assert budget.statistics()["used_bytes"] == 0
    assert new.complete_row() == 0


def test_the_stream_of_the_oldest_row_gets_a_piece_though_the_rest_is_taken() -> None:
    # The last row slice of a text counts all of it, and those who waited for its row held the rest.
    budget = MemoryBudget(8000, max_streams=10)  # 200 bytes of reserve each
    old, new = budget.open_allowance(), budget.open_allowance()
    new.acquire(3700)  # its reserve and the common part
    old.acquire(200)
    call = threading.Thread(target=old.acquire, args=(900,), daemon=True)
    call.start()
    assert waits(call)
    old.grow_row(1)
    new.grow_row(1)
    call.join(30)
    assert not call.is_alive()

    def acquire(stream: Allowance) -> None:
        with contextlib.suppress(DrainingError):
            stream.acquire(900)

    for stream in (old, new):  # one at a time, and for the oldest alone
        call = threading.Thread(target=acquire, args=(stream,), daemon=True)
        call.start()
        assert waits(call)
        stream.close()
        call.join(30)


def test_close_gives_kept_rows_back_and_wakes_who_waits_with_one() -> None:
    budget = MemoryBudget(8000, max_streams=10)
    old, new = budget.open_allowance(), budget.open_allowance()
    old.grow_row(1125)
    old.complete_row()
    old.grow_row(1)
    caught: list[BaseException] = []

    def grow() -> None:
        try:
            new.grow_row(500)
        except DrainingError as error:
            caught.append(error)

    call = threading.Thread(target=grow, daemon=True)
    call.start()
    assert waits(call)
    new.close()
    call.join(30)
    assert caught
    old.close()
    assert budget.statistics()["used_bytes"] == 0
    old.release_bytes(0, 1125)
    assert budget.statistics()["used_bytes"] == 0


def test_close_gives_everything_back_and_wakes_a_waiting_acquire() -> None:
    budget = MemoryBudget(4000, max_streams=10)
    stream = budget.open_allowance()
    stream.acquire(1850)
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
    call.join(30)
    assert caught
    assert budget.statistics()["used_bytes"] == 0
    stream.release_bytes(3100)  # a late release changes nothing
    assert budget.statistics()["used_bytes"] == 0
    with pytest.raises(DrainingError):
        stream.acquire(1)


@pytest.mark.parametrize("call", ["acquire", "grow_row"])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_closed_stream_gives_its_reason_to_all_who_ask_for_memory(
    call: str, *, waiting: bool
) -> None:
    # A caller that left while its vectors were assembled was counted as `draining`.
    budget = MemoryBudget(8000, max_streams=10)
    other, stream = budget.open_allowance(), budget.open_allowance()
    other.grow_row(1125)
    other.acquire(3700)
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            getattr(stream, call)(500)
        except FletcherError as error:
            caught.append(error)

    if not waiting:
        stream.close(CancelledError("gone"))
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    if waiting:
        assert waits(asking)
        stream.close(CancelledError("gone"))
    stream.close(DrainingError("the server stopped"))  # the first reason counts
    asking.join(30)
    assert [type(error) for error in caught] == [CancelledError]
