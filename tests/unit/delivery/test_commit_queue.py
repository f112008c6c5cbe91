"""Decisions of a committer, without its thread, its store or a clock."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fletcher.config.delivery import DeliveryConfig
from fletcher.delivery.actions import (
    Acknowledged,
    Append,
    Failed,
    GiveUp,
    Open,
    Opening,
    Refused,
    Release,
    Rest,
    Settle,
    Staged,
    Stop,
    Unavailable,
    Wait,
    unexpected_failure,
)
from fletcher.delivery.append_size import AppendSize
from fletcher.delivery.breaker import Breaker
from fletcher.delivery.commit_queue import CommitQueue
from fletcher.delivery.groups import Group, Rows, SentGroups
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload, UploadTerms
from fletcher.errors import (
    ColumnTypeError,
    FletcherError,
    OverloadedError,
    RequestError,
    StoreUnavailableError,
)
from fletcher.stores.base import Unconfirmed, WriteMode

SCHEMA = pa.schema({"id": pa.int64()})
DELAY_S, RETRY_S, LINGER_S = 1.0, 32.0, 5.0
CONFIG = DeliveryConfig(
    group_rows=10,
    commit_rows=100,
    group_delay_ms=1000 * DELAY_S,
    store_retry_s=RETRY_S,
    store_timeout_s=60,
)
AWAY = StoreUnavailableError("the store is out", field="store")
BAD = ColumnTypeError("not this")


class Bench:
    """A queue, and the time in the test's hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        retry = DeliveryTiming().retry
        self.breaker = Breaker("s", retry, clock=lambda: self.now, jitter=lambda: 1.0)
        self.size = AppendSize(CONFIG.slow_append_s, retry, jitter=lambda: 1.0)
        self.queue = CommitQueue(CONFIG, "d", self.breaker, self.size, LINGER_S)

    def submit(self, one: Upload, first: int, num_rows: int, **fields: Any) -> Rows:
        fields = {"arrived": self.now, "num_bytes": num_rows, **fields}
        rows = Rows(
            one,
            SCHEMA,
            first,
            num_rows,
            failed=(),
            load_batch=lambda: pa.record_batch([[0] * num_rows], SCHEMA),
            on_released=lambda: None,
            **fields,
        )
        self.queue.waiting.append_rows(rows)
        return rows

    def request(self, mode: WriteMode | None = None) -> Opening:
        """An opening, or a replacement of the dataset."""
        opening = Opening(staged=Staged("d.staged", "i", []), requested=self.now)
        if mode is not None:
            opening = Opening(SCHEMA, mode, requested=self.now)
        self.queue.request_opening(opening)
        return opening

    def decide(self) -> Any:
        return self.queue.decide(self.now)

    def append(self) -> Append:
        """The next action, which is an append, at the time it is due."""
        action = self.decide()
        while isinstance(action, Wait):
            self.now = action.until
            action = self.decide()
        assert isinstance(action, Append)
        return action

    def note(self, action: Any, outcome: Any = None) -> None:
        self.queue.note_outcome(action, outcome, self.now)

    def store(
        self, action: Append, num_groups: int, seconds: float, *, slow_down: bool = False
    ) -> None:
        """The store takes the first groups of an append, and they are settled."""
        sent = SentGroups(action.groups[:num_groups], slow_down)
        self.note(action, Acknowledged(sent, seconds))
        settle = self.decide()
        assert settle == Settle(list(sent.groups), sent=sent)
        self.note(settle, [])

    def fail(self, error: FletcherError = AWAY, caller: str = "d") -> None:
        """A call to the store fails."""
        with suppress(FletcherError), self.breaker.guard_call(caller):
            raise error


@pytest.fixture
def bench() -> Bench:
    return Bench()


def upload(name: str = "u", mode: WriteMode = "append", dedupe_by: str | None = None) -> Upload:
    return Upload("d", name, UploadTerms("store", mode, dedupe_by))


def keys(action: Append) -> list[str]:
    return [group.batch_key for group in action.groups]


def test_an_idle_committer_offers_to_end_and_goes_on_if_it_may_not(bench: Bench) -> None:
    assert bench.decide() == Wait(bench.now + LINGER_S)
    bench.now += LINGER_S - 1
    assert bench.decide() == Wait(bench.now + 1)
    bench.now += 1
    action = bench.decide()
    assert action == Rest()
    assert bench.queue.idle
    bench.note(action, False)
    assert bench.decide() == Wait(bench.now + LINGER_S)
    bench.now += LINGER_S
    bench.note(bench.decide(), True)
    assert bench.decide() == Stop([])


