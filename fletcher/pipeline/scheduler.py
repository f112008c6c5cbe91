"""Scheduler: owner of all tickets that wait for a tokenizer or a replica.

The scheduler has two stages, `tokenization` and `inference`. The worker pool of a stage calls two
methods: `schedule()` returns the next job, and `update()` takes the job's result. Both methods
decide under a lock and act outside it. Each stage has an interactive queue and a bulk queue. Both
queues are fair between streams.

Why no library: none batches by padded tokens, across callers, with two priorities.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fletcher.core.batches import InferenceResult, Int32Array, Int64Array, MicroBatch, TextBatch
from fletcher.pipeline.batch_window import BatchWindow, alike
from fletcher.pipeline.device_usage import DeviceUsage
from fletcher.pipeline.fair_queue import FairQueue
from fletcher.pipeline.ready_windows import PlannedBatch, ReadyWindows
from fletcher.pipeline.stream import EmbedStream, StreamTicket, as_fletcher_error, end_calls
from fletcher.pipeline.window_size import WindowSize
from fletcher.telemetry.tracing import Telemetry
from fletcher.workers.jobs import Job

# Time between two windows for streams that have none yet, while other windows wait. New streams
# share a window, which makes fuller runs.
_NEW_STREAMS_S = 0.25


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Facts about a model that batching and metrics need.

    Attributes:
        dim: Width of the vectors.
        num_layers: Number of the model's layers. 0: unknown; then no text uses an earlier exit.
        name: The model's label in metrics.
    """

    dim: int
    num_layers: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """Formation of micro-batches.

    Attributes:
        plan: Divides rows into micro-batches, given their lengths and the number of runs at the
            same time; see `fletcher.pipeline.planner`.
        window_tokens: Most tokens that are planned together, as far as they take about a second. A
            larger number means less padding, but the first results take longer.
        max_queue_delay_s: Longest time that a bulk ticket waits for a full batch window.
        under_pressure: Returns whether so much work waits that batch windows should be larger.
    """

    plan: Callable[[Int32Array, int], list[Int64Array]]
    window_tokens: int
    max_queue_delay_s: float
    under_pressure: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Runners:
    """Replicas of a model, as callbacks.

    Attributes:
        count: Returns the number of runs that execute at the same time.
        rate: Returns the tokens that they compute in a second; 0 if that is not measured yet.
    """

    count: Callable[[], int] = lambda: 1
    rate: Callable[[], float] = lambda: 0.0


class Scheduler:
    """Owner of tickets between their submission and their result. Thread-safe."""

    def __init__(
        self,
        model: ModelShape,
        batching: BatchingConfig,
        usage: DeviceUsage,
        telemetry: Telemetry,
        runners: Runners = Runners(),
    ) -> None:
        self.inference = InferenceStage(
            model, batching, usage, telemetry, runners, lambda: self.tokenization.busy
        )
        self.tokenization = TokenizationStage(telemetry, self.inference.add_ticket)

    def add_ticket(self, ticket: StreamTicket) -> None:
        """Queues a ticket, with or without tokens. Never blocks.

        The number of tickets is limited by the memory that each stream may hold.
        """
        if ticket.tokens is None:
            self.tokenization.add_ticket(ticket)
        else:
            self.inference.add_ticket(ticket)

    def remove_stream(self, stream: EmbedStream) -> None:
        """Drops the waiting tickets of a closed stream."""
        self.tokenization.remove_stream(stream)
        self.inference.remove_stream(stream)

    @property
    def idle(self) -> bool:
        """Whether nothing waits for a worker, and nothing is being tokenized."""
        return not (self.tokenization.busy or self.inference.depth() or self.inference.planned())


class _Stage:
    """Tickets that wait for one kind of worker, in an interactive and a bulk queue."""

    def __init__(self) -> None:
        self._interactive: FairQueue[StreamTicket] = FairQueue()
        self._bulk: FairQueue[StreamTicket] = FairQueue()
        self._changed = threading.Condition()
        self._dispatch_urgent: Callable[[], None] = lambda: None

    def connect(self, dispatch_urgent: Callable[[], None]) -> None:
        """Sets the callback for new interactive work: the pool's `dispatch_urgent`."""
        self._dispatch_urgent = dispatch_urgent

    def remove_stream(self, stream: EmbedStream) -> list[StreamTicket]:
        """Removes and returns the tickets of a closed stream that wait here."""
        with self._changed:
            return [
                ticket
                for queue in (self._interactive, self._bulk)
                for ticket in queue.remove_owner(stream)
            ]

    def depth(self) -> int:
        """Total weight of waiting tickets: their number of texts or tokens."""
        return self._interactive.weight + self._bulk.weight


