"""The pipeline's end."""

from __future__ import annotations

import numpy as np
import pytest

from fletcher.batches import TextBatch
from fletcher.errors import DrainingError
from fletcher.pipeline.embedder import Embedder, EmbedderConfig
from fletcher.pipeline.memory import MemoryBudget
from fletcher.telemetry import Telemetry


def test_streams_end_with_the_embedder_also_those_that_come_after() -> None:
    # A call that came while the server closed waited for ever for workers that had ended.
    embedder = Embedder(
        EmbedderConfig([], [], dim=2, window_tokens=100, max_queue_delay_s=0),
        plan=lambda lengths, num_runners: [],
        tokenize=lambda texts: pytest.fail("nothing is tokenized"),
        budget=MemoryBudget(1 << 20, 2),
        telemetry=Telemetry(),
    )
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