def test_rows_wait_for_others_to_fill_their_group(bench: Bench) -> None:
    one = upload()
    bench.submit(one, 0, 4)
    assert bench.decide() == Wait(bench.now + DELAY_S)
    bench.now += DELAY_S / 2
    bench.submit(one, 4, 4)
    assert bench.decide() == Wait(bench.now + DELAY_S / 2)
    bench.now += DELAY_S / 2
    action = bench.decide()
    assert keys(action) == ["u:0-7"]
    assert action.full is False
    assert not bench.queue.idle
    bench.store(action, 1, 0.1)
    assert bench.queue.idle


@pytest.mark.parametrize("num_bytes", [1, 40 << 20])
def test_rows_that_fill_an_append_wait_for_no_others(bench: Bench, num_bytes: int) -> None:
    one = upload()
    num_rows = 60 if num_bytes == 1 else 1
    bench.submit(one, 0, num_rows, num_bytes=num_bytes)
    bench.submit(one, num_rows, num_rows, num_bytes=num_bytes)
    action = bench.decide()
    assert isinstance(action, Append)
    assert action.full is True  # one of them alone
    bench.store(action, len(action.groups), 0.1)
    assert isinstance(bench.decide(), Append if num_bytes > 1 else Wait)


def test_a_flush_lasts_until_nothing_waits(bench: Bench) -> None:
    one = upload()
    bench.queue.request_flush()
    bench.decide()  # nothing waits
    bench.submit(one, 0, 1)
    assert isinstance(bench.decide(), Wait)
    bench.queue.request_flush()
    action = bench.decide()
    assert isinstance(action, Append)
    bench.submit(one, 1, 1)
    bench.store(action, 1, 0.1)
    assert keys(bench.decide()) == ["u:1-1"]


def test_an_opening_goes_before_rows(bench: Bench) -> None:
    bench.submit(upload(), 0, 1)
    opening = bench.request("append")
    action = bench.decide()
    assert action == Open(opening)
    bench.note(action)
    assert isinstance(bench.decide(), Wait)


def test_an_overwrite_waits_for_earlier_rows_alone(bench: Bench) -> None:
    one = upload()
    bench.submit(one, 0, 1)
    opening = bench.request()
    bench.now += 0.1
    bench.submit(one, 10, 1)
    action = bench.decide()  # at once: somebody waits
    assert keys(action) == ["u:0-0", "u:10-10"]
    bench.submit(one, 20, 1)
    bench.store(action, 2, 0.1)
    assert bench.decide() == Open(opening)


def test_an_overwrite_waits_for_groups_that_were_sent_before(bench: Bench) -> None:
    opening = bench.request()
    bench.now += 0.1
    bench.submit(upload(), 0, 1)
    assert bench.decide() == Open(opening)
    again = bench.request()
    action = bench.append()
    bench.note(action, Unavailable(1, 0.1, AWAY))
    action = bench.append()
    bench.store(action, 1, 0.1)
    assert bench.decide() == Open(again)


def test_an_overwrite_waits_for_a_group_that_was_set_aside(bench: Bench) -> None:
    bench.submit(upload(), 0, 1, journaled=True)
    for _ in range(2):
        bench.note(bench.append(), Failed(1, 0.0, UNKNOWN))
    assert bench.queue.waiting.aside
    opening = bench.request()
    action = bench.append()
    assert keys(action) == ["u:0-0"]
    bench.store(action, 1, 0.0)
    assert bench.decide() == Open(opening)


def test_an_overwrite_that_was_cancelled_holds_nothing_up(bench: Bench) -> None:
    bench.submit(upload(), 0, 1)
    opening = bench.request()
    opening.ready.cancel()
    assert bench.decide() == Open(opening)


def test_groups_in_doubt_go_again_as_they_were(bench: Bench) -> None:
    one = upload()
    bench.submit(one, 0, 4)
    action = bench.append()
    bench.submit(one, 4, 4)
    bench.note(action, Unavailable(1, 0.5, AWAY))
    assert [group.in_doubt for group in action.groups] == [True]
    assert bench.queue.failing == (bench.now - 0.5, AWAY)
    assert bench.decide() == Wait(bench.size.ready_at)
    bench.now = bench.size.ready_at
    again = bench.decide()
    assert again.groups == action.groups
    assert again.full is True
    bench.store(again, 1, 0.1)
    assert bench.queue.failing is None
    assert keys(bench.append()) == ["u:4-7"]


