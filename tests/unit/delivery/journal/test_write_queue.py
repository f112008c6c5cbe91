"""Decisions of a journal writer, without its thread, its disk or a clock."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fletcher.delivery.actions import CloseSegment, GiveUp, Stop, Unwritten, Wait, Write
from fletcher.delivery.groups import Rows
from fletcher.delivery.journal import writer
from fletcher.delivery.journal.writer import WriteQueue
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload, UploadTerms
from fletcher.errors import InternalError, JournalFullError

SCHEMA = pa.schema({"id": pa.int64()})
OTHER = pa.schema({"other": pa.int64()})
PATIENCE_S = 10.0
TIMING = DeliveryTiming(segment_idle_s=1.0, journal_poll_s=0.25)
FULL = JournalFullError("no room")
BROKEN = InternalError("the journal failed")


def rows(
    first: int, num_rows: int = 1, schema: pa.Schema = SCHEMA, dedupe_by: str | None = None
) -> Rows:
    upload = Upload("d", "u", UploadTerms("journal", dedupe_by=dedupe_by))
    batch = pa.record_batch([[0] * num_rows], schema)
    return Rows.from_batch(upload, batch, first, (), lambda: None)


@pytest.fixture
def queue() -> WriteQueue:
    return WriteQueue(PATIENCE_S, TIMING)


def test_nothing_is_done_before_rows_come(queue: WriteQueue) -> None:
    assert queue.idle
    assert queue.decide(0.0) == Wait(math.inf)


def test_rows_are_written_together_and_then_the_segment_is_closed_once(queue: WriteQueue) -> None:
    both = [rows(0), rows(1)]
    for one in both:
        queue.append_rows(one)
    action = queue.decide(0.0)
    assert action == Write(both)
    assert not queue.idle
    queue.note_outcome(action, None, 0.5)
    assert queue.idle
    assert queue.decide(0.5) == Wait(1.5)
    assert queue.decide(1.5) == CloseSegment()
    queue.note_outcome(CloseSegment(), None, 1.5)
    assert queue.decide(1.5) == Wait(math.inf)


def test_one_sync_is_for_one_schema_one_kind_of_key_and_so_many_rows(
    queue: WriteQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_SYNC_ROWS", 10)
    for one in (
        rows(0, 20),
        rows(20, 5),
        rows(25, 5),
        rows(30, 1),
        rows(31, 1, OTHER),
        rows(32, 1, OTHER, "id"),
        rows(33, 1, OTHER, "id"),
    ):
        queue.append_rows(one)
    written = []
    while not queue.idle:
        action = queue.decide(0.0)
        assert isinstance(action, Write)
        written.append([one.first for one in action.rows])
        queue.note_outcome(action, None, 0.0)
    assert written == [[0], [20, 25], [30], [31], [32, 33]]


def test_rows_that_find_no_room_are_tried_again_after_room_is_made(queue: WriteQueue) -> None:
    first, second = rows(0), rows(1)
    queue.append_rows(first)
    queue.append_rows(second)
    action = queue.decide(0.0)
    queue.append_rows(rows(2))
    queue.note_outcome(action, Unwritten([second], FULL, retryable=True), 1.0)
    assert not queue.idle
    assert queue.decide(1.0) == CloseSegment(flush=True)
    assert not queue.idle
    assert queue.decide(1.0) == Wait(1.25)
    assert queue.decide(1.25) == Write([second])
    queue.note_outcome(Write([second]), None, 1.3)
    action = queue.decide(1.3)
    assert isinstance(action, Write)
    assert [one.first for one in action.rows] == [2]


def test_rows_that_find_no_room_for_too_long_are_given_up(queue: WriteQueue) -> None:
    one = rows(0)
    queue.append_rows(one)
    now = 0.0
    num_tries = 0
    while not isinstance(action := queue.decide(now), GiveUp):
        if isinstance(action, Write):
            num_tries += 1
            queue.note_outcome(action, Unwritten(action.rows, FULL, retryable=True), now)
        elif isinstance(action, Wait):
            now = action.until
    assert now == PATIENCE_S + 0.25
    assert num_tries == 4 * PATIENCE_S + 2
    assert action == GiveUp([one], FULL)
    assert not queue.idle
    queue.note_outcome(action, None, now)
    assert queue.idle


def test_rows_that_fail_otherwise_are_given_up_at_once(queue: WriteQueue) -> None:
    one = rows(0)
    queue.append_rows(one)
    action = queue.decide(0.0)
    queue.note_outcome(action, Unwritten([one], BROKEN, retryable=False), 0.0)
    assert not queue.idle
    assert queue.decide(0.0) == GiveUp([one], BROKEN)


@pytest.mark.parametrize("retryable", [True, False])
def test_a_writer_that_is_closed_gives_up_all_it_has(queue: WriteQueue, retryable: bool) -> None:
    tried, waiting, other = rows(0), rows(1), rows(2, 1, OTHER)
    queue.append_rows(tried)
    action = queue.decide(0.0)
    queue.append_rows(waiting)
    queue.append_rows(other)
    queue.stopped = True
    queue.note_outcome(action, Unwritten([tried], FULL, retryable), 0.0)
    assert queue.decide(0.0) == Stop([tried, waiting, other])
    assert queue.decide(0.0) == Stop([])
    assert queue.idle


@settings(max_examples=200, deadline=None)
@given(chance=st.randoms(use_true_random=False))
def test_random_outcomes_never_lose_double_or_reorder_rows(chance: random.Random) -> None:
    queue = WriteQueue(PATIENCE_S, TIMING)
    now = 0.0
    num_submitted = 0
    written: list[int] = []
    ends: Counter[int] = Counter()

    def step(*, calm: bool) -> None:
        nonlocal now
        action: Any = queue.decide(now)
        outcome = None
        match action:
            case Wait(until):
                assert until > now
                now = until if until < math.inf else now + 1
                return
            case Write(taken):
                now += chance.choice([0.0, 0.1, 5.0])
                fate = "done" if calm else chance.choice(["done", "full", "broken"])
                abandoned = chance.randrange(len(taken)) if chance.random() < 0.1 else 0
                ends.update(one.first for one in taken[:abandoned])
                taken = taken[abandoned:]
                if fate == "done":
                    written.extend(one.first for one in taken)
                    ends.update(one.first for one in taken)
                else:
                    error = FULL if fate == "full" else BROKEN
                    outcome = Unwritten(taken, error, retryable=fate == "full")
            case GiveUp(taken):
                ends.update(one.first for one in taken)
            case CloseSegment():
                pass
            case _:
                raise AssertionError(action)
        queue.note_outcome(action, outcome, now)

    for _ in range(60):
        if chance.random() < 0.4:
            schema, kind = chance.choice([SCHEMA, OTHER]), chance.choice([None, "id"])
            queue.append_rows(rows(num_submitted, 1, schema, kind))
            num_submitted += 1
        step(calm=False)
    while not queue.idle:
        step(calm=True)
    assert written == sorted(set(written))
    assert ends == Counter(range(num_submitted))
