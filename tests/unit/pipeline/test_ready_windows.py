"""Turns of planned windows, sizes of windows, and the work of streams that were closed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fletcher.core.batches import EmbeddingBatch, InferenceResult, Priority, TextBatch, TokenBatch
from fletcher.pipeline.batch_window import BatchWindow
from fletcher.pipeline.device_usage import DeviceUsage
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.ready_windows import ReadyWindows
from fletcher.pipeline.scheduler import BatchingConfig, ModelShape, Runners, Scheduler
from fletcher.pipeline.stream import EmbedStream, StreamTicket
from fletcher.pipeline.window_size import WindowSize
from fletcher.telemetry.tracing import Telemetry


def single_rows(lengths: Any) -> list[Any]:
    return [np.array([row]) for row in range(len(lengths))]


def one_run(lengths: Any) -> list[Any]:
    return [np.arange(len(lengths))]


def scheduler(plan: Any = single_rows, rate: float = 0.0, window_tokens: int = 100) -> Scheduler:
    telemetry = Telemetry()
    return Scheduler(
        ModelShape(dim=2),
        BatchingConfig(lambda lengths, _: plan(lengths), window_tokens, max_queue_delay_s=0),
        DeviceUsage(telemetry, ""),
        telemetry,
        Runners(rate=lambda: rate),
    )


def submit(
    owner: Scheduler, *lengths: int, stream: EmbedStream | None = None, priority: Priority = "bulk"
) -> EmbedStream:
    """Add a tokenized ticket with one text for each length."""
    tickets: list[StreamTicket] = []
    budget = MemoryBudget(1 << 20, 4)
    stream = stream or EmbedStream(
        budget.open_allowance(), tickets.append, None, owner.remove_stream
    )
    ticket = StreamTicket(stream, TextBatch(b"", np.zeros(1, np.int64)), None, 1, priority)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ticket.tokens = TokenBatch(
        np.zeros(offsets[-1], np.int32), offsets, np.zeros(len(lengths), np.bool_)
    )
    stream._tickets.append(ticket)
    owner.add_ticket(ticket)
    return stream


def lengths_of(owner: Scheduler, number: int = 100, *, urgent: bool = False) -> list[list[int]]:
    """The lengths in the next jobs, at most `number` of them."""
    found = []
    for _ in range(number):
        job = owner.inference.schedule(urgent=urgent)
        if job is None:
            break
        found.append(job.payload.lengths.tolist())
    return found


@pytest.mark.parametrize("priority", ["bulk", "interactive"])
def test_a_stream_that_comes_later_takes_turns_with_a_large_one(
    priority: Priority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fletcher.pipeline.scheduler._NEW_STREAMS_S", 0.0)
    owner, urgent = scheduler(), priority == "interactive"
    large = submit(owner, *[9] * 10, priority=priority)
    assert lengths_of(owner, 2, urgent=urgent) == [[9], [9]]
    small = submit(owner, 1, 1, priority=priority)
    # More of the large stream waits for its turn: the stream has a window.
    submit(owner, 7, stream=large, priority=priority)
    assert lengths_of(owner, 5, urgent=urgent) == [[9], [1], [9], [1], [9]]
    assert sorted(lengths_of(owner, urgent=urgent)) == [[7], *[[9]] * 5]
    assert not small.closed


def test_new_bulk_streams_are_planned_together_after_a_while() -> None:
    owner = scheduler(window_tokens=640)
    streams = [submit(owner, *[9] * 4)]
    assert lengths_of(owner, 1) == [[9]]
    streams += [submit(owner, 1), submit(owner, 2)]
    owner.inference._ready_bulk.planned_at -= 1  # a second passes
    assert lengths_of(owner) == [[9], [1], [9], [2], [9]]


def test_a_few_texts_do_not_wait_for_a_window_of_many() -> None:
    owner = scheduler(window_tokens=640)
    streams = [submit(owner, *[9] * 5), submit(owner, 8), submit(owner, 7)]
    jobs = lengths_of(owner)
    assert jobs.index([7]) < 4  # the two with few tokens share a window
    assert sorted(jobs) == [[7], [8], *[[9]] * 5]
    assert not streams[0].closed


@pytest.mark.parametrize(
    ("rate", "planned"), [(0.0, [6, 6, 6]), (7.0, [6]), (13.0, [6, 6]), (1e9, [6, 6, 6])]
)
def test_a_window_takes_about_a_second(rate: float, planned: list[int]) -> None:
    owner = scheduler(one_run, rate, window_tokens=40)
    streams = [submit(owner, 6) for _ in range(3)]
    assert lengths_of(owner, 1) == [planned]
    assert len(streams) == 3


@pytest.mark.parametrize(
    ("rate", "under_pressure", "waiting", "size"),
    [
        (0.0, False, 9000, 800),  # not measured
        (500.0, False, 9000, 500),
        (5.0, False, 9000, 100),  # eight runs of 64
        (5000.0, False, 9000, 800),
        (5000.0, True, 9000, 3200),
        (2000.0, True, 9000, 2000),
        (500.0, True, 9000, 500),
    ],
)
def test_sizes_of_windows(rate: float, under_pressure: bool, waiting: int, size: int) -> None:
    assert WindowSize(800, lambda: rate, lambda: under_pressure).next_bulk(waiting) == size


def test_a_closed_stream_leaves_every_queue_at_once() -> None:
    owner = scheduler(one_run)
    gone = submit(owner, 5, 5)
    waiting = submit(owner, 3, 3)
    assert lengths_of(owner, 0) == []
    untokenized = StreamTicket(gone, TextBatch(b"abc", np.array([0, 3])), None, 1, "bulk")
    owner.add_ticket(untokenized)
    assert (owner.tokenization.depth(), owner.inference.depth()) == (1, 16)
    gone.close()
    assert (owner.tokenization.depth(), owner.inference.depth()) == (0, 6)
    assert not owner.tokenization.busy
    owner.add_ticket(untokenized)  # one that was on its way
    submit(owner, 4, stream=gone)
    assert (owner.tokenization.depth(), owner.inference.depth()) == (0, 6)
    assert lengths_of(owner) == [[3, 3]]
    assert not waiting.closed


def test_planned_rows_of_a_closed_stream_are_not_computed_and_reach_no_cache() -> None:
    owner = scheduler(lambda lengths: [np.array([0, 2]), np.array([1])])
    gone, stays = submit(owner, 1, 2), submit(owner, 3)
    cached: list[Any] = []
    gone._tickets[0].complete = lambda result: cached.append(result) or result  # type: ignore
    first = owner.inference.schedule(urgent=False)
    assert first is not None
    gone.close()
    assert owner.inference.schedule(urgent=False) is None  # the row of `gone` alone
    owner.inference.update(first, InferenceResult(np.ones((2, 2), np.float32), None, 0.0), None)
    assert not cached
    stays.end()
    (result,) = stays.results()
    assert isinstance(result.embeddings, EmbeddingBatch)
    assert result.embeddings.embeddings.tolist() == [[1, 1]]


def test_planned_windows_of_closed_streams_alone_leave_at_once() -> None:
    owner = scheduler()
    streams = [submit(owner, *[9] * 4)]
    assert lengths_of(owner, 1) == [[9]]
    assert owner.inference.planned() == 3
    streams[0].close()
    assert owner.inference.planned() == 0
    assert lengths_of(owner) == []
    assert not owner.inference._ready_bulk.has_stream(streams[0])


def test_a_micro_batch_keeps_the_rows_of_open_streams() -> None:
    owner = scheduler(one_run)
    streams = [submit(owner, 1), submit(owner, 2, 3), submit(owner, 4)]
    tickets = [stream._tickets[0] for stream in streams]
    ready = ReadyWindows()
    ready.add_windows([BatchWindow(tickets, 2, one_run)])
    assert ready.has_stream(streams[1])
    streams[1].close()
    planned = ready.next_batch()
    assert planned is not None
    assert planned.rows.tolist() == [0, 3]
    assert not ready.has_stream(streams[0])
    assert len(ready) == 0
