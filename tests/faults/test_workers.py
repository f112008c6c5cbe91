"""Worker processes that are killed while they work lose, double or change no row."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.runtime import Runtime
from fletcher.workers.pool import WorkerPool
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import TIMEOUT, command, exchange
from tests.integration.numbered import SCHEMA, batches, rows, text_of
from tests.integration.processes import eventually

NUM_ROWS = 5000
BATCH_ROWS = 250
PHASES = [(first, first + 1250) for first in range(0, NUM_ROWS, 1250)]
names = (f"dataset-{n}" for n in itertools.count())


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Runtime:
    return start_server(tokenizer_workers=2, max_batch_tokens=256)


@pytest.fixture(scope="module")
def undisturbed(server: Runtime) -> np.ndarray:
    """The rows' vectors without faults: float32 [NUM_ROWS, 32]."""
    with flight.connect(server.address) as client:
        answers = exchange(client, [rows(0, NUM_ROWS)], SCHEMA, dtype="float32")
    vectors = vectors_of(answers[0][0])
    assert len(np.unique(vectors, axis=0)) == NUM_ROWS  # a swap would show
    return vectors


def vectors_of(batch: pa.RecordBatch | pa.Table) -> np.ndarray:
    column = batch.column("vector")
    assert column.null_count == 0
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy().reshape(-1, 32)


@contextmanager
def killed(pool: WorkerPool, num_workers: int) -> Iterator[None]:
    """Pause workers, let the block give them work, and kill them with it."""
    eventually(lambda: len(pool.process_ids()) == len(pool.statistics()), "all workers are there")
    restarts = sum(worker["restarts"] for worker in pool.statistics())
    victims = pool.process_ids()[:num_workers]
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)
    yield
    eventually(
        lambda: all(worker["in_flight"] for worker in pool.statistics()[: len(victims)]),
        "the stopped workers have work",
    )
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    eventually(
        lambda: sum(worker["restarts"] for worker in pool.statistics()) == restarts + len(victims),
        "their deaths are noticed",
    )


def pool_of(server: Runtime, kind: str) -> WorkerPool:
    embedder = server.service.models.default.model.embedder
    return {"tokenizer": embedder.tokenizers, "replica": embedder.replicas}[kind]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("kind", ["tokenizer", "replica"])
def test_an_exchange_survives_its_workers(
    server: Runtime, undisturbed: np.ndarray, kind: str, num_workers: int
) -> None:
    pool = pool_of(server, kind)
    answers: list[pa.RecordBatch] = []
    with flight.connect(server.address) as client:
        writer, reader = client.do_exchange(command(dtype="float32"), TIMEOUT)
        writer.begin(SCHEMA)
        for first, last in PHASES:
            with killed(pool, num_workers):
                for batch in batches(first, last, BATCH_ROWS):
                    writer.write_batch(batch)
            for _ in range(first, last, BATCH_ROWS):
                chunk = reader.read_chunk()
                assert json.loads(chunk.app_metadata.to_pybytes())["errors"] == []
                answers.append(chunk.data)
        writer.done_writing()
        with pytest.raises(StopIteration):
            reader.read_chunk()
        writer.close()
    assert [batch.num_rows for batch in answers] == [BATCH_ROWS] * (NUM_ROWS // BATCH_ROWS)
    table = pa.Table.from_batches(answers)
    assert table.column("id").to_pylist() == list(range(NUM_ROWS))
    assert np.array_equal(vectors_of(table), undisturbed)


@pytest.mark.parametrize("kind", ["tokenizer", "replica"])
def test_an_upload_survives_its_workers(
    server: Runtime, undisturbed: np.ndarray, kind: str
) -> None:
    pool = pool_of(server, kind)
    dataset = next(names)
    with flight.connect(server.address) as client:
        options = command(dataset=dataset, upload_id="u", dtype="float32")
        writer, reader = client.do_put(options, SCHEMA, TIMEOUT)
        for first, last in PHASES:
            with killed(pool, 2):
                for batch in batches(first, last, BATCH_ROWS):
                    writer.write_batch(batch)
            while json.loads(reader.read().to_pybytes())["rows_durable"] < last:
                pass
        writer.write_metadata(json.dumps({"end": True, "rows": NUM_ROWS}).encode())
        writer.done_writing()
        summary = json.loads(reader.read().to_pybytes())
        writer.close()
        assert summary["complete"] is True
        assert summary["rows_stored"] == NUM_ROWS
        assert summary["rows_failed"] == 0
    table = server.service.delivery.stores["default"].scan(dataset).read_all().sort_by("id")
    assert table.column("id").to_pylist() == list(range(NUM_ROWS))
    assert table.column("text").to_pylist() == [text_of(row) for row in range(NUM_ROWS)]
    assert np.array_equal(vectors_of(table), undisturbed)