class TokenizationStage(_Stage):
    """Tickets that have no tokens yet. The weight of a ticket is its number of texts.

    Args:
        tokenized: Called with each ticket that got its tokens. Must not block.
    """

    def __init__(self, telemetry: Telemetry, tokenized: Callable[[StreamTicket], None]) -> None:
        super().__init__()
        self._telemetry = telemetry
        self._tokenized = tokenized
        self._outstanding = 0

    @property
    def busy(self) -> bool:
        """Whether tickets wait for tokens or are being tokenized."""
        return self._outstanding > 0

    def remove_stream(self, stream: EmbedStream) -> list[StreamTicket]:
        removed = super().remove_stream(stream)
        with self._changed:
            self._outstanding -= len(removed)
        return removed

    def add_ticket(self, ticket: StreamTicket) -> None:
        interactive = ticket.priority == "interactive"
        with self._changed:
            if ticket.stream.closed:
                return
            queue = self._interactive if interactive else self._bulk
            queue.add_item(ticket.stream, ticket, ticket.texts.num_texts)
            self._outstanding += 1
            self._changed.notify()
        if interactive:
            self._dispatch_urgent()

    def schedule(self, *, urgent: bool, timeout_s: float = 0.0) -> Job | None:
        with self._changed:
            if not urgent and not self._bulk:
                self._changed.wait_for(lambda: self._bulk, timeout_s)
            ticket = self._next_ticket(self._interactive if urgent else self._bulk)
        if ticket is None:
            return None
        try:
            return self._job(ticket, urgent=urgent)
        except BaseException as failure:  # noqa: BLE001 - ends the calls
            with self._changed:
                self._outstanding -= 1
            end_calls([ticket], failure, "texts cannot be given to a tokenizer")
            return None

    def _job(self, ticket: StreamTicket, *, urgent: bool) -> Job:
        texts: TextBatch = ticket.texts
        span = self._telemetry.span("tokenize", ticket.stream.trace, texts=texts.num_texts)
        cost = texts.num_texts + len(texts.data)
        return Job(texts, (ticket, span, time.monotonic()), cost=cost, urgent=urgent)

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        with self._changed:
            self._outstanding -= 1
        try:
            self._take_result(job, result, error)
        except BaseException as failure:  # noqa: BLE001 - ends the calls
            end_calls([job.task[0]], failure, "tokens cannot be taken")

    def _take_result(self, job: Job, result: Any, error: Exception | None) -> None:
        ticket, span, started = job.task
        span.end(error)
        self._telemetry.stage_duration.record(time.monotonic() - started, stage="tokenize")
        ticket.tokenized(result if error is None else as_fletcher_error(error))
        if error is None:
            self._tokenized(ticket)

    def _next_ticket(self, queue: FairQueue[StreamTicket]) -> StreamTicket | None:
        while queue:
            ticket = queue.next_item()
            if not ticket.stream.closed:
                return ticket
            self._outstanding -= 1
        return None


