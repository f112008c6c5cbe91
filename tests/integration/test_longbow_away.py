"""A Longbow that is not there when a command or a server starts."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.cli import ingest, main
from tests.doubles.longbow import LongbowDouble
from tests.integration import flight_calls
from tests.integration.conftest import StartServer
from tests.integration.processes import FLETCHER, clean_environ, eventually

BATCH = pa.record_batch({"id": ["a", "b"], "text": ["one text", "another text"]})


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An ingest that fails if it loads a model, which takes seconds."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("fletcher.runtime.Runtime.__init__", load)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "text": "one text"}\n')
    return ["ingest", str(rows), "--dataset", "d", "--home", str(tmp_path), "--store"]


def test_ingest_names_the_address_at_once(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with LongbowDouble() as double:
        address = double.address
    assert main([*argv, address]) == 1
    assert f"the store {address} does not answer: connection refused" in capsys.readouterr().err


def test_ingest_does_not_wait_for_a_server_that_is_silent(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ingest, "STORE_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        assert main([*argv, address]) == 1
    told = capsys.readouterr().err
    assert f"the store {address} does not answer" in told
    assert "within the deadline" in told


@pytest.mark.parametrize("max_journal", [0, 1 << 30])
def test_a_server_starts_without_its_store_and_works_once_it_is_there(
    start_server: StartServer, tiny_home: Path, tmp_path: Path, max_journal: int
) -> None:
    with LongbowDouble() as double:
        double.kill()
        (tmp_path / "models").symlink_to(tiny_home / "models")  # and a journal for this server
        server = start_server(store=(double.address,), max_journal=max_journal, home=tmp_path)
        with flight.connect(server.address) as client:
            path = flight.FlightDescriptor.for_path("d")
            for call in (
                lambda: client.get_flight_info(path),
                lambda: list(client.list_flights()),
                lambda: flight_calls.put(client, [BATCH], BATCH.schema, dataset="d", end=2),
            ):
                with pytest.raises(flight.FlightUnavailableError) as caught:
                    call()
                told = json.loads(caught.value.extra_info)
                assert told["code"] == "store_unavailable"
                assert double.address in told["message"]
            assert flight_calls.action(client, "health")["status"] == "ok"

            assert double.restart()
            eventually(lambda: is_listed(client), "the store is available again")
            answers = flight_calls.put(client, [BATCH], BATCH.schema, dataset="d", end=2)
            assert answers[-1]["complete"]
            eventually(lambda: double.num_rows("d") == 2, "the rows are in the store")
            assert client.get_flight_info(path).total_records == 2
        assert sorted(double.table("d")["id"].to_pylist()) == ["a", "b"]


def is_listed(client: flight.FlightClient) -> bool:
    """Whether the server's store can be listed; gRPC connects again within a second."""
    try:
        return list(client.list_flights()) == []
    except flight.FlightUnavailableError:
        return False


class TakingNoRows(LongbowDouble):
    """A Longbow that stalls from the first rows on."""

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        self.stall = self.stall or threading.Event()
        super().store(dataset, batch)


def test_an_interrupt_ends_an_ingest_into_a_longbow_that_takes_no_rows(
    tiny_home: Path, tmp_path: Path
) -> None:
    # It took half a minute, and ended by SIGABRT.
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "text": "one text"}\n')
    with TakingNoRows() as double:
        argv = ["ingest", str(rows), "--dataset", "d", "--store", double.address]
        argv += ["--home", str(tiny_home), "--model", "tiny", "--backend", "null"]
        process = subprocess.Popen([sys.executable, "-c", FLETCHER, *argv], env=clean_environ())
        try:
            eventually(lambda: double.num_stalled > 0, "rows are sent", timeout_s=120)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
            process.wait()
