"""Embedder: the pipeline of one model, with tokenizers, scheduler and replicas."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fletcher.config.engine import WorkerConfig
from fletcher.core.batches import EmbeddingBatch, MicroBatch, TextBatch
from fletcher.errors import FletcherError
from fletcher.pipeline.cache import EmbeddingCache
from fletcher.pipeline.device_usage import DeviceUsage
from fletcher.pipeline.interactive.path import InlineModel, InteractiveHost, InteractivePath
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.scheduler import BatchingConfig, ModelShape, Runners, Scheduler
from fletcher.pipeline.stream import EmbedStream, StreamTicket
from fletcher.telemetry.tracing import Span, Telemetry
from fletcher.workers.messages import WorkerSpec
from fletcher.workers.pool import WorkerPool
from fletcher.workers.process_memory import memory_bytes
from fletcher.workers.roster import PoolConfig, PoolEvents, PoolTiming

_CACHED_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class ModelProcesses:
    """Worker processes of a model.

    Attributes:
        standby: Replicas that take over when none of `replicas` is usable.
        options: How work is divided among the processes, and how long a run may take.
    """

    tokenizers: Sequence[WorkerSpec]
    replicas: Sequence[WorkerSpec]
    standby: Sequence[WorkerSpec] = ()
    options: WorkerConfig = WorkerConfig()  # noqa: RUF009


@dataclass(frozen=True, slots=True)
class SharedResources:
    """Parts of the server that the pipelines of all models share.

    Attributes:
        cache: Embedding cache; None: no vectors are cached.
    """

    budget: MemoryBudget
    telemetry: Telemetry
    cache: EmbeddingCache | None = None


class Embedder:
    """Embeds the texts of many streams with one model."""

    def __init__(
        self,
        model: ModelShape,
        processes: ModelProcesses,
        batching: BatchingConfig,
        shared: SharedResources,
        inline: InlineModel | None = None,
    ) -> None:
        telemetry = shared.telemetry
        self._budget = shared.budget
        self._window_tokens = batching.window_tokens
        self._cache = shared.cache
        self._streams: weakref.WeakSet[EmbedStream] = weakref.WeakSet()
        self._opening = threading.Lock()
        self._closed = False
        self._nothing = EmbeddingBatch.zeros(0, model.dim)
        self._usage = DeviceUsage(telemetry, model.name)
        runners = Runners(lambda: self.replicas.concurrency, self._rate)
        self._scheduler = Scheduler(model, batching, self._usage, telemetry, runners)
        self._interactive = InteractivePath(
            inline or InlineModel(),
            InteractiveHost(
                idle_device=self._idle_device,
                schedule=self._scheduler.add_ticket,
                plan=lambda lengths: batching.plan(lengths, 1),
                dim=model.dim,
            ),
            self._usage,
            telemetry,
        )
        # Every call asks for its prompt's number of tokens. Most calls use one of a few prompts.
        self._prompt_tokens: dict[str, int] = {}

        restarts, states, name = telemetry.worker_restarts, telemetry.worker_states, model.name
        events = PoolEvents(
            on_restart=lambda worker: restarts.add(model=name, worker=worker),
            on_state=lambda worker, state: states.add(model=name, worker=worker, state=state),
        )
        timing = PoolTiming(answer_timeout_s=processes.options.worker_timeout_s)
        self.tokenizers = WorkerPool(
            PoolConfig("tokenizer", processes.tokenizers, timing=timing),
            self._scheduler.tokenization,
            events,
        )
        self.replicas = WorkerPool(
            PoolConfig(
                "replica",
                processes.replicas,
                standby=processes.standby,
                dispatch=processes.options.dispatch,
                # A single token, 0: it is in every vocabulary.
                probe=MicroBatch(np.zeros(1, np.int32), np.ones(1, np.int32)),
                timing=timing,
            ),
            self._scheduler.inference,
            events,
        )
        self._scheduler.tokenization.connect(self.tokenizers.dispatch_urgent)
        self._scheduler.inference.connect(self.replicas.dispatch_urgent)
        self._end_watching = self._watch(telemetry, model.name)

    def start(self) -> None:
        """Starts and warms up all workers; stops all of them if one fails."""
        try:
            self.replicas.start(meanwhile=self._interactive.load_engine)
            self.tokenizers.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all workers and closes all streams, without results. Idempotent."""
        for end in self._end_watching:
            end()
        # Streams are closed first, so that jobs that the workers drop do not count as failed rows.
        with self._opening:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        self.tokenizers.close()
        self.replicas.close()

    def open_stream(self, trace: Span | None = None) -> EmbedStream:
        """Opens a stream for one client call; the caller closes it."""
        stream = EmbedStream(
            self._budget.open_allowance(), self._enqueue, trace, self._scheduler.remove_stream
        )
        with self._opening:
            self._streams.add(stream)
            closed = self._closed
        if closed:
            stream.close()
        return stream

    def num_tokens(
        self, text: str, on_open: Callable[[EmbedStream], None] = lambda _stream: None
    ) -> int:
        """Number of a prompt's tokens, special ones included, at most `max_length`.

        If this process has no tokenizer, the text is embedded on the ordinary path to find the
        number. `on_open` gets the stream, and may close it to end the wait.
        """
        found = self._prompt_tokens.get(text)
        if found is None:
            found = self._count_tokens(text, on_open)
            with self._opening:
                if len(self._prompt_tokens) >= _CACHED_PROMPTS:
                    self._prompt_tokens.clear()
                self._prompt_tokens[text] = found
        return found

    def _count_tokens(self, text: str, on_open: Callable[[EmbedStream], None]) -> int:
        data = text.encode()
        texts = TextBatch(data, np.array([0, len(data)], np.int64))
        tokens = self._interactive.tokenize(texts)
        if tokens is not None:
            return len(tokens.input_ids)
        stream = self.open_stream()
        try:
            on_open(stream)
            stream.submit(texts, None, num_bytes=0, priority="interactive")
            stream.end()
            (result,) = stream.results()
        finally:
            stream.close()
        if isinstance(result.embeddings, FletcherError):
            raise result.embeddings
        return int(result.embeddings.token_count[0])

    def queued(self, stage: str) -> int:
        """Length of a queue; `stage` is `texts`, `tokens` or `micro_batches`.

        The length counts texts without tokens, tokens to be planned, or planned micro-batches.
        """
        depths = {
            "texts": self._scheduler.tokenization.depth,
            "tokens": self._scheduler.inference.depth,
            "micro_batches": self._scheduler.inference.planned,
        }
        return depths[stage]()

    def queued_windows(self) -> float:
        """Number of batch windows that the tokens waiting to be planned would fill."""
        return self._scheduler.inference.depth() / max(1, self._window_tokens)

    @property
    def keeps_vectors(self) -> bool:
        """Whether vectors are cached, which needs the model's float32 output."""
        return self._cache is not None

    @property
    def ready(self) -> bool:
        """Whether at least one tokenizer and one replica take work now."""
        return self.tokenizers.usable and self.replicas.usable

    def check_workers(self) -> None:
        """Raises OverloadedError if no worker of one kind takes work, now or soon."""
        for pool in (self.tokenizers, self.replicas):
            if pool.gone:
                raise pool.error()

    def statistics(self) -> dict[str, Any]:
        """State and load of all workers now."""
        return {
            "tokenizers": self.tokenizers.statistics(),
            "replicas": [
                one | self._busy(one["name"], one["concurrency"])
                for one in self.replicas.statistics()
            ],
        }

    def _rate(self) -> float:
        """Tokens that all replicas compute in a second; 0 before the first measurement."""
        return sum(self.replicas.rate(name) for name in self.replicas.names)

    def _busy_share(self, device: str) -> float:
        return self._usage.busy(device).recent_share(self.replicas.concurrency_of(device))

    def _busy(self, device: str, concurrency: int) -> dict[str, float]:
        busy = self._usage.busy(device)
        load, load_s = busy.last_load(concurrency)
        return {
            "busy": round(busy.recent_share(concurrency), 3),
            "busy_load": round(load, 3),
            "load_s": round(load_s, 1),
        }

    def memory_bytes(self) -> int:
        """Memory of the worker processes, in bytes."""
        return memory_bytes([*self.tokenizers.process_ids(), *self.replicas.process_ids()])

    def _watch(self, telemetry: Telemetry, model: str) -> list[Callable[[], None]]:
        """Exports each worker's state and rate as metrics.

        Returns:
            Functions that end the export.
        """
        ends = [
            telemetry.worker_usable.observe(partial(pool.is_usable, name), model=model, worker=name)
            for pool in (self.tokenizers, self.replicas)
            for name in pool.names
        ]
        for name in self.replicas.names:
            labels = {"model": model, "device": name}
            ends += [
                telemetry.device_rate.observe(partial(self.replicas.rate, name), **labels),
                telemetry.device_budget.observe(partial(self._usage.budget, name), **labels),
                telemetry.device_busy_share.observe(partial(self._busy_share, name), **labels),
            ]
        return ends

    def _idle_device(self) -> str | None:
        return self.replicas.idle_worker() if self._scheduler.idle else None

    def _enqueue(self, ticket: StreamTicket) -> None:
        texts = ticket.texts
        # Texts in chunks are not cached: their vectors are those of the chunks.
        if self._cache is not None and texts.chunking is None and texts.num_texts:
            lookup = self._cache.look_up(texts)
            ticket.texts, ticket.complete = lookup.missing, lookup.complete
        if not ticket.texts.num_texts:
            ticket.finish(self._nothing)
        elif not self._interactive.run_ticket(ticket):
            self._scheduler.add_ticket(ticket)
