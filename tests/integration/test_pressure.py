"""An unavailable store and a nearly full journal: which calls go on, and which are refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

import fletcher
from fletcher.client import PutSummary
from fletcher.runtime import Runtime
from fletcher.serving.admission import RetryHints
from fletcher.serving.load_level import LoadTiming
from fletcher.util.backoff import Backoff
from tests.doubles.longbow import LongbowDouble
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import action, error_of, exchange, put
from tests.integration.numbered import SCHEMA, rows
from tests.integration.processes import eventually

MAX_JOURNAL = 256 * 1024
ROWS = 1000


class Away(LongbowDouble):
    """Fails every write until it is back; then it counts rows."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()
        self.num_rows = 0

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        if not self.back.is_set():
            raise flight.FlightUnavailableError("away")
        self.num_rows += batch.num_rows


@pytest.fixture
def store() -> Iterator[Away]:
    with Away() as double:
        yield double


@pytest.fixture
def server(store: Away, start_server: StartServer, tiny_home: Path, tmp_path: Path) -> Runtime:
    (tmp_path / "models").symlink_to(tiny_home / "models")
    return start_server(
        home=tmp_path,
        store=(f"{store.address}&profile=longbow",),
        max_journal=MAX_JOURNAL,
        store_retry=60,
    )


def batches(num_rows: int) -> Iterator[pa.RecordBatch]:
    """Rows of some 2 kB each: twice what the journal holds."""
    for first in range(0, num_rows, 100):
        batch = rows(first, first + 100)
        texts = pa.array([text.ljust(2000, ".") for text in batch.column("text").to_pylist()])
        yield pa.record_batch({"id": batch.column("id"), "text": texts}, SCHEMA)


def test_new_bulk_work_waits_while_the_store_is_away_and_interactive_work_goes_on(
    server: Runtime, store: Away
) -> None:
    server.service.admission.hints = RetryHints(severe_ms=200)
    server.service.load.timing = LoadTiming(leave_after_s=0.2)
    (breaker,) = server.service.delivery._breakers.values()
    breaker._retry = Backoff(first_s=0.1, longest_s=0.2, jitter=1.0)
    summaries: dict[str, PutSummary] = {}

    def upload(name: str) -> None:
        data = pa.RecordBatchReader.from_batches(SCHEMA, batches(ROWS))
        transfer = fletcher.TransferOptions(max_retries=1000, max_backoff_s=0.2)
        with fletcher.connect(server.address, transfer=transfer) as client:
            summaries[name] = client.put(data, "d")

    accepted = threading.Thread(target=upload, args=("accepted",))
    accepted.start()
    with flight.connect(server.address) as client:

        def grade() -> str:
            return str(action(client, "stats")["pressure"]["grade"])

        eventually(lambda: grade() == "severe", "the journal is full and the store away")
        with pytest.raises(flight.FlightUnavailableError) as caught:
            put(client, [rows(0, 10)], SCHEMA, dataset="d")
        refusal = error_of(caught.value)
        assert (refusal["code"], refusal["retry_after_ms"]) == ("overloaded", 200)
        assert "a store is unavailable" in refusal["message"]
        with pytest.raises(flight.FlightUnavailableError):
            exchange(client, [rows(0, 100)], SCHEMA)

        ((answer, _),) = exchange(client, [rows(0, 3)], SCHEMA)
        assert answer.column("vector").null_count == 0
        assert len(action(client, "embed", {"texts": ["a", "b"]})["embeddings"]) == 2

        # The library comes again by itself, and gets in when the store is back.
        refused = server.service.telemetry.errors.values()["overloaded",]
        late = threading.Thread(target=upload, args=("late",))
        late.start()
        eventually(
            lambda: server.service.telemetry.errors.values()["overloaded",] >= refused + 2,
            "the library was refused and tried again",
        )
        assert accepted.is_alive(), "who is in is slowed, and not refused"
        store.back.set()
        for thread in (accepted, late):
            thread.join(30)
        assert summaries["accepted"].complete
        assert summaries["late"].complete
        eventually(lambda: grade() == "normal", "the journal is empty again")
        times = action(client, "stats")["fletcher.pressure.time"]
        assert times["severe"] > 0
    eventually(lambda: store.num_rows == 2 * ROWS, "the store has all rows once")
