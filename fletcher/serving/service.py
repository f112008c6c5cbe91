"""What this server offers: a model, its pipeline, its stores; and what a command means here."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fletcher.config.model import OutputConfig
from fletcher.core.chunking import Chunking
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec
from fletcher.delivery.delivery import Delivery
from fletcher.errors import (
    DrainingError,
    OverloadedError,
)
from fletcher.net.compression import Answers
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.prompts import prompt_tokens, resolve_prompt
from fletcher.pipeline.vector_spec import check_late, vector_spec
from fletcher.serving.load_level import LoadLevel, LoadMonitor
from fletcher.serving.model_manager import ModelManager, ServedModel
from fletcher.telemetry.tracing import Telemetry

OVERLOAD_RETRY_MS = 1000
SEVERE_RETRY_MS = 5000
DRAIN_RETRY_MS = 5000
# Calls that have begun, for each stream that may be open: one that is silent takes a thread and
# some 90 kB.
_BEGUN_PER_STREAM = 8


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A command, resolved against the model: nothing is left open.

    `layers` is the exit to leave by, 0 where that is the last: however it was asked for, all such
    work runs together. `taken` are the tokens of the prompt and special ones in each chunk; 0
    where there is neither prompt nor chunking.
    """

    options: EmbedCommand
    spec: VectorSpec
    prompt: str
    layers: int
    taken: int = 0


class Calls:
    """Admission: how many streams there are, and whether new ones are let in.

    Args:
        max_streams: DoPut and DoExchange calls with data at once.
        telemetry: Where the number of streams is shown.
    """

    def __init__(self, max_streams: int, telemetry: Telemetry) -> None:
        self.draining = threading.Event()
        self._max_streams = max_streams
        self._num_open = self._num_begun = 0
        self._changed = threading.Condition()
        telemetry.streams_open.observe(lambda: self._num_open)

    def check(self) -> None:
        """Refuses new calls while draining."""
        if self.draining.is_set():
            raise DrainingError(
                "the server is shutting down; try another, or again later",
                retry_after_ms=DRAIN_RETRY_MS,
            )

    def share(self) -> float:
        """Of all places for streams, how much is taken."""
        return self._num_open / self._max_streams

    @contextmanager
    def begun(self) -> Iterator[None]:
        """A DoPut or DoExchange, which has no place as a stream as long as it sends nothing.

        Raises:
            DrainingError: The server is shutting down.
            OverloadedError: So many are there that their threads alone would take too much.
        """
        self.check()
        with self._changed:
            if self._num_begun >= _BEGUN_PER_STREAM * self._max_streams:
                raise OverloadedError(
                    f"{self._num_begun} calls have begun, most of which send nothing; "
                    "try again later",
                    retry_after_ms=OVERLOAD_RETRY_MS,
                )
            self._num_begun += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_begun -= 1

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A place for a stream, held while the body runs.

        Raises:
            OverloadedError: All places are taken.
        """
        with self._changed:
            self.check()
            if self._num_open >= self._max_streams:
                raise OverloadedError(
                    f"{self._num_open} streams are open, as many as `max_streams` allows; "
                    "try again later",
                    retry_after_ms=OVERLOAD_RETRY_MS,
                )
            self._num_open += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_open -= 1
                self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no stream is open; False where some still are."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_open == 0, timeout_s)

    @property
    def num_open(self) -> int:
        """Streams now open."""
        return self._num_open


@dataclass(frozen=True, slots=True)
class Service:
    """Everything a call needs; `outputs` says what vectors may be asked for."""

    models: ModelManager
    budget: MemoryBudget
    delivery: Delivery
    calls: Calls
    answers: Answers
    pressure: LoadMonitor
    telemetry: Telemetry
    outputs: OutputConfig

    def resolve(
        self, running: ServedModel, options: EmbedCommand, *, dtypes: tuple[str, ...]
    ) -> EmbedRequest:
        """A command as this server will carry it out.

        Args:
            running: The model that does it.
            options: What was asked.
            dtypes: Element types that the destination takes.

        Raises:
            DimensionMismatchError, InvalidCommandError: Vectors, a prompt or chunks that cannot be.
        """
        model = running.bundle
        spec = vector_spec(model, options, dtypes, self.outputs)
        prompt = resolve_prompt(model, options.prompt)
        chunking = Chunking.from_text(options.chunking or "none")
        taken = 0
        if chunking is not None:
            check_late(model, chunking, spec.layers)
        if prompt or chunking is not None:
            taken = prompt_tokens(model, prompt, running.embedder.num_tokens)
            chunking = chunking and chunking.fitted(model.max_length, taken)
            spec = replace(spec, chunking=chunking)
        layers = 0 if spec.layers == model.num_layers else spec.layers
        return EmbedRequest(options, spec, prompt, layers, taken)

    def admit(self, model: ServedModel, *, bulk: bool) -> AbstractContextManager[None]:
        """A place for a stream, held in `with`; who has one is slowed, never refused any more.

        Raises:
            OverloadedError: All places are taken, no workers are left, or this is no time for bulk
                work.
        """
        model.embedder.check()
        if bulk and self.pressure.observe() is LoadLevel.SEVERE:
            raise OverloadedError(
                f"the server takes no new bulk work now: {self.pressure.reason}; try again later",
                retry_after_ms=SEVERE_RETRY_MS,
            )
        return self.calls.stream()

    def describe(self) -> dict[str, Any]:
        """The `stats` action's answer: instruments, stores and workers."""
        default = self.models.default
        running = [(one.name, one.model) for one in self.models.running()]
        engines = {name: dict(model.engine) for name, model in running if model is not None}
        return {
            "model": default.name,
            "models": self.models.describe(),
            "aliases": self.models.aliases(),
            "engine": engines.get(default.name, {}),
            "engines": engines,
            "draining": self.calls.draining.is_set(),
            "pressure": self.pressure.statistics(),
            "stores": self.delivery.statistics(),
            **self.telemetry.snapshot(),
            "memory": self.budget.statistics(),
            "tokenizers": _of_all(running, "tokenizers"),
            "replicas": _of_all(running, "replicas"),
        }


def _of_all(
    running: Iterable[tuple[str, ServedModel | None]], workers: str
) -> list[dict[str, Any]]:
    """Workers of one kind, of all models."""
    return [
        {"model": name, **worker}
        for name, model in running
        if model is not None
        for worker in model.embedder.statistics()[workers]
    ]
