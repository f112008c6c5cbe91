"""Which rows of uploads a Longbow has, and the wait before it is asked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
import pytest

from fletcher.core.schema import row_keys
from fletcher.errors import StoreUnavailableError
from fletcher.stores.flight import running_time
from fletcher.stores.flight.longbow_uploads import UploadRows, row_offsets, row_texts
from fletcher.stores.flight.running_time import RunningTime
from tests.doubles import store_rows as rows


def offsets(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ((0,), ["u:0-0"]),
        ((3, 4, 5), ["u:3-5"] * 3),
        ((0, 1, 3, 7, 8), ["u:0-1", "u:0-1", "u:3-3", "u:7-8", "u:7-8"]),
    ],
)
def test_keys_name_exactly_their_rows(given: tuple[int, ...], keys: list[str]) -> None:
    found = row_keys("u", offsets(*given))
    assert found.type == pa.utf8()
    assert found.to_pylist() == keys
    batch = pa.record_batch({"batch_key": found})
    told = row_offsets(batch)
    assert told is not None
    assert (told[0], told[1].tolist()) == ("u", list(given))


@pytest.mark.parametrize("keys", [["u:0-1"], ["x"], ["u:0-0", "v:1-1"], ["u:0-0", "u:0-0"]])
def test_keys_of_other_rows_tell_nothing(keys: list[str]) -> None:
    assert row_offsets(pa.record_batch({"batch_key": keys})) is None


@pytest.mark.parametrize(
    ("counts", "whole", "parts"),
    [
        ({}, [], []),
        ({(0, 9): 10, (20, 29): 10}, [(0, 9), (20, 29)], []),
        ({(0, 9): 7}, [], [(0, 9)]),
        ({(0, 9): 7, (7, 9): 3}, [(0, 9)], []),  # other keys have the rest
        ({(0, 9): 7, (7, 8): 2}, [(7, 8)], [(0, 9)]),
        ({(0, 9): 12}, [(0, 9)], []),  # doubled by an earlier release
    ],
)
def test_a_key_with_fewer_rows_than_it_names_is_a_part(
    counts: dict[tuple[int, int], int], whole: list[tuple[int, int]], parts: list[tuple[int, int]]
) -> None:
    found = UploadRows(counts)
    assert found.whole.ranges() == whole
    assert list(found.parts) == parts
    assert found.num_rows == sum(counts.values())


def test_rows_of_a_part_are_recognized_by_their_values_and_only_once() -> None:
    batch = rows.batch(0, 6, ids=["a", "a", "b", "b", "c", "d"])
    texts = pa.array(["1", "2", "3", "3", "4", "5"])
    batch = batch.set_column(batch.schema.get_field_index("text"), "text", texts)
    found = UploadRows({(0, 9): 3, (5, 5): 1})
    stored = batch.take(pa.array([4, 1, 3]))  # in any order
    found.parts[0, 9].update(row_texts(stored))
    missing = found.find_missing(batch, offsets(*range(6)))
    # The rows 2 and 3 are the same: one of them is there.
    assert missing.tolist() == [True, False, False, True, False, False]
    assert found.find_missing(batch, offsets(*range(6))).tolist() == [True] * 5 + [False]
    found.parts[0, 9].update(row_texts(stored))
    assert found.find_missing(batch, offsets(*range(10, 16))).all()  # rows of no part


def test_times_in_nanoseconds_are_compared() -> None:
    at = pa.array([1, 2], pa.timestamp("ns"))
    batch = pa.record_batch({"id": ["a", "b"], "at": at, "day": pa.array([1, None], pa.date32())})
    assert row_texts(batch) == ["(1, 1, 'a')", "(2, None, 'b')"]


class Longbow:
    """Counts calls, and the time that passes between them."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.num_calls = 0
        self.running_time = RunningTime(self.call, sleep=self.slept.append)
        self.during: Callable[[], object] = lambda: None

    def call(self) -> None:
        self.num_calls += 1
        self.during()


def test_a_wait_takes_calls_that_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_time, "CONFIRM_S", 2.0)
    longbow = Longbow()
    longbow.running_time.start_wait().result(30)
    assert sum(longbow.slept) >= 2.0
    assert longbow.num_calls == len(longbow.slept) > 4  # a stop spoils one of them


def test_waits_share_calls_and_each_takes_its_own_time() -> None:
    longbow = Longbow()
    longbow.running_time.start_wait().result(30)
    alone = longbow.num_calls
    later: list[Future[None]] = []

    def during() -> None:
        if longbow.num_calls == alone + 3:
            later.append(longbow.running_time.start_wait())

    longbow.during = during
    longbow.running_time.start_wait().result(30)
    later[0].result(30)
    assert longbow.num_calls == 2 * alone + 2


def test_a_failure_is_followed_by_one_wait() -> None:
    longbow = Longbow()
    for _ in range(2):
        longbow.running_time.wait_after_failure()  # an earlier process may have failed
        assert longbow.num_calls == len(longbow.slept) < 12
    longbow.running_time.note_failure()
    longbow.running_time.wait_after_failure()
    assert longbow.num_calls > 12


def test_a_failure_during_the_wait_is_followed_by_another_wait() -> None:
    longbow = Longbow()
    longbow.during = longbow.running_time.note_failure
    longbow.running_time.wait_after_failure()
    num_calls = longbow.num_calls
    longbow.during = lambda: None
    longbow.running_time.wait_after_failure()
    assert longbow.num_calls == 2 * num_calls


@pytest.mark.parametrize("error", [StoreUnavailableError("gone"), MemoryError()])
def test_a_call_without_an_answer_ends_all_waits(error: Exception) -> None:
    longbow = Longbow()

    def during() -> None:
        if longbow.num_calls == 3:
            waits.append(longbow.running_time.start_wait())
            raise error

    longbow.during = during
    waits = [longbow.running_time.start_wait()]
    for number in range(2):
        with pytest.raises(type(error)):
            waits[number].result(30)
    assert longbow.num_calls == 3
    longbow.running_time.wait_after_failure()
    assert longbow.num_calls > 8