def test_groups_that_could_not_be_sent_are_not_in_doubt(bench: Bench) -> None:
    bench.submit(upload(dedupe_by="id"), 0, 4)
    action = bench.append()
    bench.note(action, Unavailable(0, 0.2, AWAY))
    assert not action.groups[0].in_doubt
    assert bench.append().groups == action.groups


def test_groups_that_were_not_sent_go_next(bench: Bench) -> None:
    bench.submit(upload("a"), 0, 1)
    bench.submit(upload("b"), 0, 1)
    action = bench.append()
    bench.store(action, 1, 0.1)
    assert keys(bench.append()) == ["b:0-0"]
    assert bench.size.share == 1


@pytest.mark.parametrize("num_groups", [1, 2])
def test_an_append_that_was_full_makes_the_next_one_larger(bench: Bench, num_groups: int) -> None:
    one = upload()
    bench.size.share = 0.5
    for first in range(0, 100, 25):
        bench.submit(one, first, 25)
    action = bench.append()
    assert len(action.groups) == 2
    bench.store(action, num_groups, 0.1)
    assert (bench.size.share > 0.5) == (num_groups == 2)


def test_a_store_that_asks_for_a_rest_gets_it(bench: Bench) -> None:
    one = upload()
    bench.submit(one, 0, 1)
    bench.store(bench.append(), 1, 0.1, slow_down=True)
    bench.submit(one, 1, 1)
    bench.queue.request_flush()
    assert bench.decide() == Wait(bench.now + 0.1)


def test_a_group_that_is_refused_alone_is_rejected(bench: Bench) -> None:
    bench.submit(upload(dedupe_by="id"), 0, 1)
    action = bench.append()
    action.groups[0].decided = True
    bench.note(action, Refused(1, BAD))
    assert not bench.queue.idle
    assert bench.queue.has_decided_groups  # until the dedupe index knows
    rejection = bench.decide()
    assert rejection == Settle(action.groups, BAD)
    assert not bench.queue.has_decided_groups
    assert not bench.queue.idle
    bench.note(rejection)
    assert bench.queue.idle


def test_of_groups_that_are_refused_together_each_goes_alone(bench: Bench) -> None:
    for name in "abc":
        bench.submit(upload(name), 0, 1)
    action = bench.append()
    bench.note(action, Refused(2, BAD))
    sent = []
    for refused in (True, False, False):
        alone = bench.append()
        sent.append((keys(alone), alone.groups[0].in_doubt))
        if refused:
            bench.note(alone, Refused(1, BAD))
            bench.note(bench.decide())
        else:
            bench.store(alone, 1, 0.1)
    assert sent == [(["a:0-0"], True), (["b:0-0"], True), (["c:0-0"], False)]


UNKNOWN = unexpected_failure()


def test_groups_of_an_unknown_error_go_again_and_are_never_rejected(bench: Bench) -> None:
    bench.submit(upload("a"), 0, 1)
    bench.submit(upload("b"), 0, 1)
    action = bench.append()
    bench.note(action, Failed(2, 0.1, UNKNOWN))
    assert bench.queue.failing == (bench.now - 0.1, UNKNOWN)
    again = bench.append()  # together once more: most such errors pass
    assert again.groups == action.groups
    assert all(group.in_doubt for group in again.groups)
    bench.store(again, 2, 0.1)
    assert bench.queue.idle


def test_a_group_that_always_fails_by_itself_delays_no_others(bench: Bench) -> None:
    bench.submit(upload("bad"), 0, 1, journaled=True)
    bench.submit(upload("good"), 0, 1, journaled=True)
    began, stored, pauses = bench.now, [], []
    while bench.now < began + 60:
        action = bench.append()
        bad = [group for group in action.groups if group.rows[0].upload.upload_id == "bad"]
        if bad:
            pauses.append(bench.now)
            bench.note(action, Failed(len(action.groups), 0.0, UNKNOWN))
        else:
            stored += keys(action)
            bench.store(action, len(action.groups), 0.0)
            bench.submit(upload("good"), len(stored), 1, journaled=True)
    assert len(stored) > 30
    assert 5 < len(pauses) < 30  # again and again, with growing pauses
    assert not bench.queue.idle


