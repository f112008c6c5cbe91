"""Several devices, simulated by processes on the CPU, of which some or all die."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

import fletcher.serving.model_loader
from fletcher import errors
from fletcher.inference.backend import BackendConfig
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.net.flight_errors import from_flight_error
from fletcher.runtime import Runtime
from fletcher.tuning.decision import Decision
from fletcher.workers.worker_handle import WorkerHandle
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import TIMEOUT, action, command, exchange
from tests.integration.numbered import SCHEMA, batches, rows
from tests.integration.processes import eventually

NUM_ROWS = 10_000
BATCH_ROWS = 500


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Runtime:
    def three_devices(_home: Path, _asked: object, _host: object, bundle: ModelBundle) -> Decision:
        folder = str(bundle.folder)
        configs = [
            BackendConfig("null", f"cuda:{n}", folder, max_batch_tokens=256, dim=bundle.dim)
            for n in range(3)
        ]
        return Decision(configs, "three devices")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fletcher.serving.model_loader, "decide", three_devices)
        # Round robin: every device gets work, however fast it seems on a busy machine.
        return start_server(tokenizer_workers=1, dispatch="round-robin")


def all_work(server: Runtime) -> bool:
    # Degraded is a matter of timing, and stays while there is nothing to do.
    replicas = server.service.models.default.model.embedder.replicas.statistics()
    return all(one["state"] in ("healthy", "degraded") for one in replicas)


def vectors_of(table: pa.Table | pa.RecordBatch) -> np.ndarray:
    column = table.column("vector")
    assert column.null_count == 0
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy().reshape(-1, 32)


def test_a_killed_device_in_the_middle_of_10_000_rows_loses_and_changes_none(
    server: Runtime,
) -> None:
    pool = server.service.models.default.model.embedder.replicas
    with flight.connect(server.address) as client:
        undisturbed = vectors_of(
            exchange(client, [rows(0, NUM_ROWS)], SCHEMA, dtype="float32")[0][0]
        )
        assert len(np.unique(undisturbed, axis=0)) == NUM_ROWS  # a swap would show
        writer, reader = client.do_exchange(command(dtype="float32"), TIMEOUT)
        writer.begin(SCHEMA)
        answers = []
        victim = pool.process_ids()[1]
        for first in range(0, NUM_ROWS, 2500):
            if first == 5000:  # it has work when it dies
                os.kill(victim, signal.SIGSTOP)
            for batch in batches(first, first + 2500, BATCH_ROWS):
                writer.write_batch(batch)
            if first == 5000:
                eventually(lambda: pool.statistics()[1]["in_flight"] > 0, "it has work")
                os.kill(victim, signal.SIGKILL)
            for _ in range(5):
                chunk = reader.read_chunk()
                assert json.loads(chunk.app_metadata.to_pybytes())["errors"] == []
                answers.append(chunk.data)
        writer.done_writing()
        writer.close()
        stats = action(client, "stats")
    table = pa.Table.from_batches(answers)
    assert table.column("id").to_pylist() == list(range(NUM_ROWS))
    assert np.array_equal(vectors_of(table), undisturbed)
    assert [one["restarts"] for one in stats["replicas"]] == [0, 1, 0]
    assert all(rate > 0 for rate in list(stats["fletcher.device.rate"].values())[::2])
    eventually(lambda: all_work(server), "it is back")


def test_all_devices_gone_is_an_error_that_passes_and_nothing_is_lost(
    server: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = server.service.models.default.model.embedder.replicas
    start = WorkerHandle._start

    def no_device(slot: WorkerHandle) -> object:
        if slot.spec.name.startswith("cuda"):
            raise errors.BackendError("no such device")
        return start(slot)

    options = {"dataset": "gone", "upload_id": "u", "dtype": "float32"}
    end = json.dumps({"end": True, "rows": 2000}).encode()
    with flight.connect(server.address) as client:
        writer, reader = client.do_put(command(**options), SCHEMA, TIMEOUT)
        writer.write_batch(rows(0, 1000))
        while json.loads(reader.read().to_pybytes())["rows_durable"] < 1000:
            pass
        monkeypatch.setattr(WorkerHandle, "_start", no_device)
        for pid in pool.process_ids():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: pool.gone, "all are gone")
        # An upload that is open ends, and no row of it counts as failed.
        writer.write_batch(rows(1000, 2000))
        writer.done_writing()
        with pytest.raises(flight.FlightUnavailableError) as caught:
            while reader.read() is not None:
                pass
            writer.close()
        error = from_flight_error(caught.value)
        assert (error.code, error.retry_after_ms) == ("overloaded", 5000)
        # So do new calls.
        with pytest.raises(flight.FlightUnavailableError, match="no replica worker is running"):
            exchange(client, [rows(0, 10)], SCHEMA)
        with pytest.raises(flight.FlightUnavailableError):
            action(client, "embed", {"texts": ["one"]})
        assert action(client, "ready")["ready"] is False
        assert {one["state"] for one in action(client, "stats")["replicas"]} == {"down"}

        monkeypatch.setattr(WorkerHandle, "_start", start)
        eventually(lambda: action(client, "ready")["ready"], "they are back")
        writer, reader = client.do_put(command(**options), SCHEMA, TIMEOUT)
        writer.write_batch(rows(0, 2000))
        writer.write_metadata(end)
        writer.done_writing()
        messages = []
        while (buffer := reader.read()) is not None:
            messages.append(json.loads(buffer.to_pybytes()))
        writer.close()
    summary = messages[-1]
    assert (summary["complete"], summary["rows_failed"]) == (True, 0)
    table = server.service.delivery.stores["default"].scan("gone").read_all().sort_by("id")
    assert table.column("id").to_pylist() == list(range(2000))
    assert table.column("vector").null_count == 0
    eventually(lambda: all_work(server), "all devices are back")
