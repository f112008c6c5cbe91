"""What the worker pools are to do next: texts to tokenize, micro-batches to run.

Both sources have two queues, in which streams take turns: pools ask for bulk work when they have
room, and are told when there is interactive work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fletcher.core.batches import InferenceResult, Int64Array, MicroBatch, TextBatch, TokenBatch
from fletcher.errors import FletcherError, InternalError
from fletcher.pipeline.batch_window import BatchWindow, Plan
from fletcher.pipeline.fair_queue import FairQueue
from fletcher.pipeline.stream import StreamTicket
from fletcher.telemetry.tracing import Telemetry
from fletcher.telemetry.utilization import Utilization
from fletcher.workers.jobs import Job

log = logging.getLogger(__name__)

# Windows at most this much larger where there is plenty to do: a third of the padding is left
# (docs/operations.md, Pressure).
_CROWDED = 4

# A run of more in the front process would hold its memory for good, and nobody watches it there.
_LENT_TOKENS = 1024


def as_fletcher_error(error: Exception) -> FletcherError:
    """The error itself if it is one of ours, else an InternalError that gives nothing away."""
    if isinstance(error, FletcherError):
        return error
    return InternalError(f"{type(error).__name__} while working on this batch; the log has more")


class TokenizationScheduler:
    """Tickets that wait for their tokens.

    Args:
        telemetry: Where counts, durations and spans go.
        tokenized: Called with each ticket once it has tokens; must not block.
        hurry: Called when there is interactive work.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        tokenized: Callable[[StreamTicket], None],
        hurry: Callable[[], None],
    ) -> None:
        self._telemetry = telemetry
        self._tokenized = tokenized
        self._hurry = hurry
        self._interactive: FairQueue[StreamTicket] = FairQueue()
        self._bulk: FairQueue[StreamTicket] = FairQueue()
        self._changed = threading.Condition()
        self._outstanding = 0

    def put(self, ticket: StreamTicket) -> None:
        """Queues a ticket; never blocks, the streams' allowances bound what can be here."""
        interactive = ticket.priority == "interactive"
        with self._changed:
            queue = self._interactive if interactive else self._bulk
            queue.put(ticket.stream, ticket, ticket.texts.num_texts)
            self._outstanding += 1
            self._changed.notify()
        if interactive:
            self._hurry()

    @property
    def busy(self) -> bool:
        """More tokens are on their way."""
        return self._outstanding > 0

    def depth(self) -> int:
        """Texts that wait."""
        return self._interactive.weight + self._bulk.weight

    def next_job(self, timeout_s: float) -> Job | None:
        """The next bulk texts to tokenize."""
        with self._changed:
            self._changed.wait_for(lambda: self._bulk, timeout_s)
            return self._next_of(self._bulk)

    def urgent_job(self) -> Job | None:
        """The next interactive texts to tokenize, if there are any."""
        with self._changed:
            return self._next_of(self._interactive)

    def _next_of(self, queue: FairQueue[StreamTicket]) -> Job | None:
        while queue:
            ticket = queue.get()
            if not ticket.stream.closed:
                return self._job(ticket)
            self._outstanding -= 1
        return None

    def _job(self, ticket: StreamTicket) -> Job:
        started = time.monotonic()
        texts: TextBatch = ticket.texts
        span = self._telemetry.span("tokenize", ticket.stream.trace, texts=texts.num_texts)

        def done(tokens: TokenBatch | None, error: Exception | None) -> None:
            span.end(error)
            self._telemetry.stage_duration.record(time.monotonic() - started, stage="tokenize")
            with self._changed:
                self._outstanding -= 1
            if tokens is None:
                assert error is not None
                ticket.tokenized(as_fletcher_error(error))
                return
            ticket.tokenized(tokens)
            self._tokenized(ticket)

        cost = texts.num_texts + len(texts.data)
        return Job(texts, done, cost=cost, urgent=ticket.priority == "interactive")


@dataclass(slots=True)
class _Planned:
    window: BatchWindow
    rows: Int64Array
    queued: float