def test_rows_that_replace_others_stay_in_order_after_an_unknown_error(bench: Bench) -> None:
    one = upload(mode="upsert")
    bench.submit(one, 0, 1, journaled=True)
    bench.submit(one, 1, 1, journaled=True)
    sent = []
    for _ in range(6):
        action = bench.append()
        sent.append(keys(action))
        bench.note(action, Failed(len(action.groups), 0.1, UNKNOWN))
    assert sent == [["u:0-0", "u:1-1"]] * 2 + [["u:0-0"]] * 4


def test_rows_in_memory_that_always_fail_are_given_up_while_others_are_stored(
    bench: Bench,
) -> None:
    bad = bench.submit(upload("bad"), 0, 1)
    for _ in range(2):
        bench.note(bench.append(), Failed(1, 0.0, UNKNOWN))
    failed_at = bench.now
    number = 0
    while True:
        action = bench.decide()
        if isinstance(action, GiveUp):
            break
        if isinstance(action, Wait):
            bench.submit(upload("good"), number, 1)
            number += 1
            bench.now = action.until
            continue
        is_bad = action.groups[0].rows[0] is bad
        if is_bad:
            bench.note(action, Failed(1, 0.0, UNKNOWN))
        else:
            bench.store(action, 1, 0.0)
    assert action.rows == [bad]
    assert action.in_doubt
    assert RETRY_S <= bench.now - failed_at <= RETRY_S + 10


def test_groups_that_could_not_be_settled_are_settled_again_and_not_sent(bench: Bench) -> None:
    one = upload(mode="upsert")
    bench.submit(one, 0, 1)
    action = bench.append()
    bench.note(action, Acknowledged(SentGroups(action.groups), 0.1))
    bench.note(bench.decide(), list(action.groups))
    bench.submit(one, 1, 1)
    bench.queue.request_flush()
    assert not bench.queue.idle
    for _ in range(2):
        waiting = bench.decide()  # later rows must not be settled before it
        assert isinstance(waiting, Wait)
        bench.now = waiting.until
        settle = bench.decide()
        assert settle == Settle(action.groups, ready_at=bench.now)
        bench.note(settle, list(action.groups))
    bench.now = bench.decide().until
    bench.note(bench.decide(), [])
    assert keys(bench.append()) == ["u:1-1"]


def test_a_refused_group_whose_file_cannot_be_written_waits_and_delays_no_others(
    bench: Bench,
) -> None:
    bench.submit(upload("bad"), 0, 1, journaled=True)
    action = bench.append()
    bench.note(action, Refused(1, BAD))
    settle = bench.decide()
    bench.note(settle, list(settle.groups))
    bench.submit(upload("good"), 0, 1)
    bench.queue.request_flush()
    assert keys(bench.decide()) == ["good:0-0"]


def test_an_outcome_that_is_noted_once_more_sends_nothing_twice(bench: Bench) -> None:
    bench.submit(upload("a"), 0, 1)
    bench.submit(upload("b"), 0, 1)
    action = bench.append()
    for _ in range(2):  # an error came after the groups were queued again
        bench.note(action, Unavailable(2, 0.1, AWAY))
    again = bench.append()
    assert {group.batch_key for group in again.groups} == {"a:0-0", "b:0-0"}
    for group in again.groups:
        group.num_settled = 1
    assert all(group.settled for group in bench.queue.waiting.sent)


def test_an_unavailable_store_is_called_when_its_breaker_says(bench: Bench) -> None:
    bench.submit(upload(), 0, 1)
    for _ in range(3):
        action = bench.append()
        bench.fail()
        bench.note(action, Unavailable(1, 0.0, AWAY))
    assert bench.decide() == Wait(bench.breaker.ready_at("d"))
    # While another dataset's committer tries, nobody else does.
    bench.now = bench.breaker.ready_at("d")
    with bench.breaker.guard_call("another"):
        assert bench.breaker.ready_at("d") == math.inf
        assert bench.decide() == Wait(bench.now + LINGER_S)
    assert isinstance(bench.decide(), Append)  # and its answer ends the pause of this one


