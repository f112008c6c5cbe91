"""Execution of short texts in the front process.

See `fletcher.pipeline.interactive`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fletcher.core.batches import InferenceResult, MicroBatch, TextBatch, TokenBatch
from fletcher.pipeline.batch_window import BatchWindow, Plan
from fletcher.pipeline.device_usage import DeviceUsage
from fletcher.pipeline.stream import StreamTicket, as_fletcher_error
from fletcher.telemetry.tracing import Telemetry

log = logging.getLogger(__name__)

# Limits of the texts that are tokenized here. One or two sentences take a fraction of a
# millisecond, which is less than a round trip to another process.
_MAX_TEXTS = 4
_MAX_BYTES = 4096
# Most tokens that run here. An engine keeps the memory of its longest run, and nothing limits the
# engine's memory in this process.
_MAX_TOKENS = 1024

Run = Callable[[MicroBatch], InferenceResult]


@dataclass(frozen=True, slots=True)
class InlineModel:
    """Copies of a model's tokenizer and engine in the front process.

    Attributes:
        tokenize: Tokenizes a few short texts, on one thread at a time. None: this process has no
            copy of the tokenizer, as under `--isolate-engine`.
        load: Loads the engine, which does one run at a time. Returns None if this process gets no
            copy of the engine.
    """

    tokenize: Callable[[TextBatch], TokenBatch] | None = None
    load: Callable[[], Run | None] = lambda: None


@dataclass(frozen=True, slots=True)
class InteractiveHost:
    """Functions of the embedder that the interactive path calls.

    Attributes:
        idle_device: Returns the name of the replica whose counters count a run here. Returns None
            unless the scheduler and all replicas are idle.
        schedule: Puts a ticket on the ordinary path.
        plan: Divides rows, given their lengths, into micro-batches for one runner.
    """

    idle_device: Callable[[], str | None]
    schedule: Callable[[StreamTicket], None]
    plan: Plan
    dim: int


class InteractivePath:
    """Tokenizer and engine of one model in the front process. Thread-safe."""

    def __init__(
        self, model: InlineModel, host: InteractiveHost, usage: DeviceUsage, telemetry: Telemetry
    ) -> None:
        self._model = model
        self._host = host
        self._usage = usage
        self._telemetry = telemetry
        self._engine: Run | None = None
        self._tokenizing = threading.Lock()
        self._running = threading.Lock()

    def load_engine(self) -> None:
        """Loads the engine. Raises FletcherError if that fails."""
        self._engine = self._model.load()

    def tokenize(self, texts: TextBatch) -> TokenBatch | None:
        """Tokenizes a few short texts; None if there is no tokenizer in this process."""
        if self._model.tokenize is None:
            return None
        with self._tokenizing:
            return self._model.tokenize(texts)

    def run_ticket(self, ticket: StreamTicket) -> bool:
        """Embeds a ticket's texts in this process.

        Short interactive texts are tokenized here if this process has a tokenizer. The model runs
        here only if the scheduler and all replicas are idle.

        Returns:
            Whether this method took the ticket. If False, the caller schedules the ticket, which
            may have tokens already (`ticket.tokens`).
        """
        if not _accepts(ticket):
            return False
        try:
            tokens = self.tokenize(ticket.texts)
        except Exception as error:  # noqa: BLE001 - as a worker would report it
            ticket.tokenized(as_fletcher_error(error))
            return True
        if tokens is None:
            return False
        ticket.tokenized(tokens)
        return self._run(ticket, tokens)

    def _run(self, ticket: StreamTicket, tokens: TokenBatch) -> bool:
        engine = self._engine
        if engine is None or len(tokens.input_ids) > _MAX_TOKENS:
            return False
        if self._running.locked() or self._host.idle_device() is None:
            return False
        work = partial(self._embed, ticket, tokens, engine, time.monotonic())
        return ticket.stream.run_on_waiting_thread(work)

    def _embed(self, ticket: StreamTicket, tokens: TokenBatch, engine: Run, queued: float) -> None:
        """Runs the model and finishes the ticket; schedules the ticket if the run fails."""
        if ticket.stream.closed:
            return
        started = time.monotonic()
        device = None
        if self._running.acquire(blocking=False):  # another text may run by now
            try:
                device = self._host.idle_device()
                if device is not None:
                    window = BatchWindow([ticket], self._host.dim, self._host.plan)
                    batches = [window.micro_batch(rows) for rows in window.row_sets]
                    results = self._run_model(ticket, batches, engine)
            except Exception:
                log.exception("a text failed in this process; a replica gets it")
                device = None
            finally:
                self._running.release()
        if device is None:
            self._host.schedule(ticket)
            return
        telemetry = self._telemetry
        telemetry.stage_duration.record(started - queued, stage="queue")
        telemetry.texts_received.add(tokens.num_texts)
        telemetry.tokens_received.add(len(tokens.input_ids))
        for batch, result in zip(batches, results, strict=True):
            self._usage.count_run(device, batch.lengths, result)
        for rows, result in zip(window.row_sets, results, strict=True):
            window.take_result(rows, result)
        if not results:
            window.finish_tickets()

    def _run_model(
        self, ticket: StreamTicket, batches: list[MicroBatch], engine: Run
    ) -> list[InferenceResult]:
        num_rows = sum(len(batch.lengths) for batch in batches)
        num_tokens = sum(len(batch.input_ids) for batch in batches)
        trace = ticket.stream.trace
        with self._telemetry.span("inference", trace, rows=num_rows, tokens=num_tokens):
            return [engine(batch) for batch in batches]


def _accepts(ticket: StreamTicket) -> bool:
    """Whether a ticket has a few short texts and is interactive.

    Texts in chunks are not accepted. They may take long, and finishing one part of a text enqueues
    the next part within the same call, perhaps many levels deep.
    """
    texts = ticket.texts
    return (
        ticket.priority == "interactive"
        and texts.num_texts <= _MAX_TEXTS
        and len(texts.data) <= _MAX_BYTES
        and texts.chunking is None
        and not texts.half
    )