class InferenceStage(_Stage):
    """Tickets with tokens, which are planned when a device has room.

    The weight of a ticket is its number of tokens. Bulk work waits for a full batch window, but at
    most `max_queue_delay_s`, and only while more texts are being tokenized. Interactive work waits
    only for a device. A batch window takes about a second. Its micro-batches take turns with those
    of windows for streams that came later.
    """

    def __init__(
        self,
        model: ModelShape,
        batching: BatchingConfig,
        usage: DeviceUsage,
        telemetry: Telemetry,
        runners: Runners,
        more_coming: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._model = model
        self._batching = batching
        self._usage = usage
        self._telemetry = telemetry
        self._runners = runners
        self._window_size = WindowSize(
            batching.window_tokens, runners.rate, batching.under_pressure
        )
        self._more_coming = more_coming
        self._oldest_bulk = 0.0
        self._ready_interactive, self._ready_bulk = ReadyWindows(), ReadyWindows()

    def add_ticket(self, ticket: StreamTicket) -> None:
        assert ticket.tokens is not None
        num_tokens = len(ticket.tokens.input_ids)
        self._telemetry.texts_received.add(ticket.tokens.num_texts)
        self._telemetry.tokens_received.add(num_tokens)
        if ticket.priority == "interactive":
            with self._changed:
                if not ticket.stream.closed:
                    self._interactive.add_item(ticket.stream, ticket, num_tokens)
            self._dispatch_urgent()
            return
        with self._changed:
            if ticket.stream.closed:
                return
            if not self._bulk:
                self._oldest_bulk = time.monotonic()
            self._bulk.add_item(ticket.stream, ticket, num_tokens)
            self._changed.notify()

    def remove_stream(self, stream: EmbedStream) -> list[StreamTicket]:
        removed = super().remove_stream(stream)
        self._ready_interactive.drop_closed()
        self._ready_bulk.drop_closed()
        return removed

    def planned(self) -> int:
        """Number of micro-batches that wait for a device."""
        return len(self._ready_interactive) + len(self._ready_bulk)

    def schedule(self, *, urgent: bool, timeout_s: float = 0.0) -> Job | None:
        ready = self._ready_interactive if urgent else self._ready_bulk
        deadline = time.monotonic() + timeout_s
        while True:
            taken: Sequence[StreamTicket] = ()  # tickets that perhaps nothing else holds
            try:
                # Planned outside the lock: planning takes milliseconds, and the threads that read
                # the tokenizers' answers need the lock.
                taken = self._tickets_of_new_streams(ready, urgent=urgent)
                self._plan_windows(taken, ready)
                if (planned := ready.next_batch()) is not None:
                    taken = planned.window.tickets
                    return self._job(planned, urgent=urgent)
                taken = self._next_interactive() if urgent else self._next_bulk(deadline)
                if not taken:
                    return None
                self._plan_windows(taken, ready)
            except BaseException as failure:
                if not taken:
                    raise
                end_calls(taken, failure, "a run cannot be planned")

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        try:
            self._take_result(job, result, error)
        except BaseException as failure:  # noqa: BLE001 - ends the calls
            end_calls(job.task[0].window.tickets, failure, "vectors cannot be taken")

    def _take_result(self, job: Job, result: Any, error: Exception | None) -> None:
        planned, span = job.task
        span.end(error)
        window, rows = planned.window, planned.rows
        if error is not None:
            window.take_result(rows, as_fletcher_error(error))
            return
        assert isinstance(result, InferenceResult)
        self._usage.count_run(job.worker, job.payload.lengths, result)
        window.take_result(rows, result)

    def _tickets_of_new_streams(self, ready: ReadyWindows, *, urgent: bool) -> list[StreamTicket]:
        """Takes tickets of streams without a window, while other streams' windows wait."""
        queue = self._interactive if urgent else self._bulk
        if not ready or not queue:
            return []
        if not urgent and time.monotonic() < ready.planned_at + _NEW_STREAMS_S:
            return []
        with self._changed:
            most = self._window_size.usual()
            return queue.take_items(most, lambda stream: not ready.has_stream(stream))

    def _next_interactive(self) -> list[StreamTicket]:
        with self._changed:
            return self._interactive.take_items(self._window_size.usual())

    def _next_bulk(self, deadline: float) -> list[StreamTicket]:
        """Waits for the tickets of the next batch window; returns [] after the deadline."""
        with self._changed:
            while True:
                now = time.monotonic()
                due_in = self._bulk_due_in(now)
                if due_in <= 0:
                    taken = self._bulk.take_items(self._window_size.next_bulk(self._bulk.weight))
                    self._oldest_bulk = now
                    if taken:
                        return taken
                elif now >= deadline:
                    return []
                else:
                    self._changed.wait(min(deadline - now, due_in))

    def _bulk_due_in(self, now: float) -> float:
        """Seconds until the waiting bulk tickets are due; infinite if there are none."""
        if not self._bulk:
            return float("inf")
        is_full = self._bulk.weight >= self._window_size.usual()
        if is_full or not self._more_coming():
            return 0.0
        return self._oldest_bulk + self._batching.max_queue_delay_s - now

    def _plan_windows(self, taken: Sequence[StreamTicket], ready: ReadyWindows) -> None:
        windows = []
        for tickets in alike(taken, self._window_size.one_run):
            window = BatchWindow(tickets, self._model.dim, self._plan)
            if window.row_sets:
                windows.append(window)
            else:
                window.finish_tickets()
        if windows:
            ready.add_windows(windows)

    def _plan(self, lengths: Int32Array) -> list[Int64Array]:
        return self._batching.plan(lengths, self._runners.count())

    def _job(self, planned: PlannedBatch, *, urgent: bool) -> Job:
        batch = planned.window.micro_batch(planned.rows)
        waited_s = time.monotonic() - planned.queued
        self._telemetry.stage_duration.record(waited_s, stage="queue")
        # A run serves many calls. Its trace span belongs to the first call.
        trace = planned.window.tickets[0].stream.trace
        span = self._telemetry.span(
            "inference", trace, rows=len(batch.lengths), tokens=len(batch.input_ids)
        )
        return Job(batch, (planned, span), cost=self._cost(batch), urgent=urgent)

    def _cost(self, batch: MicroBatch) -> int:
        """Number of a batch's tokens, times the fraction of the layers that they pass.

        A device's rate, load and usual time are measured by this cost. Measured by tokens alone, a
        device would seem to slow down when texts from an early exit are followed by others.
        """
        num_tokens = len(batch.input_ids)
        if not batch.layers:
            return num_tokens
        return max(1, round(num_tokens * batch.layers / self._model.num_layers))