def test_rows_in_memory_are_given_up_when_their_time_is_over(bench: Bench) -> None:
    kept, plain = upload("kept"), upload("plain")
    bench.submit(kept, 0, 1, journaled=True)
    first = bench.append()
    for _ in range(3):
        bench.fail()
    bench.note(first, Unavailable(1, 0.0, AWAY))
    rows = bench.submit(plain, 0, 1)
    began = bench.now
    while not isinstance(action := bench.decide(), GiveUp):
        if isinstance(action, Append):
            bench.fail()
            bench.note(action, Unavailable(len(action.groups), 0.0, AWAY))
        else:
            assert isinstance(action, Wait)
            bench.now = action.until
    assert bench.now >= began + RETRY_S
    assert (action.rows, action.error) == ([rows], AWAY)
    bench.note(action)
    assert bench.queue.failing is not None  # of the journaled rows
    assert not bench.queue.idle
    assert bench.append().groups == first.groups


def test_rows_that_were_given_up_do_not_end_the_next_ones_early(bench: Bench) -> None:
    bench.submit(upload(), 0, 1)
    bench.note(bench.append(), Unavailable(1, 0.0, OverloadedError("no", retry_after_ms=60_000)))
    failed = bench.now
    while isinstance(action := bench.decide(), Wait):
        bench.now = action.until
    assert isinstance(action, GiveUp)
    assert bench.now == failed + RETRY_S
    assert action.in_doubt
    assert isinstance(action.error, OverloadedError)
    bench.note(action)
    bench.submit(upload("next"), 0, 1)
    assert keys(bench.append()) == ["next:0-0"]


def test_rows_that_always_fail_do_not_end_the_next_ones_early(bench: Bench) -> None:
    # The dataset counted as failing afterwards, and its pause was longer than the time of the next
    # rows, which were given up without an attempt.
    config = dataclasses.replace(CONFIG, store_retry_s=0.1)
    jitter = [0.0]
    bench.size = AppendSize(config.slow_append_s, DeliveryTiming().retry, jitter=lambda: jitter[0])
    bench.queue = CommitQueue(config, "d", bench.breaker, bench.size, LINGER_S)
    bad = bench.submit(upload("bad"), 0, 1)
    for jitter[0] in [0.0] * 7 + [1.0]:  # only the last pause takes time
        bench.note(bench.append(), Failed(1, 0.0, UNKNOWN))
    action = bench.decide()
    assert isinstance(action, Wait)
    bench.now = action.until + 0.1  # a busy machine
    action = bench.decide()
    assert isinstance(action, GiveUp)
    assert action.rows == [bad]
    bench.note(action)
    bench.submit(upload("next"), 0, 1)
    assert keys(bench.append()) == ["next:0-0"]


@pytest.mark.parametrize("num_reads", range(6))
def test_the_store_may_become_available_in_the_midst_of_a_decision(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, num_reads: int
) -> None:
    # Other committers use the breaker at the same time.
    bench.submit(upload(), 0, 1, arrived=bench.now - RETRY_S)
    reads = [bench.now - RETRY_S] * num_reads
    monkeypatch.setattr(Breaker, "held_since", lambda *_: reads.pop() if reads else None)
    monkeypatch.setattr(Breaker, "ready_at", lambda *_: math.inf)
    action = bench.decide()
    assert isinstance(action, Append | GiveUp | Wait)


def test_overdue_rows_are_tried_where_they_may_be(bench: Bench) -> None:
    bench.submit(upload(), 0, 1)
    bench.note(bench.append(), Unavailable(1, 0.0, AWAY))
    bench.now += RETRY_S
    assert isinstance(bench.decide(), Append)


def test_overdue_rows_are_given_up_though_somebody_opens_the_dataset(bench: Bench) -> None:
    # They were taken out, and neither stored nor given up: their client waited for ever.
    rows = bench.submit(upload(), 0, 1)
    bench.note(bench.append(), Unavailable(1, 0.0, OverloadedError("no", retry_after_ms=60_000)))
    bench.now += RETRY_S
    opening = bench.request("append")
    action = bench.decide()
    assert action == Open(opening)
    bench.note(action)
    action = bench.decide()
    assert isinstance(action, GiveUp)
    assert action.rows == [rows]


