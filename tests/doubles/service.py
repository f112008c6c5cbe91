"""A service whose model gives each text its length as a vector, and fails on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from fletcher.config.model import OutputConfig
from fletcher.core.batches import EmbeddingBatch
from fletcher.errors import FletcherError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.pipeline.input.limits import IntakeLimits
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.stream import EmbedStream, StreamTicket
from fletcher.serving.admission import Admission
from fletcher.serving.load_level import LoadMonitor, LoadSignals
from fletcher.serving.model_versions import ServedModel
from fletcher.serving.service import Service
from fletcher.telemetry.tracing import Span, Telemetry

LIMITS = IntakeLimits(
    max_message_bytes=1 << 20,
    max_row_bytes=1000,
    slice_rows=4,
    slice_bytes=4000,
    table_values=8,
    bytes_per_row=100,
)
MAX_STREAMS = 2


class FakeEmbedder:
    """A pipeline without workers; a text's vector has its length in every dimension.

    While `holds` is set, tickets wait in `tickets` for `answer_all`. `refusal` is what `check`
    raises; `failure` is the result of every ticket.
    """

    keeps_vectors = False

    def __init__(self, budget: MemoryBudget, dim: int) -> None:
        self.streams: list[EmbedStream] = []
        self.tickets: list[StreamTicket] = []
        self.holds = False
        self.refusal: FletcherError | None = None
        self.failure: FletcherError | None = None
        self.broken: Exception | None = None
        self._budget = budget
        self._dim = dim

    def check_workers(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def num_tokens(self, text: str, on_open: Callable[[EmbedStream], None]) -> int:
        return len(text) + 2

    def open_stream(self, trace: Span | None = None) -> EmbedStream:
        if self.broken is not None:
            raise self.broken
        self.streams.append(EmbedStream(self._budget.open_allowance(), self._enqueue, trace))
        return self.streams[-1]

    def answer_all(self) -> None:
        tickets, self.tickets = self.tickets, []
        for ticket in tickets:
            self._answer(ticket)

    def _enqueue(self, ticket: StreamTicket) -> None:
        if self.holds:
            self.tickets.append(ticket)
        else:
            self._answer(ticket)

    def _answer(self, ticket: StreamTicket) -> None:
        lengths = np.diff(ticket.texts.offsets)
        num_texts = len(lengths)
        ticket.finish(
            self.failure
            or EmbeddingBatch(
                np.repeat(lengths.astype(np.float32)[:, None], self._dim, axis=1),
                None,
                lengths.astype(np.int32),
                np.zeros(num_texts, np.bool_),
            )
        )


class FakeModels:
    """Leases one model, and counts the leases."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.num_leases = 0
        self.leased: list[tuple[str | None, dict[str, Any]]] = []
        self.refusal: FletcherError | None = None

    @contextmanager
    def lease(self, wanted: str | None, **options: Any) -> Iterator[ServedModel]:
        if self.refusal is not None:
            raise self.refusal
        self.leased.append((wanted, options))
        self.num_leases += 1
        try:
            yield self.served
        finally:
            self.num_leases -= 1

    def is_divided(self, wanted: str | None) -> bool:
        return False


class CountingTelemetry(Telemetry):
    """Counts spans that have begun and not ended, and keeps the errors that ended some."""

    def __init__(self) -> None:
        super().__init__()
        self.num_spans = 0
        self.failures: list[BaseException | None] = []

    def span(self, name: str, parent: Any = None, **attributes: Any) -> Span:
        telemetry = self
        telemetry.num_spans += 1

        class Counted(Span):
            def end(self, error: BaseException | None = None) -> None:
                telemetry.num_spans -= 1
                telemetry.failures.append(error)

        return Counted()


class FakeService:
    """A `Service` of real parts around a fake model."""

    def __init__(
        self,
        bundle: ModelBundle,
        delivery: Callable[[Telemetry], Any] = lambda _: None,
        max_bytes: int = 1 << 20,
    ) -> None:
        self.signals = LoadSignals()
        self.telemetry = CountingTelemetry()
        self.budget = MemoryBudget(max_bytes, MAX_STREAMS)
        self.embedder = FakeEmbedder(self.budget, bundle.dim)
        self.models = FakeModels(ServedModel(bundle, self.embedder, {}, LIMITS))  # type: ignore
        load = LoadMonitor(lambda: self.signals, self.telemetry, lambda _: None)
        self.admission = Admission(MAX_STREAMS, load, self.telemetry)
        self.delivery = delivery(self.telemetry)
        self.service = Service(
            models=self.models,  # type: ignore[arg-type]
            budget=self.budget,
            delivery=self.delivery,
            admission=self.admission,
            answers=SimpleNamespace(),  # type: ignore[arg-type]
            load=load,
            telemetry=self.telemetry,
            outputs=OutputConfig(),
        )

    def metric(self, name: str) -> Any:
        """An instrument's value."""
        return self.telemetry.snapshot()[f"fletcher.{name}"]

    def held(self) -> dict[str, int]:
        """Whatever calls hold now."""
        return {
            "leases": self.models.num_leases,
            "streams": self.admission.num_streams,
            "spans": self.telemetry.num_spans,
            "bytes": self.budget.statistics()["used_bytes"],
            "table_bytes": self.budget._tables_used,
        }


NOTHING = {"leases": 0, "streams": 0, "spans": 0, "bytes": 0, "table_bytes": 0}