class InferenceScheduler:
    """Tickets with tokens, made into windows and micro-batches when a device has room.

    Bulk work waits up to `max_queue_delay_s` for a full window while more tokens are on their way.
    Interactive work waits for room at most, and what waits together runs together.

    Args:
        dim: Width of a vector.
        plan: Cuts lengths into micro-batches; see `fletcher.planning`.
        window_tokens: Bulk tokens planned together; more mean less padding and later first results.
        crowded: Whether there is so much to do that windows should be larger.
        max_queue_delay_s: What a bulk ticket may wait for company.
        more_coming: Whether tokenization still has work.
        hurry: Called when there is interactive work.
        telemetry: Where counts, durations and spans go.
        model: Whose it is, for the counts.
        num_layers: Layers of the model, of which a batch that leaves early costs its share; 0:
            unknown, and none does.
    """

    def __init__(
        self,
        *,
        dim: int,
        plan: Plan,
        window_tokens: int,
        crowded: Callable[[], bool] = lambda: False,
        max_queue_delay_s: float,
        more_coming: Callable[[], bool],
        hurry: Callable[[], None],
        telemetry: Telemetry,
        model: str = "",
        num_layers: int = 0,
    ) -> None:
        self._model = model
        self._num_layers = num_layers
        self._dim = dim
        self._plan = plan
        self._window_tokens = window_tokens
        self._crowded = crowded
        self._max_queue_delay_s = max_queue_delay_s
        self._more_coming = more_coming
        self._hurry = hurry
        self._telemetry = telemetry
        self._interactive: FairQueue[StreamTicket] = FairQueue()
        self._bulk: FairQueue[StreamTicket] = FairQueue()
        self._oldest_bulk = 0.0
        self._ready_interactive: deque[_Planned] = deque()
        self._ready_bulk: deque[_Planned] = deque()
        self._changed = threading.Condition()
        self._budgets: dict[str, int] = {}
        self._busy: defaultdict[str, Utilization] = defaultdict(Utilization)

    def put(self, ticket: StreamTicket) -> None:
        """Queues a tokenized ticket; never blocks."""
        assert ticket.tokens is not None
        num_tokens = len(ticket.tokens.input_ids)
        self._telemetry.texts_received.add(ticket.tokens.num_texts)
        self._telemetry.tokens_received.add(num_tokens)
        if ticket.priority == "interactive":
            with self._changed:
                self._interactive.put(ticket.stream, ticket, num_tokens)
            self._hurry()
            return
        with self._changed:
            if not self._bulk:
                self._oldest_bulk = time.monotonic()
            self._bulk.put(ticket.stream, ticket, num_tokens)
            self._changed.notify()

    def depth(self) -> int:
        """Tokens that wait unplanned."""
        return self._interactive.weight + self._bulk.weight

    def planned(self) -> int:
        """Micro-batches that wait for a device."""
        return len(self._ready_interactive) + len(self._ready_bulk)

    def budget(self, device: str) -> int:
        """Padded tokens that a device takes in one run, as it last said; 0 before that."""
        return self._budgets.get(device, 0)

    def busy(self, device: str) -> Utilization:
        """How much of its time a device computes."""
        return self._busy[device]

    def next_job(self, timeout_s: float) -> Job | None:
        """The next bulk micro-batch. Called by one thread, the pool's dispatcher."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not self._ready_bulk:
                with self._changed:
                    if not self._wait_for_window(deadline):
                        return None
                    taken = _take(self._bulk, self._next_window_tokens())
                    self._oldest_bulk = time.monotonic()
                self._plan_window(taken, self._ready_bulk)
            job = self._next_ready(self._ready_bulk, urgent=False)
            if job is not None:
                return job

    def urgent_job(self) -> Job | None:
        """The next interactive micro-batch, if there is one. Called by one thread at a time."""
        while True:
            if not self._ready_interactive:
                with self._changed:
                    taken = _take(self._interactive, None)
                if not taken:
                    return None
                self._plan_window(taken, self._ready_interactive)
            job = self._next_ready(self._ready_interactive, urgent=True)
            if job is not None:
                return job

    def _wait_for_window(self, deadline: float) -> bool:
        """Waits until bulk tickets are due to be planned; False: not in time."""
        while True:
            due, due_in = self._bulk_window_due()
            now = time.monotonic()
            if due or now >= deadline:
                return due
            self._changed.wait(min(deadline - now, due_in))

    def _plan_window(self, taken: list[StreamTicket], ready: deque[_Planned]) -> None:
        """Takes milliseconds: not under the lock that every tokenizer's reader needs."""
        now = time.monotonic()
        for tickets in _alike(taken):
            try:
                window = BatchWindow(tickets, self._dim, self._plan)
            except Exception as error:  # raised, it would end the dispatcher
                log.exception("a window cannot be planned")
                for ticket in tickets:
                    ticket.finish(as_fletcher_error(error))
                continue
            ready.extend(_Planned(window, rows, now) for rows in window.row_sets)
            if not window.row_sets:
                window.finish()

    def _next_ready(self, ready: deque[_Planned], *, urgent: bool) -> Job | None:
        while ready:
            planned = ready.popleft()
            if not planned.window.abandoned:
                return self._job(planned, urgent=urgent)
        return None

    def _next_window_tokens(self) -> int:
        if not self._crowded():
            return self._window_tokens
        # Half of what is there: the other half is the next window while memory comes free.
        return min(max(self._bulk.weight // 2, self._window_tokens), _CROWDED * self._window_tokens)

    def _bulk_window_due(self) -> tuple[bool, float]:
        """Whether waiting bulk tickets should be planned now; else in how many seconds."""
        if not self._bulk:
            return False, float("inf")
        age = time.monotonic() - self._oldest_bulk
        full = self._bulk.weight >= self._window_tokens
        due = full or age >= self._max_queue_delay_s or not self._more_coming()
        return due, max(0.0, self._max_queue_delay_s - age)

    def _job(self, planned: _Planned, *, urgent: bool) -> Job:
        batch = planned.window.micro_batch(planned.rows)
        started = time.monotonic()
        self._telemetry.stage_duration.record(started - planned.queued, stage="queue")
        num_tokens = len(batch.input_ids)
        # A run serves many calls; its span belongs to the first of them.
        trace = planned.window.tickets[0].stream.trace
        span = self._telemetry.span("inference", trace, rows=len(batch.lengths), tokens=num_tokens)

        def done(result: Any, error: Exception | None) -> None:
            span.end(error)
            if error is not None:
                planned.window.settle(planned.rows, as_fletcher_error(error))
                return
            assert isinstance(result, InferenceResult)
            self._count(job, batch.lengths, result)
            planned.window.settle(planned.rows, result)

        tickets = planned.window.tickets
        small = urgent and len(tickets) == 1 and num_tokens <= _LENT_TOKENS
        lend = tickets[0].stream.lend if small and batch.segments is None else None
        job = Job(batch, done, cost=self._cost(batch), urgent=urgent, lend=lend)
        return job

    def _cost(self, batch: MicroBatch) -> int:
        """Its tokens, as far as they go: half of the layers take half of the time.

        Rates, loads and what is usual for a device are by cost: by tokens alone it would seem to
        become slow when texts that leave early are followed by others.
        """
        num_tokens = len(batch.input_ids)
        if not batch.layers:
            return num_tokens
        return max(1, round(num_tokens * batch.layers / self._num_layers))

    def _count(self, job: Job, lengths: Any, result: InferenceResult) -> None:
        device = job.worker
        self._telemetry.stage_duration.record(result.compute_s, stage="inference")
        self._telemetry.device_batches.add(1, model=self._model, device=device)
        self._telemetry.device_tokens.add(int(lengths.sum()), model=self._model, device=device)
        self._telemetry.device_padded_tokens.add(
            int(lengths.max()) * len(lengths), model=self._model, device=device
        )
        self._telemetry.device_busy.add(result.compute_s, model=self._model, device=device)
        self._busy[device].record_run(result.compute_s)
        if not result.budget_tokens:
            return
        before, self._budgets[device] = self.budget(device), result.budget_tokens
        if result.budget_tokens < before:
            log.warning(
                "%s has too little memory for %d tokens in one run; it gets %d, and slowly more",
                *(device, before, result.budget_tokens),
            )


def _alike(tickets: Iterable[StreamTicket]) -> Iterable[list[StreamTicket]]:
    """Tickets that the same graphs are run for and whose vectors are of one type, together."""
    found: dict[tuple[int, bool, bool], list[StreamTicket]] = {}
    for ticket in tickets:
        texts = ticket.texts
        late = texts.chunking is not None and texts.chunking.late
        found.setdefault((texts.layers, late, texts.half), []).append(ticket)
    return found.values()


def _take(queue: FairQueue[StreamTicket], max_tokens: int | None) -> list[StreamTicket]:
    """Tickets in turn, up to about `max_tokens`; None: all. Closed streams' tickets are dropped."""
    taken: list[StreamTicket] = []
    target = 0 if max_tokens is None else max(0, queue.weight - max_tokens)
    while queue and (queue.weight > target or not taken):
        ticket = queue.get()
        if not ticket.stream.closed:
            taken.append(ticket)
    return taken