def test_rows_of_failed_uploads_are_released_when_they_are_due(bench: Bench) -> None:
    failed, going, kept = upload("failed"), upload("going"), upload("kept")
    bench.submit(failed, 0, 1)
    action = bench.append()
    bench.note(action, Unavailable(1, 0.0, AWAY))
    bench.submit(going, 0, 1)
    bench.submit(kept, 0, 1, journaled=True)
    for one in (failed, kept):
        one.fail(RequestError("a bad row"))
    bench.now = bench.size.ready_at
    action = bench.decide()
    assert isinstance(action, Release)
    assert [rows.upload for rows in action.rows] == [failed]
    assert action.in_doubt
    bench.note(action)
    assert keys(bench.append()) == ["going:0-0"]


def test_rows_of_failed_uploads_can_be_removed_at_any_time(bench: Bench) -> None:
    failed = upload("failed")
    rows = bench.submit(failed, 0, 1)
    assert bench.queue.remove_abandoned() == ([], False)
    failed.fail(RequestError("a bad row"))
    assert bench.queue.remove_abandoned() == ([rows], False)
    assert bench.queue.idle


def test_rows_of_other_kinds_do_not_share_an_append(bench: Bench) -> None:
    bench.submit(upload("a"), 0, 1)
    bench.submit(upload("b", "upsert"), 0, 1)
    bench.submit(upload("c"), 0, 1, journaled=True)
    sent = []
    while bench.queue.waiting:
        action = bench.append()
        sent.append(keys(action))
        bench.store(action, len(action.groups), 0.1)
    assert sent == [["a:0-0"], ["b:0-0"], ["c:0-0"]]


def test_sent_groups_of_other_kinds_or_that_go_alone_do_not_share_an_append(bench: Bench) -> None:
    modes: dict[str, WriteMode] = {"a": "append", "b": "upsert", "c": "upsert", "d": "upsert"}
    groups = [Group([bench.submit(upload(name, mode), 0, 1)]) for name, mode in modes.items()]
    groups[2].alone = True
    bench.queue.waiting.remove_all()
    bench.queue.waiting.put_back(groups)
    sent = []
    while bench.queue.waiting:
        action = bench.append()
        sent.append(keys(action))
        bench.store(action, len(action.groups), 0.1)
    assert sent == [["a:0-0"], ["b:0-0"], ["c:0-0"], ["d:0-0"]]


def test_marked_duplicates_hold_the_right_to_decide_until_their_group_is_settled(
    bench: Bench,
) -> None:
    bench.submit(upload(dedupe_by="id"), 0, 1)
    action = bench.append()
    action.groups[0].decided = True
    bench.note(action, Unavailable(1, 0.0, AWAY))
    assert bench.queue.has_decided_groups
    bench.store(bench.append(), 1, 0.1)
    assert not bench.queue.has_decided_groups


def test_rows_are_sent_while_earlier_ones_are_confirmed(bench: Bench) -> None:
    one = upload()
    bench.submit(one, 0, 1)
    first = bench.append()
    rows = Later(bench.now + 2.0)
    bench.note(first, Acknowledged(SentGroups(first.groups, unconfirmed=rows), 0.1))
    bench.submit(one, 1, 1)
    second = bench.append()
    assert bench.now < rows.ready_at
    bench.store(second, 1, 0.1)
    assert not bench.queue.idle
    assert bench.decide() == Wait(rows.ready_at)
    bench.now = rows.ready_at
    settle = bench.decide()
    assert isinstance(settle, Settle)
    assert settle.groups == first.groups
    bench.note(settle, [])
    assert bench.queue.idle


def test_rows_that_cannot_be_confirmed_are_in_doubt(bench: Bench) -> None:
    bench.submit(upload(), 0, 1)
    action = bench.append()
    rows = Later(bench.now + 2.0)
    bench.note(action, Acknowledged(SentGroups(action.groups, unconfirmed=rows), 0.1))
    bench.now = rows.ready_at
    bench.note(bench.decide(), Unavailable(1, 0.0, AWAY))
    assert bench.queue.failing == (bench.now, AWAY)
    again = bench.append()
    assert again.groups == action.groups
    assert again.groups[0].in_doubt
    # A store that acknowledges rows and loses them again and again is given up after a time.
    bench.note(again, Acknowledged(SentGroups(again.groups, unconfirmed=rows), 0.1))
    assert bench.queue.failing is not None
    bench.note(bench.decide(), [])
    assert bench.queue.failing is None


