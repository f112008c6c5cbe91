"""The single-text path: which texts run in this process, on which thread, and what is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fletcher.core.batches import (
    InferenceResult,
    MicroBatch,
    Priority,
    TextBatch,
    TokenBatch,
)
from fletcher.core.chunking import Chunking
from fletcher.errors import BackendError, DrainingError, FletcherError, InternalError
from fletcher.pipeline.device_usage import DeviceUsage
from fletcher.pipeline.interactive.path import InlineModel, InteractiveHost, InteractivePath
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.stream import EmbedStream, StreamTicket
from fletcher.telemetry.tracing import Telemetry

SCHEDULED = InternalError("scheduled")


def words(texts: TextBatch) -> TokenBatch:
    """A token for each byte."""
    ids = np.frombuffer(bytes(texts.data), np.uint8).astype(np.int32)
    return TokenBatch(ids, texts.offsets, np.zeros(texts.num_texts, np.bool_))


def engine(batch: MicroBatch) -> InferenceResult:
    """Vectors that tell how long a row is."""
    vectors = np.repeat(batch.lengths[:, None], 2, axis=1).astype(np.float32)
    return InferenceResult(vectors, None, 0.5)


class Bench:
    """A path, and an embedder's side of it: what is scheduled fails with `SCHEDULED`."""

    def __init__(
        self,
        tokenize: Callable[[TextBatch], TokenBatch] | None = words,
        run: Callable[[MicroBatch], InferenceResult] | None = engine,
    ) -> None:
        self.device: str | None = "cpu-0"
        self.scheduled: list[StreamTicket] = []
        self.telemetry = Telemetry()
        self.usage = DeviceUsage(self.telemetry, "m")
        self.path = InteractivePath(
            InlineModel(tokenize, lambda: run),
            InteractiveHost(
                idle_device=lambda: self.device,
                schedule=self._schedule,
                plan=lambda lengths: [np.array([n]) for n in range(len(lengths))],
                dim=2,
            ),
            self.usage,
            self.telemetry,
        )
        self.path.load_engine()

    def embed(
        self, *texts: bytes, priority: Priority = "interactive", **fields: Any
    ) -> list[list[float]] | FletcherError:
        """Vectors of a stream's only submission, or its error."""
        stream = self.submit(*texts, priority=priority, **fields)
        (result,) = stream.results()
        if isinstance(result.embeddings, FletcherError):
            return result.embeddings
        assert not result.embeddings.errors
        vectors: list[list[float]] = result.embeddings.embeddings.tolist()
        return vectors

    def submit(self, *texts: bytes, priority: Priority, **fields: Any) -> EmbedStream:
        ends = np.cumsum([0, *map(len, texts)])
        batch = replace(TextBatch(b"".join(texts), ends), **fields)
        stream = EmbedStream(MemoryBudget(1 << 20, 2).open_allowance(), self._enqueue)
        stream.submit(batch, None, num_bytes=10, priority=priority)
        stream.end()
        return stream

    def counted(self, name: str) -> float:
        found = self.telemetry.snapshot()[name]
        return float(sum(found.values()) if isinstance(found, dict) else found)

    def _enqueue(self, ticket: StreamTicket) -> None:
        if not self.path.run_ticket(ticket):
            self._schedule(ticket)

    def _schedule(self, ticket: StreamTicket) -> None:
        self.scheduled.append(ticket)
        ticket.finish(SCHEDULED)


