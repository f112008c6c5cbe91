"""Memory stays bounded while a store takes no rows and a client sends on."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from pyarrow import flight

from tests.doubles.longbow import LongbowDouble
from tests.integration.flight_calls import action, command, exchange
from tests.integration.numbered import SCHEMA, rows
from tests.integration.processes import Place, eventually, serving

MIB = 2**20
MAX_MEMORY = 512 * MIB
MAX_MESSAGE = 16 * MIB
MESSAGE = 4 * MIB
TOTAL = int(os.environ.get("FLETCHER_TEST_BYTES", 600 * MIB))
ROW = 64 * 1024


class Stalled(LongbowDouble):
    """Takes no row until it is released; then it counts rows and keeps them without texts."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.waiting = threading.Event()
        self.num_rows: dict[str, int] = {}

    def __exit__(self, *_: object) -> None:
        self.go.set()
        super().__exit__()

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        self.waiting.set()
        self.go.wait()
        self.num_rows[dataset] = self.num_rows.get(dataset, 0) + batch.num_rows
        super().store(dataset, batch.drop_columns(["text"]))


@pytest.fixture
def place(tiny_home: Path, tmp_path: Path) -> Place:
    return Place(tiny_home, tmp_path / "vectors")


class Sender:
    """A client that writes as fast as the server accepts."""

    def __init__(self, address: str) -> None:
        self.num_bytes = 0
        self.summary: dict[str, object] = {}
        self.failure: Exception | None = None
        self._client = flight.connect(address)
        self._writer, self._reader = self._client.do_put(
            command(dataset="d", upload_id="u", durability="store"),
            pa.schema({"text": pa.utf8()}),
        )
        self._threads = [threading.Thread(target=one) for one in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def _write(self) -> None:
        num_rows = 0
        words = "a word or two of text " * (ROW // 22 + 1)
        batch = pa.record_batch({"text": [words[:ROW]] * (MESSAGE // ROW - 1)})
        try:
            while self.num_bytes < TOTAL:
                self._writer.write_batch(batch)
                num_rows += batch.num_rows
                self.num_bytes += batch.nbytes
            self._writer.write_metadata(json.dumps({"end": True, "rows": num_rows}).encode())
            self._writer.done_writing()
        except (flight.FlightError, pa.ArrowException) as error:
            self.failure = error

    def _read(self) -> None:
        with contextlib.suppress(flight.FlightError, pa.ArrowException):
            while (answer := self._reader.read()) is not None:
                message = json.loads(answer.to_pybytes())
                if message["type"] == "summary":
                    self.summary = message

    def join(self, timeout_s: float) -> None:
        for thread in self._threads:
            thread.join(timeout_s)
            assert not thread.is_alive()

    def close(self) -> None:
        with contextlib.suppress(flight.FlightError, pa.ArrowException):
            self._writer.close()
        self._client.close()


@contextlib.contextmanager
def sending(address: str) -> Iterator[Sender]:
    sender = Sender(address)
    try:
        yield sender
    finally:
        sender.close()


def is_blocked(sender: Sender) -> bool:
    """Whether it has sent rows, and no more for a second."""
    before = sender.num_bytes
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        if not before or sender.num_bytes != before:
            return False
        time.sleep(0.02)
    return True


def test_a_store_that_takes_nothing_blocks_its_clients_and_fills_no_memory(place: Place) -> None:
    with Stalled() as store:
        options = [
            *("--store", f"{store.address}&profile=longbow", "--store-timeout", "600s"),
            *("--max-memory", str(MAX_MEMORY), "--max-message-bytes", str(MAX_MESSAGE)),
            *("--max-row-bytes", str(MIB)),
        ]
        with serving(place.argv(*options)) as server, sending(server.address) as sender:
            assert store.waiting.wait(30)
            eventually(lambda: is_blocked(sender), "its writes block", 60)
            assert sender.num_bytes < min(TOTAL, MAX_MEMORY)
            assert sender.failure is None
            with flight.connect(server.address) as other:
                ((answer, _),) = exchange(other, [rows(0, 10)], SCHEMA)
                assert answer.num_rows == 10
                # Waiting is no work.
                busy_s = cpu_seconds(server.pid)
                assert is_blocked(sender)
                assert cpu_seconds(server.pid) - busy_s < 0.5

                store.go.set()
                sender.join(120)
                assert sender.failure is None
                assert sender.summary["complete"] is True
                assert sender.summary["rows_stored"] == store.num_rows["d"]
                assert sender.num_bytes >= TOTAL
                assert action(other, "stats")["memory"]["used_bytes"] == 0
            peak = server.peak_bytes()
            assert peak < MAX_MEMORY + MAX_MESSAGE, f"{peak / MIB:.0f} MiB"


def cpu_seconds(process_id: int) -> float:
    times = psutil.Process(process_id).cpu_times()
    return float(times.user + times.system)