@pytest.mark.parametrize("decided", [True, False])
def test_unconfirmed_rows_delay_those_that_may_replace_them(bench: Bench, decided: bool) -> None:
    one = upload(dedupe_by="id") if decided else upload(mode="upsert")
    bench.submit(one, 0, 1)
    action = bench.append()
    action.groups[0].decided = decided
    rows = Later(bench.now + 2.0)
    bench.note(action, Acknowledged(SentGroups(action.groups, unconfirmed=rows), 0.1))
    assert bench.queue.has_decided_groups == decided
    bench.submit(one, 1, 1)
    bench.queue.request_flush()
    assert bench.decide() == Wait(rows.ready_at)


def test_an_overwrite_waits_for_unconfirmed_rows(bench: Bench) -> None:
    bench.submit(upload(), 0, 1)
    action = bench.append()
    rows = Later(bench.now + 2.0)
    bench.note(action, Acknowledged(SentGroups(action.groups, unconfirmed=rows), 0.1))
    opening = bench.request()
    assert bench.decide() == Wait(rows.ready_at)
    bench.now = rows.ready_at
    bench.note(bench.decide(), [])
    assert bench.decide() == Open(opening)


def test_a_committer_that_is_closed_confirms_rows_first(bench: Bench) -> None:
    bench.submit(upload(), 0, 1)
    action = bench.append()
    rows = Later(bench.now + 2.0)
    bench.note(action, Acknowledged(SentGroups(action.groups, unconfirmed=rows), 0.1))
    bench.queue.stopped = True
    settle = bench.decide()
    assert isinstance(settle, Settle)
    assert settle.groups == action.groups
    bench.note(settle, [])
    assert bench.decide() == Stop([])


def test_a_committer_that_is_closed_gives_up_all_it_has(bench: Bench) -> None:
    rows = [bench.submit(upload(name), 0, 1) for name in "abc"]
    bench.note(bench.append(), Refused(1, BAD))  # of three, the first
    opening = bench.request()
    bench.queue.stopped = True
    settle = bench.decide()
    assert isinstance(settle, Settle)
    bench.note(settle, list(settle.groups))  # and cannot be settled now
    assert bench.decide() == Stop(rows, (opening,))
    assert bench.decide() == Stop([])


class Later(Unconfirmed):
    """Rows that can be confirmed from some time on."""

    def __init__(self, ready_at: float) -> None:
        self.ready_at = ready_at


FATES = ("stored", "stored", "before", "after", "none", "unknown")
ERRORS = (AWAY, OverloadedError("too much"), StoreUnavailableError("no", retry_after_ms=3000))