def test_short_texts_run_on_the_thread_that_waits_for_them_and_count_as_a_replicas() -> None:
    threads: list[threading.Thread] = []

    def noted(batch: MicroBatch) -> InferenceResult:
        threads.append(threading.current_thread())
        return engine(batch)

    bench = Bench(run=noted)
    assert bench.embed(b"four") == [[4, 4]]
    assert bench.embed(b"one", b"three") == [[3, 3], [5, 5]]
    assert set(threads) == {threading.current_thread()}
    assert not bench.scheduled
    assert bench.counted("fletcher.device.batches") == 3
    assert bench.counted("fletcher.device.tokens") == 12
    assert bench.counted("fletcher.device.busy") == 1.5
    assert bench.counted("fletcher.texts.received") == 3
    assert bench.counted("fletcher.tokens.received") == 12
    assert bench.usage.busy("cpu-0").last_load(1)[1] > 0


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        ([b"hi"], {"priority": "bulk"}),
        ([b"hi"], {"half": True}),
        ([b"hi"], {"chunking": Chunking("tokens", 8)}),
        ([b"hi"] * 5, {}),
        ([b"x" * 4097], {}),
    ],
    ids=["bulk", "float16", "chunks", "many", "long"],
)
def test_other_texts_reach_neither_tokenizer_nor_engine_of_this_process(
    texts: list[bytes], options: dict[str, Any]
) -> None:
    bench = Bench(tokenize=lambda _: pytest.fail("tokenized"), run=lambda _: pytest.fail("run"))
    assert bench.embed(*texts, **options) is SCHEDULED
    assert [ticket.tokens for ticket in bench.scheduled] == [None]


def test_while_something_else_runs_a_text_is_only_tokenized_here() -> None:
    bench = Bench(run=lambda _: pytest.fail("run"))
    bench.device = None
    assert bench.embed(b"four") is SCHEDULED
    (ticket,) = bench.scheduled
    assert ticket.tokens is not None
    assert ticket.tokens.input_ids.tolist() == list(b"four")
    assert bench.counted("fletcher.texts.received") == 0  # the scheduler counts it


def test_a_text_of_many_tokens_is_only_tokenized_here() -> None:
    bench = Bench(run=lambda _: pytest.fail("run"))
    assert bench.embed(b"x" * 1025) is SCHEDULED
    assert [ticket.tokens is None for ticket in bench.scheduled] == [False]


def test_an_isolated_engine_leaves_everything_to_the_processes() -> None:
    bench = Bench(tokenize=None, run=None)
    assert bench.embed(b"four") is SCHEDULED
    assert [ticket.tokens for ticket in bench.scheduled] == [None]
    assert bench.path.tokenize(TextBatch(b"hi", np.array([0, 2]))) is None


def test_a_second_text_meanwhile_is_scheduled() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(batch: MicroBatch) -> InferenceResult:
        begun.set()
        assert go_on.wait(30)
        return engine(batch)

    bench = Bench(run=slow)
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.append(bench.embed(b"first")))
    first.start()
    assert begun.wait(30)
    assert bench.embed(b"second") is SCHEDULED
    go_on.set()
    first.join(30)
    assert found == [[[5, 5]]]
    assert [bytes(ticket.texts.data) for ticket in bench.scheduled] == [b"second"]


def test_a_text_is_scheduled_if_work_came_before_its_thread_did() -> None:
    bench = Bench(run=lambda _: pytest.fail("run"))
    stream = bench.submit(b"four", priority="interactive")
    assert not bench.scheduled  # its thread is to run it
    bench.device = None
    (result,) = stream.results()
    assert result.embeddings is SCHEDULED


def test_a_closed_stream_runs_nothing() -> None:
    bench = Bench(run=lambda _: pytest.fail("run"))
    stream = bench.submit(b"four", priority="interactive")
    stream.close()
    with pytest.raises(DrainingError):
        list(stream.results())
    assert not bench.scheduled


def test_a_text_that_fails_here_is_scheduled_with_its_tokens_and_the_next_one_runs() -> None:
    failures = [BackendError("no memory")]

    def fails_once(batch: MicroBatch) -> InferenceResult:
        if failures:
            raise failures.pop()
        return engine(batch)

    bench = Bench(run=fails_once)
    assert bench.embed(b"four") is SCHEDULED
    assert bench.scheduled[0].tokens is not None
    assert bench.counted("fletcher.device.batches") == 0
    assert bench.embed(b"four") == [[4, 4]]


def test_a_text_that_cannot_be_tokenized_fails_as_in_a_worker() -> None:
    def broken(_: TextBatch) -> TokenBatch:
        raise ZeroDivisionError

    bench = Bench(tokenize=broken)
    assert isinstance(bench.embed(b"four"), InternalError)
    assert not bench.scheduled
