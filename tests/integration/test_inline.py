"""Short texts that come when nothing else runs: a model in the front process answers them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.core.batches import InferenceResult, MicroBatch, TextBatch
from fletcher.pipeline.interactive.path import InteractivePath
from fletcher.runtime import Runtime
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import action, exchange
from tests.integration.processes import eventually

SCHEMA = pa.schema([("text", pa.utf8())])
BUSY = "fletcher.device.batches"


@pytest.fixture(scope="module")
def real(start_server: StartServer) -> Runtime:
    return start_server(backend="openvino", precision="float32", threads=2)


def texts(*some: str) -> pa.RecordBatch:
    return pa.record_batch([pa.array(some, pa.utf8())], schema=SCHEMA)


def vectors(client: flight.FlightClient, *batches: pa.RecordBatch) -> np.ndarray:
    answers = exchange(client, list(batches), SCHEMA, dtype="float32")
    columns = [batch.column("vector").flatten().to_numpy() for batch, _ in answers]
    return np.concatenate(columns).reshape(sum(len(one) for one in batches), -1)


@pytest.fixture
def stopped(real: Runtime) -> Iterator[list[int]]:
    """The replica's process, which stands still."""
    pids = real.service.models.default.model.embedder.replicas.process_ids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def path_of(server: Runtime) -> InteractivePath:
    return server.service.models.default.model.embedder._interactive


@pytest.fixture
def threads(real: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Threads that ran the engine of this process, by name."""
    path = path_of(real)
    engine, names = path._engine, []

    def noted(batch: MicroBatch) -> InferenceResult:
        assert len(batch.lengths) == 1
        names.append(threading.current_thread().name)
        return engine(batch)

    monkeypatch.setattr(path, "_engine", noted)
    return names


def test_single_texts_are_embedded_in_this_process_with_the_same_vectors(
    real: Runtime, threads: list[str]
) -> None:
    words = ["one", "two words", "a text of five words"]
    with flight.connect(real.address) as client:
        company = vectors(client, texts(*(words * 40)))[: len(words)]  # bulk: a replica's
        assert not threads
        before = action(client, "stats")[BUSY]
        for word, expected in zip(words, company, strict=True):
            assert np.abs(vectors(client, texts(word))[0] - expected).max() < 1e-5
        after = action(client, "stats")[BUSY]
    assert len(threads) == 3
    # They count as the work of that replica.
    assert sum(after.values()) - sum(before.values()) == 3


def test_the_embed_action_changes_no_thread(real: Runtime, threads: list[str]) -> None:
    with flight.connect(real.address) as client:
        answers = [action(client, "embed", {"texts": ["one"]}) for _ in range(5)]
        stats = action(client, "stats")
    assert len(threads) == 5
    assert not any("exchange" in name or "reader" in name for name in threads)
    assert all(answer == answers[0] for answer in answers)
    assert stats["memory"]["used_bytes"] == 0


def test_what_comes_meanwhile_goes_to_the_replica(real: Runtime, stopped: list[int]) -> None:
    # Bulk work waits for the replica, which has something to do then: a text follows it there.
    found: list[np.ndarray] = []

    def send(*some: str) -> None:
        with flight.connect(real.address) as client:
            found.append(vectors(client, texts(*some)))

    replicas = real.service.models.default.model.embedder.replicas
    bulk = threading.Thread(target=send, args=["some", "words"] * 50)
    bulk.start()
    eventually(lambda: any(one["in_flight"] for one in replicas.statistics()), "it has work")
    single = threading.Thread(target=send, args=["single"])
    single.start()
    eventually(lambda: sum(one["in_flight"] for one in replicas.statistics()) > 1, "it has both")
    assert not found
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    bulk.join(30)
    single.join(30)
    assert sorted(map(len, found)) == [1, 100]


def test_an_isolated_engine_is_in_no_other_process(start_server: StartServer) -> None:
    server = start_server(backend="openvino", precision="float32", threads=2, isolate_engine=True)
    path = path_of(server)
    assert path._engine is None
    assert path.tokenize(TextBatch(b"hi", np.array([0, 2]))) is None
    with flight.connect(server.address) as client:
        assert vectors(client, texts("one")).shape[0] == 1
        # Its tokens are counted without a tokenizer in this process, once.
        prompted = {"prompt": "Some words: ", "texts": ["one"]}
        answers = [action(client, "embed", prompted) for _ in range(2)]
        assert answers[0] == answers[1]
        prompted["prompt"] = "words " * 600
        with pytest.raises(flight.FlightInternalError, match="takes all 32 tokens"):
            action(client, "embed", prompted)
