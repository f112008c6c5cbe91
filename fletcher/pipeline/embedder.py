"""The pipeline of one model: tokenizers, planning and replicas behind `open_stream`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fletcher.config.engine import WorkerConfig
from fletcher.core.batches import (
    EmbeddingBatch,
    InferenceResult,
    Int32Array,
    Int64Array,
    MicroBatch,
    TextBatch,
    TokenBatch,
)
from fletcher.pipeline.cache import EmbeddingCache
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.scheduler import InferenceScheduler, TokenizationScheduler, as_fletcher_error
from fletcher.pipeline.stream import EmbedStream, StreamTicket
from fletcher.telemetry.tracing import Span, Telemetry
from fletcher.workers.messages import WorkerSpec
from fletcher.workers.pool import WorkerPool
from fletcher.workers.process_memory import memory_bytes

# A sentence or two tokenizes in a fraction of a millisecond, less than a trip to a worker and back.
_INLINE_TEXTS = 4
_INLINE_BYTES = 4096

Run = Callable[[MicroBatch], InferenceResult]


@dataclass(frozen=True, slots=True)
class EmbedderConfig:
    """How a model is run.

    Attributes:
        tokenizers: A spec for each tokenizer process.
        replicas: A spec for each replica process.
        standby: Replicas that take over when none of `replicas` is left.
        dim: Width of the graph's output.
        num_layers: The model's layers; 0: unknown.
        model: What counts and gauges are labelled with.
        window_tokens: Bulk tokens planned together.
        workers: Dispatch among replicas, and their timeouts.
    """

    tokenizers: Sequence[WorkerSpec]
    replicas: Sequence[WorkerSpec]
    dim: int
    window_tokens: int
    workers: WorkerConfig = WorkerConfig()  # noqa: RUF009
    standby: Sequence[WorkerSpec] = ()
    num_layers: int = 0
    model: str = ""


class Embedder:
    """Texts to vectors, for many streams at once.

    Args:
        config: Workers and windows.
        plan: From lengths, and runs that go on at the same time, to micro-batches.
        tokenize: Tokenizes a few short texts in this process.
        load_inline: Loads what runs the model in this process for a text that comes when nothing
            else does; None: texts go to replicas all the same.
        budget: Memory for all streams.
        telemetry: Where counts, durations and spans go.
        crowded: Whether there is so much to do that windows should be larger.
        cache: Vectors of texts that were embedded before; None: they are not kept.
    """

    def __init__(
        self,
        config: EmbedderConfig,
        *,
        plan: Callable[[Int32Array, int], list[Int64Array]],
        tokenize: Callable[[TextBatch], TokenBatch],
        budget: MemoryBudget,
        telemetry: Telemetry,
        load_inline: Callable[[], Run | None] = lambda: None,
        crowded: Callable[[], bool] = lambda: False,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self._budget = budget
        self._window_tokens = config.window_tokens
        self._cache = cache
        self._tokenize = tokenize
        self._load_inline = load_inline
        self._tokenizing = threading.Lock()
        self._streams: weakref.WeakSet[EmbedStream] = weakref.WeakSet()
        self._opening = threading.Lock()
        self._closed = False
        self._nothing = EmbeddingBatch(
            embeddings=np.zeros((0, config.dim), np.float32),
            norms=None,
            token_count=np.zeros(0, np.int32),
            truncated=np.zeros(0, np.bool_),
        )
        self._inference = InferenceScheduler(
            dim=config.dim,
            plan=lambda lengths: plan(lengths, self.replicas.concurrency),
            window_tokens=config.window_tokens,
            crowded=crowded,
            max_queue_delay_s=config.workers.max_queue_delay_ms / 1000,
            more_coming=lambda: self._tokenization.busy,
            hurry=self._hurry_replicas,
            telemetry=telemetry,
            model=config.model,
            num_layers=config.num_layers,
        )
        self._tokenization = TokenizationScheduler(
            telemetry, self._inference.put, hurry=self._hurry_tokenizers
        )

        def restarted(worker: str) -> None:
            telemetry.worker_restarts.add(model=config.model, worker=worker)

        def changed(worker: str, state: str) -> None:
            telemetry.worker_states.add(model=config.model, worker=worker, state=state)

        self.tokenizers = WorkerPool(
            "tokenizer",
            config.tokenizers,
            self._tokenization,
            urgent=self._tokenization.urgent_job,
            answer_timeout_s=config.workers.worker_timeout_s,
            on_restart=restarted,
            on_state=changed,
        )
        self.replicas = WorkerPool(
            "replica",
            config.replicas,
            self._inference,
            urgent=self._inference.urgent_job,
            standby=config.standby,
            dispatch=config.workers.dispatch,
            answer_timeout_s=config.workers.worker_timeout_s,
            # Token 0 is in every vocabulary.
            probe=MicroBatch(np.zeros(1, np.int32), np.ones(1, np.int32)),
            on_restart=restarted,
            on_state=changed,
        )
        self._end_watching = self._watch(telemetry, config.model)

    def start(self) -> None:
        """Starts and warms all workers.

        Raises:
            FletcherError: One could not load; nothing is left running.
        """
        try:
            self.replicas.start(self._load_inline)
            self.tokenizers.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all workers and closes all streams: what was in flight has no result. Idempotent."""
        for end in self._end_watching:
            end()
        # First, so that what the workers drop on the way is nobody's failed row.
        with self._opening:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        self.tokenizers.close()
        self.replicas.close()

    def open_stream(self, trace: Span | None = None) -> EmbedStream:
        """A way through the pipeline for one client call; close it in the end."""
        stream = EmbedStream(self._budget.open(), self._enqueue, trace)
        with self._opening:
            self._streams.add(stream)
            closed = self._closed
        if closed:
            stream.close()
        return stream

    def num_tokens(self, text: str) -> int:
        """Tokens of a text as the model sees it, special ones included; at most its length."""
        data = text.encode()
        with self._tokenizing:
            tokens = self._tokenize(TextBatch(data, np.array([0, len(data)], np.int64)))
        return len(tokens.input_ids)

    def queued(self, stage: str) -> int:
        """What waits for a stage: `texts` and `tokens` for their workers, or `micro_batches`."""
        depths = {
            "texts": self._tokenization.depth,
            "tokens": self._inference.depth,
            "micro_batches": self._inference.planned,
        }
        return depths[stage]()

    def queued_windows(self) -> float:
        """Tokens that wait to be planned, in windows."""
        return self._inference.depth() / max(1, self._window_tokens)

    @property
    def keeps_vectors(self) -> bool:
        """It keeps vectors of texts, which are float32, as the network gives them."""
        return self._cache is not None

    @property
    def ready(self) -> bool:
        """Whether there are workers of both kinds now."""
        return self.tokenizers.usable and self.replicas.usable

    def check(self) -> None:
        """Refuses work that nobody would do.

        Raises:
            OverloadedError: There are no workers of one kind, and none will be back soon.
        """
        for pool in (self.tokenizers, self.replicas):
            if pool.gone:
                raise pool.error()

    def statistics(self) -> dict[str, Any]:
        """Workers as they are now."""
        return {
            "tokenizers": self.tokenizers.statistics(),
            "replicas": [
                one | self._busy(one["name"], one["concurrency"])
                for one in self.replicas.statistics()
            ],
        }

    def _busy_share(self, device: str) -> float:
        return self._inference.busy(device).recent_share(self.replicas.concurrency_of(device))

    def _busy(self, device: str, concurrency: int) -> dict[str, float]:
        busy = self._inference.busy(device)
        load, load_s = busy.last_load(concurrency)
        return {
            "busy": round(busy.recent_share(concurrency), 3),
            "busy_load": round(load, 3),
            "load_s": round(load_s, 1),
        }

    def memory_bytes(self) -> int:
        """What its processes take of the machine's memory now."""
        return memory_bytes([*self.tokenizers.process_ids(), *self.replicas.process_ids()])

    def _watch(self, telemetry: Telemetry, model: str) -> list[Callable[[], None]]:
        """Shows each worker's state and rate, until what it returns is called."""
        ends = [
            telemetry.worker_usable.observe(partial(pool.is_usable, name), model=model, worker=name)
            for pool in (self.tokenizers, self.replicas)
            for name in pool.names
        ]
        for name in self.replicas.names:
            labels = {"model": model, "device": name}
            ends += [
                telemetry.device_rate.observe(partial(self.replicas.rate, name), **labels),
                telemetry.device_budget.observe(partial(self._inference.budget, name), **labels),
                telemetry.device_busy_share.observe(partial(self._busy_share, name), **labels),
            ]
        return ends

    def _hurry_tokenizers(self) -> None:
        self.tokenizers.hurry()

    def _hurry_replicas(self) -> None:
        self.replicas.hurry()

    def _enqueue(self, ticket: StreamTicket) -> None:
        whole = ticket.texts.chunking is None  # else its vectors are chunks', and not kept
        if self._cache is not None and whole and ticket.texts.num_texts:
            recall = self._cache.recall(ticket.texts)
            ticket.texts, ticket.complete = recall.missing, recall.complete
        texts = ticket.texts
        if not texts.num_texts:
            ticket.finish(self._nothing)
            return
        # Chunks are work for more than a moment, and parts of a text go on one from another: many,
        # perhaps, each within the one before.
        small = texts.num_texts <= _INLINE_TEXTS and len(texts.data) <= _INLINE_BYTES and whole
        if not (small and ticket.priority == "interactive"):
            self._tokenization.put(ticket)
            return
        try:
            with self._tokenizing:
                tokens = self._tokenize(texts)
        except Exception as error:  # noqa: BLE001 - as a worker would report it
            ticket.tokenized(as_fletcher_error(error))
        else:
            ticket.tokenized(tokens)
            self._inference.put(ticket)
