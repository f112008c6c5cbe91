"""Scheduler: owner of all tickets that wait for a tokenizer or a replica.

The scheduler has two stages, `tokenization` and `inference`. The worker pool of a stage calls two
methods: `schedule()` returns the next job, and `update()` takes the job's result. Both methods
decide under a lock and act outside it. Each stage has an interactive queue and a bulk queue. Both
queues are fair between streams.

Why no library: none batches by padded tokens, across callers, with two priorities.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fletcher.core.batches import InferenceResult, Int32Array, Int64Array, MicroBatch, TextBatch
from fletcher.pipeline.batch_window import BatchWindow
from fletcher.pipeline.device_usage import DeviceUsage
from fletcher.pipeline.fair_queue import FairQueue
from fletcher.pipeline.stream import StreamTicket, as_fletcher_error
from fletcher.telemetry.tracing import Telemetry
from fletcher.workers.jobs import Job

log = logging.getLogger(__name__)

# How many times larger a batch window may become under pressure. At this size, only a third of the
# padding is left (docs/lab-book.md).
_WINDOW_GROWTH = 4


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
        window_tokens: Number of bulk tokens that are planned together. A larger number means less
            padding, but the first results take longer.
        max_queue_delay_s: Longest time that a bulk ticket waits for a full batch window.
        under_pressure: Returns whether so much work waits that batch windows should be larger.
    """

    plan: Callable[[Int32Array, int], list[Int64Array]]
    window_tokens: int
    max_queue_delay_s: float
    under_pressure: Callable[[], bool] = lambda: False