class World:
    """A store that does what chance says, and all that becomes of rows."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.bench = Bench()
        self.stored: list[tuple[str, int, int]] = []
        self.set_aside: set[tuple[str, int]] = set()  # groups that failed by themselves
        self.keys: dict[tuple[str, int], str] = {}  # of rows that were sent
        self.released: Counter[tuple[str, int]] = Counter()
        self.rejected: set[str] = set()

    def submit(self, one: Upload, first: int, num_rows: int, *, journaled: bool) -> None:
        self.bench.submit(one, first, num_rows, journaled=journaled)

    def step(self, *, calm: bool) -> None:
        """Carries out the next action; calm: the store takes what it does not refuse."""
        bench = self.bench
        action = bench.decide()
        match action:
            case Wait(until):
                assert until >= bench.now
                bench.now = until
                return
            case Append(groups):
                bench.note(action, self.append(groups, calm=calm))
                return
            case Settle(groups, error, sent):
                if sent is not None and not calm and self.chance.random() < 0.2:
                    bench.note(action, self.lose(groups))
                    return
                if not calm and self.chance.random() < 0.3:
                    bench.note(action, list(groups))
                    return
                for group in groups:
                    if error is not None:
                        self.rejected.add(group.rows[0].upload.upload_id)
                        group.rows[0].upload.fail(error)
                    self.settle(group)
            case GiveUp(rows, error):
                assert not any(one.journaled for one in rows)
                for one in rows:
                    one.upload.fail(error)
                self.release(rows)
            case Release(rows):
                assert not any(one.journaled for one in rows)
                self.release(rows)
            case Rest():
                pass
            case _:
                raise AssertionError(action)
        bench.note(action)

    def release(self, rows: list[Rows]) -> None:
        self.released.update((one.upload.upload_id, one.first) for one in rows)

    def append(self, groups: list[Any], *, calm: bool) -> Any:
        bench, chance = self.bench, self.chance
        seconds = chance.choice([0.0, 0.1, 20.0])
        fate = "stored" if calm else chance.choice(FATES)
        if fate == "none":
            return Unavailable(0, seconds, AWAY)
        num_groups = chance.randint(1, len(groups))
        going = groups[:num_groups]
        for group in going:
            for rows in group.rows:
                name = rows.upload.upload_id
                for row in range(rows.first, rows.last + 1):
                    assert self.keys.setdefault((name, row), group.batch_key) == group.batch_key
        bench.now += seconds
        if fate == "before":
            error = chance.choice(ERRORS)
            bench.fail(error)
            return Unavailable(num_groups, seconds, error)
        if fate == "unknown":
            return Failed(num_groups, seconds, unexpected_failure())
        if any(group.rows[0].upload.upload_id == "bad" for group in going):
            bench.fail(BAD)
            return Refused(num_groups, BAD)
        for group in going:
            one = (group.rows[0].upload.upload_id, group.first, group.last)
            if not (group.in_doubt and one in self.stored):
                self.stored.append(one)
                if group.num_failures:
                    self.set_aside.add(one[:2])
        if fate == "after":
            bench.fail(AWAY)
            return Unavailable(num_groups, seconds, AWAY)
        if chance.random() < 0.1 and not calm:  # a defect of the store's client
            return Failed(num_groups, seconds, unexpected_failure())
        with bench.breaker.guard_call("d"):
            pass
        rows = Later(bench.now + chance.choice([0.0, 0.3, 2.0])) if chance.random() < 0.5 else None
        return Acknowledged(SentGroups(going, chance.random() < 0.1, rows), seconds)

    def lose(self, groups: list[Group]) -> Any:
        """The store cannot confirm rows, and may have lost them."""
        for group in groups:
            one = (group.rows[0].upload.upload_id, group.first, group.last)
            if self.chance.random() < 0.5 and not group.upsert:
                self.stored.remove(one)
                self.set_aside.add(one[:2])
        if self.chance.random() < 0.2:
            return Failed(len(groups), 0.0, unexpected_failure())
        self.bench.fail(AWAY)
        return Unavailable(len(groups), 0.0, AWAY)

    def settle(self, group: Group) -> None:
        group.num_settled = len(group.rows)
        self.release(group.rows)


@settings(max_examples=300, deadline=None)
@given(chance=st.randoms(use_true_random=False))
def test_random_outcomes_never_lose_double_or_reorder_rows(chance: random.Random) -> None:
    """Later rows may overtake only an append that failed by itself, never rows that replace."""
    world = World(chance)
    modes = {name: chance.choice(["append", "upsert"]) for name in ("a", "b", "c", "bad")}
    uploads = {name: upload(name, mode) for name, mode in modes.items()}
    journaled = {name: chance.random() < 0.5 for name in uploads}
    submitted: dict[str, list[tuple[int, int]]] = {name: [] for name in uploads}
    for _ in range(60):
        name = chance.choice(list(uploads))
        if uploads[name].failure is None and chance.random() < 0.5:
            first = submitted[name][-1][1] + 1 if submitted[name] else 0
            last = first + chance.randint(1, 15) - 1
            submitted[name].append((first, last))
            world.submit(uploads[name], first, last - first + 1, journaled=journaled[name])
        if chance.random() < 0.05:
            world.bench.queue.request_flush()
        world.step(calm=False)
    while not world.bench.queue.idle:
        world.step(calm=True)
    for name, one in uploads.items():
        ranges = submitted[name]
        # Each entry's memory is given back once.
        for first, _ in ranges:
            assert world.released[name, first] == 1
        mine = [(first, last) for its, first, last in world.stored if its == name]
        rows = [row for first, last in mine for row in range(first, last + 1)]
        firsts = [first for first, _ in mine]
        for place, first in enumerate(firsts):
            late = modes[name] == "append" and (name, first) in world.set_aside
            assert late or firsts[:place] == [one for one in firsts[:place] if one < first]
        rows.sort()
        if journaled[name] and name not in world.rejected:
            assert one.failure is None
        if one.failure is None:
            assert rows == list(range(ranges[-1][1] + 1 if ranges else 0))
        else:  # what was given up may be missing
            assert rows == sorted(set(rows))
