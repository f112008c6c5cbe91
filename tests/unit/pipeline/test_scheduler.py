"""Scheduling of tickets, and results back; no thread takes part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fletcher.core.batches import (
    EmbeddingBatch,
    InferenceResult,
    Priority,
    Spans,
    TextBatch,
    TokenBatch,
)
from fletcher.core.chunking import Chunking
from fletcher.errors import InternalError, OverloadedError
from fletcher.pipeline.batch_window import BatchWindow
from fletcher.pipeline.device_usage import DeviceUsage
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.ready_windows import PlannedBatch, ReadyWindows
from fletcher.pipeline.scheduler import BatchingConfig, InferenceStage, ModelShape, Scheduler
from fletcher.pipeline.stream import EmbedStream, StreamTicket
from fletcher.telemetry.tracing import Telemetry
from fletcher.workers.health import Health


def one_run(lengths: Any) -> list[Any]:
    return [np.arange(len(lengths))]


def broken(lengths: Any) -> list[Any]:
    raise ZeroDivisionError


def make(plan: Any, num_layers: int = 0, **batching: Any) -> InferenceStage:
    """The second stage of a scheduler."""
    return scheduler(plan, num_layers, **batching).inference


def scheduler(plan: Any, num_layers: int = 0, **batching: Any) -> Scheduler:
    telemetry = Telemetry()
    options = {"window_tokens": 100, "max_queue_delay_s": 0, **batching}
    return Scheduler(
        ModelShape(dim=2, num_layers=num_layers),
        BatchingConfig(lambda lengths, _: plan(lengths), **options),
        DeviceUsage(telemetry, ""),
        telemetry,
    )


def tokenized(
    num_tokens: int = 2, priority: Priority = "bulk", layers: int = 0, *, half: bool = False
) -> tuple[EmbedStream, StreamTicket]:
    """A ticket of one text with some tokens, waiting in its stream."""
    tickets: list[StreamTicket] = []
    stream = EmbedStream(MemoryBudget(1 << 20, 1).open_allowance(), tickets.append)
    texts = TextBatch(b"hi", np.array([0, 2]), layers=layers, half=half)
    stream.submit(texts, None, num_bytes=10, priority=priority)
    stream.end()
    tokens = TokenBatch(
        np.ones(num_tokens, np.int32), np.array([0, num_tokens]), np.zeros(1, np.bool_)
    )
    tickets[0].tokens = tokens
    return stream, tickets[0]


@pytest.mark.parametrize("urgent", [False, True])
def test_a_window_that_cannot_be_planned_ends_its_calls_alone(urgent: bool) -> None:
    # The error went on to the pool's dispatcher and ended it, and the tickets were lost.
    stage = make(broken)
    stream, ticket = tokenized(priority="interactive" if urgent else "bulk")
    stage.add_ticket(ticket)
    assert stage.schedule(urgent=urgent) is None
    with pytest.raises(OverloadedError, match="unexpected way"):
        list(stream.results())


def failing(*_: Any, **__: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize("urgent", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (BatchWindow, "__init__"),
        (InferenceStage, "_job"),
        (ReadyWindows, "_forget"),
        (BatchWindow, "wanted_rows"),
        (PlannedBatch, "__init__"),
    ],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
def test_a_step_that_fails_ends_its_calls_alone(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, urgent: bool
) -> None:
    # Neither queue nor window held the tickets then, and their calls waited for ever.
    stage = make(one_run)
    stream, ticket = tokenized(priority="interactive" if urgent else "bulk")
    stage.add_ticket(ticket)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        assert stage.schedule(urgent=urgent) is None
    with pytest.raises(OverloadedError, match="unexpected way"):
        list(stream.results())
    _, other = tokenized(priority="interactive" if urgent else "bulk")
    stage.add_ticket(other)
    assert stage.schedule(urgent=urgent) is not None


def test_a_micro_batch_that_cannot_be_formed_ends_its_calls_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = make(one_run)
    stream, ticket = tokenized()
    stage.add_ticket(ticket)
    with monkeypatch.context() as patched:
        patched.setattr(BatchWindow, "micro_batch", failing)
        assert stage.schedule(urgent=False) is None
    with pytest.raises(OverloadedError, match="unexpected way"):
        list(stream.results())
    _, other = tokenized()
    stage.add_ticket(other)
    assert stage.schedule(urgent=False) is not None


def test_a_result_that_cannot_be_taken_ends_its_calls_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = make(one_run)
    stream, ticket = tokenized()
    stage.add_ticket(ticket)
    job = stage.schedule(urgent=False)
    assert job is not None
    monkeypatch.setattr(BatchWindow, "take_result", failing)
    stage.update(job, None, InternalError("lost"))
    with pytest.raises(OverloadedError, match="unexpected way"):
        list(stream.results())


def test_texts_that_leave_after_one_layer_run_together_and_no_others_with_them() -> None:
    stage = make(one_run, num_layers=12, window_tokens=6400)
    held = []
    for num_tokens, layers in enumerate([3, 0, 6, 3, 0, 3], 1):
        stream, ticket = tokenized(num_tokens, layers=layers)
        held.append(stream)
        stage.add_ticket(ticket)
    runs = {}
    while (job := stage.schedule(urgent=False)) is not None:
        assert job.payload.layers not in runs
        runs[job.payload.layers] = sorted(job.payload.lengths.tolist())
    assert runs == {3: [1, 4, 6], 0: [2, 5], 6: [3]}


def test_vectors_wanted_in_float16_come_and_go_as_such_beside_others() -> None:
    stage = make(one_run)
    streams = {}
    for half in (True, False):
        streams[half], ticket = tokenized(half=half)
        stage.add_ticket(ticket)
    while (job := stage.schedule(urgent=False)) is not None:
        kind = np.float16 if job.payload.half else np.float32
        vectors = np.full((len(job.payload.lengths), 2), 0.1, kind)
        stage.update(job, InferenceResult(vectors, None, 0.0), None)
    for half, stream in streams.items():
        (result,) = stream.results()
        assert isinstance(result.embeddings, EmbeddingBatch)
        kind = np.float16 if half else np.float32
        assert result.embeddings.embeddings.dtype == kind
        assert np.array_equal(result.embeddings.embeddings, np.full((1, 2), 0.1, kind))


def test_a_run_that_says_no_budget_leaves_the_devices_own(caplog: pytest.LogCaptureFixture) -> None:
    # One in the front process does not: it looked as if the device's memory were out.
    stage = make(one_run)
    for budget in (1024, 0):
        stream, ticket = tokenized()
        stage.add_ticket(ticket)
        job = stage.schedule(urgent=False)
        assert job is not None
        job.worker = "cpu-0"
        stage.update(job, InferenceResult(np.zeros((1, 2), np.float32), None, 0.0, budget), None)
        assert len(list(stream.results())) == 1
        assert stage._usage.budget("cpu-0") == 1024
    assert not caplog.records


def late(counts: list[int]) -> tuple[EmbedStream, StreamTicket]:
    """A ticket of rows of 4 tokens, each with parts of one token."""
    stream, ticket = tokenized()
    ticket.texts = replace(ticket.texts, chunking=Chunking("tokens", 8, late=True))
    bounds = np.array([(n, n + 1) for count in counts for n in range(count)], np.int32)
    ticket.tokens = TokenBatch(
        np.ones(4 * len(counts), np.int32),
        np.arange(len(counts) + 1) * 4,
        np.zeros(len(counts), np.bool_),
        spans=Spans(np.array(counts, np.int32), bounds),
    )
    return stream, ticket


def test_parts_of_rows_are_texts_from_there_on_and_share_no_run_with_rows() -> None:
    stage = make(lambda lengths: [np.arange(len(lengths))[n::2][::-1] for n in range(2)])
    first, rows, second = late([1, 3]), tokenized(4), late([2, 1, 1])
    for _, ticket in (first, rows, second):
        stage.add_ticket(ticket)
    jobs = []
    while (job := stage.schedule(urgent=False)) is not None:
        jobs.append(job)
    jobs.sort(key=lambda job: job.payload.spans is None)  # windows take turns
    parts = [job.payload.spans for job in jobs]
    assert [None if one is None else one.counts.tolist() for one in parts] == [
        [1, 2, 1],
        [1, 3],
        None,
        None,
    ]
    for number, job in enumerate(jobs[:2]):
        vectors = np.arange(2 * len(parts[number].bounds), dtype=np.float32).reshape(-1, 2)
        stage.update(job, InferenceResult(vectors + 100 * number, None, 0.0), None)
    found = [next(stream.results()).embeddings for stream, _ in (first, second)]
    # Rows 0, 2 and 4 of the window ran in the first job, the last of them first.
    expected = [[6, 102, 104, 106], [2, 4, 100, 0]]
    for one, column in zip(found, expected, strict=True):
        assert isinstance(one, EmbeddingBatch)
        assert one.embeddings[:, 0].tolist() == column
        assert one.token_count.tolist() == [1] * len(column)
        assert (one.counts, one.norms, one.truncated.any()) == (None, None, False)


def test_a_failed_row_fails_all_its_parts() -> None:
    stage = make(lambda lengths: [np.array([n]) for n in range(len(lengths))])
    stream, ticket = late([1, 3, 2])
    stage.add_ticket(ticket)
    error = InternalError("lost")
    for number in range(3):
        job = stage.schedule(urgent=False)
        assert job is not None
        count = len(job.payload.spans.bounds)
        result = InferenceResult(np.ones((count, 2), np.float32), None, 0.0)
        stage.update(job, None if number == 1 else result, error if number == 1 else None)
    (found,) = stream.results()
    assert isinstance(found.embeddings, EmbeddingBatch)
    assert found.embeddings.errors == {1: error, 2: error, 3: error}
    assert found.embeddings.embeddings[:, 0].tolist() == [1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("norms", [None, np.ones(7, np.float32)])
def test_an_answer_of_the_wrong_shape_fails_its_rows(norms: Any) -> None:
    # Norms of another length were raised out of the callback: the window never finished.
    stage = make(one_run)
    stream, ticket = tokenized()
    stage.add_ticket(ticket)
    job = stage.schedule(urgent=False)
    assert job is not None
    width = 3 if norms is None else 2
    stage.update(job, InferenceResult(np.zeros((1, width), np.float32), norms, 0.0), None)
    (result,) = stream.results()
    assert isinstance(result.embeddings, EmbeddingBatch)
    assert isinstance(result.embeddings.errors[0], InternalError)


@pytest.mark.parametrize(
    ("waiting", "under_pressure", "taken"),
    [(30, False, 10), (12, True, 10), (30, True, 15), (200, True, 40)],
)
def test_windows_grow_with_what_waits_under_pressure(
    waiting: int, under_pressure: bool, taken: int
) -> None:
    windows: list[int] = []

    def plan(lengths: Any) -> list[Any]:
        windows.append(int(lengths.sum()))
        return [np.arange(len(lengths))]

    stage = make(plan, window_tokens=10, under_pressure=lambda: under_pressure)
    streams = []
    for _ in range(waiting):
        stream, ticket = tokenized(num_tokens=1)
        streams.append(stream)  # a ticket whose stream is closed is dropped
        stage.add_ticket(ticket)
    stage.schedule(urgent=False)
    assert windows == [taken]


def test_interactive_work_that_waits_together_runs_together() -> None:
    dispatched: list[None] = []
    stage = make(one_run)
    stage.connect(lambda: dispatched.append(None))
    streams = []
    for priority in ("interactive", "bulk", "interactive"):
        stream, ticket = tokenized(priority=priority)
        streams.append(stream)
        stage.add_ticket(ticket)
    assert len(dispatched) == 2
    job = stage.schedule(urgent=True)
    assert job is not None
    assert job.urgent
    assert len(job.payload.lengths) == 2
    assert stage.schedule(urgent=True) is None
    job = stage.schedule(urgent=False)
    assert job is not None
    assert not job.urgent
    assert len(job.payload.lengths) == 1
    assert stage.schedule(urgent=False) is None


def test_a_batch_that_leaves_early_costs_its_share_of_the_layers() -> None:
    stage = make(one_run, num_layers=12)
    for layers, cost in ((0, 4096), (3, 1024), (12, 4096), (9, 3072)):
        stream, ticket = tokenized(4096, layers=layers)
        stage.add_ticket(ticket)
        job = stage.schedule(urgent=False)
        assert job is not None
        assert (job.cost, len(job.payload.input_ids), stream.closed) == (cost, 4096, False)
    stream, ticket = tokenized(1, layers=3)
    stage.add_ticket(ticket)
    job = stage.schedule(urgent=False)
    assert job is not None
    assert (job.cost, stream.closed) == (1, False)


def test_a_device_is_not_slow_because_its_texts_leave_later_than_before() -> None:
    stage = make(one_run, num_layers=12)
    health, others = Health(), 1.0  # of a device that had no such change

    def run(layers: int, number: int) -> None:
        for _ in range(number):
            stream, ticket = tokenized(4096, layers=layers)
            stage.add_ticket(ticket)
            job = stage.schedule(urgent=False)
            assert job is not None
            health.record_answer(job.cost, 0.01 * (layers or 12), others)
            stream.close()

    run(0, 20)
    rate = health.rate
    run(3, 100)
    run(0, 20)
    assert health.state == "healthy"
    assert health.rate == pytest.approx(rate)


def test_bulk_work_waits_for_a_full_window_only_while_more_tokens_are_coming() -> None:
    found = scheduler(one_run, max_queue_delay_s=3600, window_tokens=5)
    assert found.idle
    streams = []

    def ticket_of(num_tokens: int, *, with_tokens: bool) -> StreamTicket:
        stream, ticket = tokenized(num_tokens)
        streams.append(stream)  # a ticket whose stream is closed is dropped
        if not with_tokens:
            ticket.tokens = None
        found.add_ticket(ticket)
        return ticket

    ticket_of(2, with_tokens=True)
    ticket_of(3, with_tokens=False)
    assert not found.idle
    assert (found.tokenization.depth(), found.inference.depth()) == (1, 2)
    assert found.inference.schedule(urgent=False) is None  # its company is being tokenized
    ticket_of(3, with_tokens=True)
    job = found.inference.schedule(urgent=False)  # the window is full
    assert job is not None
    assert sorted(job.payload.lengths.tolist()) == [2, 3]
    ticket_of(1, with_tokens=True)
    assert found.inference.schedule(urgent=False) is None
    job = found.tokenization.schedule(urgent=False)
    assert job is not None
    tokens = TokenBatch(np.ones(1, np.int32), np.array([0, 1]), np.zeros(1, np.bool_))
    found.tokenization.update(job, tokens, None)
    job = found.inference.schedule(urgent=False)  # nothing more is coming
    assert job is not None
    assert job.payload.lengths.tolist() == [1, 1]
    assert found.tokenization.schedule(urgent=False) is None
    assert found.idle


def test_a_text_that_a_tokenizer_fails_at_ends_there() -> None:
    found = scheduler(one_run)
    stream, ticket = tokenized(priority="interactive")
    ticket.tokens = None
    found.add_ticket(ticket)
    assert found.tokenization.schedule(urgent=False) is None
    job = found.tokenization.schedule(urgent=True)
    assert job is not None
    assert job.urgent
    found.tokenization.update(job, None, ZeroDivisionError())
    (result,) = stream.results()
    assert isinstance(result.embeddings, InternalError)
    assert found.idle


def test_tickets_of_closed_streams_are_dropped_in_both_stages() -> None:
    found = scheduler(one_run)
    for with_tokens in (True, False):
        stream, ticket = tokenized()
        if not with_tokens:
            ticket.tokens = None
        found.add_ticket(ticket)
        stream.close()
    assert found.inference.schedule(urgent=False) is None
    assert found.tokenization.schedule(urgent=False) is None
    assert found.idle