class Scheduler:
    """Owner of tickets between their submission and their result. Thread-safe."""

    def __init__(
        self,
        model: ModelShape,
        batching: BatchingConfig,
        usage: DeviceUsage,
        telemetry: Telemetry,
        num_runners: Callable[[], int] = lambda: 1,
    ) -> None:
        self.inference = InferenceStage(
            model, batching, usage, telemetry, num_runners, lambda: self.tokenization.busy
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

    def add_ticket(self, ticket: StreamTicket) -> None:
        interactive = ticket.priority == "interactive"
        with self._changed:
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
        texts: TextBatch = ticket.texts
        span = self._telemetry.span("tokenize", ticket.stream.trace, texts=texts.num_texts)
        cost = texts.num_texts + len(texts.data)
        return Job(texts, (ticket, span, time.monotonic()), cost=cost, urgent=urgent)

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        ticket, span, started = job.task
        span.end(error)
        self._telemetry.stage_duration.record(time.monotonic() - started, stage="tokenize")
        with self._changed:
            self._outstanding -= 1
        if error is not None:
            ticket.tokenized(as_fletcher_error(error))
            return
        ticket.tokenized(result)
        self._tokenized(ticket)

    def _next_ticket(self, queue: FairQueue[StreamTicket]) -> StreamTicket | None:
        while queue:
            ticket = queue.next_item()
            if not ticket.stream.closed:
                return ticket
            self._outstanding -= 1
        return None


@dataclass(slots=True)
class _Planned:
    window: BatchWindow
    rows: Int64Array
    queued: float


class InferenceStage(_Stage):
    """Tickets with tokens, which are planned when a device has room.

    The weight of a ticket is its number of tokens. Bulk work waits for a full batch window, but at
    most `max_queue_delay_s`, and only while more texts are being tokenized. Interactive work waits
    only for a device, and all interactive tickets that wait are planned together.
    """

    def __init__(
        self,
        model: ModelShape,
        batching: BatchingConfig,
        usage: DeviceUsage,
        telemetry: Telemetry,
        num_runners: Callable[[], int],
        more_coming: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._model = model
        self._batching = batching
        self._usage = usage
        self._telemetry = telemetry
        self._num_runners = num_runners
        self._more_coming = more_coming
        self._oldest_bulk = 0.0
        self._ready_interactive: deque[_Planned] = deque()
        self._ready_bulk: deque[_Planned] = deque()

    def add_ticket(self, ticket: StreamTicket) -> None:
        assert ticket.tokens is not None
        num_tokens = len(ticket.tokens.input_ids)
        self._telemetry.texts_received.add(ticket.tokens.num_texts)
        self._telemetry.tokens_received.add(num_tokens)
        if ticket.priority == "interactive":
            with self._changed:
                self._interactive.add_item(ticket.stream, ticket, num_tokens)
            self._dispatch_urgent()
            return
        with self._changed:
            if not self._bulk:
                self._oldest_bulk = time.monotonic()
            self._bulk.add_item(ticket.stream, ticket, num_tokens)
            self._changed.notify()

    def planned(self) -> int:
        """Number of micro-batches that wait for a device."""
        return len(self._ready_interactive) + len(self._ready_bulk)

    def schedule(self, *, urgent: bool, timeout_s: float = 0.0) -> Job | None:
        ready = self._ready_interactive if urgent else self._ready_bulk
        deadline = time.monotonic() + timeout_s
        while True:
            while ready:
                planned = ready.popleft()
                if not planned.window.abandoned:
                    return self._job(planned, urgent=urgent)
            tickets = self._next_interactive() if urgent else self._next_bulk(deadline)
            if not tickets:
                return None
            # Planned outside the lock: planning takes milliseconds, and the threads that read the
            # tokenizers' answers need the lock.
            self._plan_windows(tickets, ready)

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        planned, span = job.task
        span.end(error)
        window, rows = planned.window, planned.rows
        if error is not None:
            window.take_result(rows, as_fletcher_error(error))
            return
        assert isinstance(result, InferenceResult)
        self._usage.count_run(job.worker, job.payload.lengths, result)
        window.take_result(rows, result)

    def _next_interactive(self) -> list[StreamTicket]:
        with self._changed:
            return _take(self._interactive, None)

    def _next_bulk(self, deadline: float) -> list[StreamTicket]:
        """Waits for the tickets of the next batch window; returns [] after the deadline."""
        with self._changed:
            while True:
                now = time.monotonic()
                due_in = self._bulk_due_in(now)
                if due_in <= 0:
                    taken = _take(self._bulk, self._next_window_tokens())
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
        is_full = self._bulk.weight >= self._batching.window_tokens
        if is_full or not self._more_coming():
            return 0.0
        return self._oldest_bulk + self._batching.max_queue_delay_s - now

    def _next_window_tokens(self) -> int:
        usual = self._batching.window_tokens
        if not self._batching.under_pressure():
            return usual
        # Half of the waiting tokens: the other half is the next window, while the memory of this
        # one is released.
        return min(max(self._bulk.weight // 2, usual), _WINDOW_GROWTH * usual)

    def _plan_windows(self, taken: list[StreamTicket], ready: deque[_Planned]) -> None:
        now = time.monotonic()
        for tickets in _alike(taken):
            try:
                window = BatchWindow(tickets, self._model.dim, self._plan)
            except Exception as error:  # else it would end the dispatcher
                log.exception("a batch window cannot be planned")
                for ticket in tickets:
                    ticket.finish(as_fletcher_error(error))
                continue
            ready.extend(_Planned(window, rows, now) for rows in window.row_sets)
            if not window.row_sets:
                window.finish_tickets()

    def _plan(self, lengths: Int32Array) -> list[Int64Array]:
        return self._batching.plan(lengths, self._num_runners())

    def _job(self, planned: _Planned, *, urgent: bool) -> Job:
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


def _alike(tickets: Iterable[StreamTicket]) -> Iterable[list[StreamTicket]]:
    """Groups tickets that use the same graph and get the same type of vectors."""
    found: dict[tuple[int, bool, bool], list[StreamTicket]] = {}
    for ticket in tickets:
        texts = ticket.texts
        late = texts.chunking is not None and texts.chunking.late
        found.setdefault((texts.layers, late, texts.half), []).append(ticket)
    return found.values()


def _take(queue: FairQueue[StreamTicket], max_tokens: int | None) -> list[StreamTicket]:
    """Takes about `max_tokens` tokens of tickets from a queue, or all if it is None.

    Streams take turns. Tickets of closed streams are dropped.
    """
    taken: list[StreamTicket] = []
    target = 0 if max_tokens is None else max(0, queue.weight - max_tokens)
    while queue and (queue.weight > target or not taken):
        ticket = queue.next_item()
        if not ticket.stream.closed:
            taken.append(ticket)
    return taken
