"""The pipeline's end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fletcher.core.batches import TextBatch, TokenBatch
from fletcher.core.chunking import Chunking
from fletcher.errors import DrainingError, FletcherError
from fletcher.inference.null import null_embeddings
from fletcher.pipeline.embedder import Embedder, ModelProcesses, SharedResources
from fletcher.pipeline.interactive.path import InlineModel
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.scheduler import BatchingConfig, ModelShape
from fletcher.telemetry.tracing import Telemetry
from fletcher.workers.messages import WorkerSpec
from tests.doubles.replicas import POISON


def make(
    tokenize: Callable[[TextBatch], TokenBatch],
    replicas: Sequence[WorkerSpec] = (),
    *,
    dim: int = 2,
    plan: Callable[..., Any] = lambda lengths, num_runners: [],
) -> Embedder:
    return Embedder(
        ModelShape(dim),
        ModelProcesses([], replicas),
        BatchingConfig(plan, window_tokens=100, max_queue_delay_s=0),
        SharedResources(MemoryBudget(1 << 20, 2), Telemetry()),
        InlineModel(tokenize),
    )


def test_streams_end_with_the_embedder_also_those_that_come_after() -> None:
    # A call that came while the server closed waited for ever for workers that had ended.
    embedder = make(lambda texts: pytest.fail("nothing is tokenized"))
    texts = TextBatch(b"hi", np.array([0, 2]))
    before = embedder.open_stream()
    before.submit(texts, None, num_bytes=10)
    before.end()
    done = embedder.open_stream()
    done.end()
    embedder.close()
    for stream in (before, embedder.open_stream()):
        # They ended as if that had been all: an exchange with answers missing ended well.
        with pytest.raises(DrainingError):
            list(stream.results())
        with pytest.raises(DrainingError):
            stream.submit(texts, None, num_bytes=10)
    assert list(done.results()) == []


def test_chunks_are_not_tokenized_in_the_callers_thread() -> None:
    embedder = make(lambda texts: pytest.fail("other callers wait meanwhile"))
    texts = TextBatch(b"hi", np.array([0, 2]), chunking=Chunking("tokens", 8))
    embedder.open_stream().submit(texts, None, num_bytes=10, priority="interactive")
    embedder.close()


@pytest.mark.parametrize("outcome", ["die", "fail"])
def test_a_poisoned_batch_fails_its_own_rows_only(outcome: str) -> None:
    def numbers(texts: TextBatch) -> TokenBatch:
        ids = np.array([int(word) for word in texts.data.split()], np.int32)
        return TokenBatch(ids, np.arange(len(ids) + 1), np.zeros(len(ids), np.bool_), {})

    specs = [
        WorkerSpec(f"cuda-{n}", "tests.doubles.replicas:load_poisoned", outcome) for n in range(3)
    ]
    embedder = make(
        numbers,
        specs,
        dim=16,
        plan=lambda lengths, _: np.split(np.arange(len(lengths)), range(4, len(lengths), 4)),
    )
    embedder.start()
    try:
        stream = embedder.open_stream()
        for first in range(600, 720, 4):
            data = b"".join(b"%4d" % n for n in range(first, first + 4))
            texts = TextBatch(data, np.arange(0, 17, 4))
            stream.submit(texts, first, num_bytes=100, priority="interactive")
        stream.end()
        for result in stream.results():
            batch, first = result.embeddings, result.context
            assert not isinstance(batch, FletcherError)
            if first <= POISON < first + 4:
                assert set(batch.errors) == {0, 1, 2, 3}
            else:
                assert batch.errors == {}
                ids = np.arange(first, first + 4, dtype=np.int32)
                expected = null_embeddings(ids, np.ones(4, np.int32), 16)
                assert np.array_equal(batch.embeddings, expected)
        restarts = sum(one["restarts"] for one in embedder.replicas.statistics())
        assert restarts == (2 if outcome == "die" else 0)
    finally:
        embedder.close()
