"""Clients that die, fall silent, never read or are many do not disturb the others."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

from tests.integration.flight_calls import TIMEOUT, action, command, error_of, exchange, put
from tests.integration.numbered import (
    SCHEMA,
    assert_every_row_once,
    batches,
    rows,
    stored,
    text_of,
)
from tests.integration.processes import Place, ServerProcess, eventually, is_steady, serving

NUM_CLIENTS = 50
CLIENT_ROWS = 120
UPLOAD_AND_WAIT = """
import sys
from pyarrow import flight
from tests.integration.flight_calls import command
from tests.integration.numbered import SCHEMA, rows

client = flight.connect(sys.argv[1])
writer, reader = client.do_put(command(dataset=sys.argv[2], upload_id="u"), SCHEMA)
for first in range(0, 2000, 50):
    writer.write_batch(rows(first, first + 50))
while (answer := reader.read()) is not None:
    print(answer.to_pybytes().decode(), flush=True)
"""
names = (f"dataset-{n}" for n in itertools.count())


@pytest.fixture(scope="module")
def place(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tiny_home, tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[ServerProcess]:
    # Little memory, so that a silent client soon holds all that it may.
    with serving(
        place.argv(
            "--max-memory", "128MiB", "--max-message-bytes", "8MiB", "--max-row-bytes", "1MiB"
        )
    ) as server:
        yield server
        assert "Traceback" not in "".join(server.errors)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[flight.FlightClient]:
    with flight.connect(server.address) as client:
        yield client


def upload(
    address: str, dataset: str, first: int, last: int, **fields: object
) -> dict[str, object]:
    """Upload rows; returns the summary."""
    with flight.connect(address) as client:
        sent = batches(first, last, 37)
        return put(client, sent, SCHEMA, end=last - first, dataset=dataset, **fields)[-1]


def num_streams(client: flight.FlightClient) -> int:
    return int(action(client, "stats")["fletcher.streams.open"])


def no_stream_is_open(client: flight.FlightClient) -> bool:
    stats = action(client, "stats")
    return stats["fletcher.streams.open"] == 0 and stats["memory"]["used_bytes"] == 0


def test_a_client_killed_in_its_upload(
    server: ServerProcess, place: Place, client: flight.FlightClient
) -> None:
    dataset = next(names)
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOAD_AND_WAIT, server.address, dataset],
        stdout=subprocess.PIPE,
        text=True,
    )
    sent = 2000
    with process:
        assert process.stdout is not None
        acknowledged = 0
        while not acknowledged:
            acknowledged = json.loads(process.stdout.readline())["rows_durable"]
        process.kill()
        for line in process.stdout:  # answers that the client read before it was killed
            acknowledged = json.loads(line)["rows_durable"]
    eventually(lambda: no_stream_is_open(client), "its stream is closed and its memory free")
    status = action(client, "upload_status", {"upload_id": "u", "dataset": dataset})
    assert status["complete"] is False
    received = status["rows_durable"]
    assert 0 < acknowledged <= received <= sent
    assert status["ranges"] == [[0, received - 1]]
    # Whoever has the rows goes on where it ended.
    fields = {"dataset": dataset, "upload_id": "u"}
    summary = put(client, batches(0, sent, 50), SCHEMA, end=sent, **fields)[-1]
    assert summary["complete"] is True
    assert summary["rows_stored"] == sent
    assert_every_row_once(stored(place.vectors, dataset), sent)


def test_a_client_that_raises_inside_its_upload(
    server: ServerProcess, place: Place, client: flight.FlightClient
) -> None:
    dataset = next(names)
    writer, _ = client.do_put(command(dataset=dataset, upload_id="u"), SCHEMA, TIMEOUT)
    with pytest.raises(ZeroDivisionError), writer:
        for batch in batches(0, 500, 100):
            writer.write_batch(batch)
        raise ZeroDivisionError
    eventually(lambda: no_stream_is_open(client), "its stream is closed and its memory free")
    summary = put(client, [rows(0, 500)], SCHEMA, end=500, dataset=dataset, upload_id="u")[-1]
    assert summary["complete"] is True
    assert_every_row_once(stored(place.vectors, dataset), 500)


def test_a_client_that_never_reads_its_acknowledgements(
    server: ServerProcess, place: Place, client: flight.FlightClient
) -> None:
    dataset = next(names)
    writer, reader = client.do_put(command(dataset=dataset, upload_id="u"), SCHEMA, TIMEOUT)
    for batch in batches(0, 20_000, 100):
        writer.write_batch(batch)
    writer.write_metadata(json.dumps({"end": True, "rows": 20_000}).encode())
    writer.done_writing()

    def complete() -> bool:
        body = {"upload_id": "u", "dataset": dataset}
        return action(client, "upload_status", body)["complete"]

    eventually(complete, "the upload is complete")
    while (answer := reader.read()) is not None:
        last = json.loads(answer.to_pybytes())
    writer.close()
    assert last["type"] == "summary"
    assert last["complete"] is True
    assert_every_row_once(stored(place.vectors, dataset), 20_000)


def test_a_client_that_never_reads_its_vectors_blocks_itself_alone(
    server: ServerProcess, client: flight.FlightClient
) -> None:
    sent_bytes = 0
    batch = pa.record_batch({"text": [f"{n} " * 100 for n in range(2000)]})

    def write() -> None:
        nonlocal sent_bytes
        while sent_bytes < 2**31:
            try:
                writer.write_batch(batch)
            except (flight.FlightError, pa.ArrowException):
                return
            sent_bytes += batch.nbytes

    silent = flight.connect(server.address)
    writer, reader = silent.do_exchange(command(dtype="float32", include_text=True))
    writer.begin(batch.schema)
    thread = threading.Thread(target=write)
    thread.start()
    eventually(lambda: is_steady(lambda: sent_bytes), "its writes block")
    ((answer, _),) = exchange(client, [rows(0, 100)], SCHEMA)
    assert answer.num_rows == 100
    assert upload(server.address, next(names), 0, 100)["complete"] is True
    assert sent_bytes < 128 * 2**20

    reader.cancel()
    thread.join(30)
    assert not thread.is_alive()
    with contextlib.suppress(flight.FlightError, pa.ArrowException):
        writer.close()
    silent.close()
    eventually(lambda: no_stream_is_open(client), "its stream is closed and its memory free")


def test_fifty_clients_at_once(
    server: ServerProcess, place: Place, client: flight.FlightClient
) -> None:
    together, *apart = (next(names) for _ in range(1 + NUM_CLIENTS // 2))

    def round_of_uploads(number: int) -> tuple[int, int]:
        """Half of the clients share a dataset; the peak of threads and descriptors."""
        shift = number * CLIENT_ROWS * NUM_CLIENTS
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            jobs = []
            for n, dataset in enumerate(apart):
                first = shift + n * CLIENT_ROWS
                for name in (dataset, together):
                    last = first + CLIENT_ROWS
                    jobs.append(clients.submit(upload, server.address, name, first, last))
            for job in jobs:
                summary = job.result()
                assert summary["complete"] is True
                assert summary["rows_stored"] == CLIENT_ROWS
        eventually(lambda: no_stream_is_open(client), "all streams are closed")
        return server.num_threads(), server.num_descriptors()

    threads, descriptors = round_of_uploads(0)
    round_of_uploads(1)
    eventually(lambda: server.num_threads() <= threads, "no thread is left behind")
    eventually(lambda: server.num_descriptors() <= descriptors, "no descriptor is left behind")

    shifts = (0, CLIENT_ROWS * NUM_CLIENTS)
    per_client = [range(n * CLIENT_ROWS, (n + 1) * CLIENT_ROWS) for n in range(len(apart))]
    for dataset, own in zip(apart[:3], per_client[:3], strict=True):
        assert_rows(
            stored(place.vectors, dataset), [shift + row for shift in shifts for row in own]
        )
    everything = [shift + row for shift in shifts for own in per_client for row in own]
    assert_rows(stored(place.vectors, together), everything)


def assert_rows(table: pa.Table, numbers: list[int]) -> None:
    """Check that just these rows are stored, each with its text."""
    assert table.column("id").to_pylist() == numbers
    assert table.column("text").to_pylist() == [text_of(number) for number in numbers]


@pytest.mark.parametrize(("said", "received"), [(300, 200), (100, 200), (0, 200), (200, 0)])
def test_a_client_that_lies_about_its_rows_is_told_that_they_are_not_complete(
    server: ServerProcess, place: Place, client: flight.FlightClient, said: int, received: int
) -> None:
    dataset = next(names)
    sent = batches(0, received, 50) if received else []
    fields = {"dataset": dataset, "upload_id": "u"}
    summary = put(client, sent, SCHEMA, end=said, **fields)[-1]
    assert summary["complete"] is False
    assert summary["rows_stored"] == received
    # The truth, told later, is taken.
    summary = put(client, batches(0, 200, 50), SCHEMA, end=200, **fields)[-1]
    assert summary["complete"] is True
    assert_every_row_once(stored(place.vectors, dataset), 200)


def test_a_client_whose_offsets_overlap_and_go_backwards_stores_each_row_once(
    server: ServerProcess, place: Place, client: flight.FlightClient
) -> None:
    dataset = next(names)
    writer, reader = client.do_put(command(dataset=dataset, upload_id="u"), SCHEMA, TIMEOUT)
    for first, last in [(100, 200), (150, 300), (50, 120), (0, 60), (0, 300)]:
        metadata = json.dumps({"row_offset": first}).encode()
        writer.write_with_metadata(rows(first, last), metadata)
    writer.write_metadata(json.dumps({"end": True, "rows": 300}).encode())
    writer.done_writing()
    while (answer := reader.read()) is not None:
        message = json.loads(answer.to_pybytes())
        assert message["rows_durable"] <= message["rows_received"] <= 300
    writer.close()
    assert message["complete"] is True
    assert message["rows_stored"] == 300
    assert message["rows_deduplicated"] == 100 + 150 + 70 + 60 + 300 - 300
    assert_every_row_once(stored(place.vectors, dataset), 300)


@pytest.mark.parametrize("offset", [-1, 2**63, "7", 1.5])
def test_an_offset_that_is_none_is_refused(
    server: ServerProcess, client: flight.FlightClient, offset: object
) -> None:
    writer, reader = client.do_put(command(dataset=next(names)), SCHEMA, TIMEOUT)
    writer.write_with_metadata(rows(0, 10), json.dumps({"row_offset": offset}).encode())
    writer.done_writing()
    assert reader.read() is None
    with pytest.raises(flight.FlightInternalError) as caught:
        writer.close()
    assert error_of(caught.value)["code"] == "invalid_command"
    eventually(lambda: no_stream_is_open(client), "its stream is closed and its memory free")


def test_an_idle_client_holds_nobody_up(
    server: ServerProcess, place: Place, client: flight.FlightClient
) -> None:
    dataset = next(names)
    writer, reader = client.do_put(command(dataset=dataset, upload_id="idle"), SCHEMA, TIMEOUT)
    writer.write_batch(rows(0, 10))
    assert json.loads(reader.read().to_pybytes())["rows_durable"] == 10
    # It says nothing more; others use the same dataset, and their uploads end.
    assert upload(server.address, dataset, 100, 200)["complete"] is True
    stats = action(client, "stats")
    assert (stats["fletcher.streams.open"], stats["memory"]["used_bytes"]) == (1, 0)
    writer.write_metadata(json.dumps({"end": True, "rows": 10}).encode())
    writer.done_writing()
    while (answer := reader.read()) is not None:
        last = json.loads(answer.to_pybytes())
    writer.close()
    assert last["complete"] is True
    numbers = [*range(10), *range(100, 200)]
    assert_rows(stored(place.vectors, dataset), numbers)


def test_calls_that_only_begin_are_not_any_number_and_make_no_dataset(
    place: Place, client: flight.FlightClient
) -> None:
    # Their threads had no bound; and a DoPut whose client went without a word took a place and
    # made a dataset.
    def num_begun(client: flight.FlightClient) -> int:
        return int(sum(one["calls"] for one in action(client, "stats")["models"]))

    dataset = next(names)
    short = flight.FlightCallOptions(timeout=1)
    silent = client.do_put(command(dataset=dataset), SCHEMA, short)
    eventually(lambda: num_begun(client) == 1, "a DoPut has begun")
    eventually(lambda: num_begun(client) == 0, "it has ended")
    del silent
    with pytest.raises(flight.FlightInternalError) as missing:
        client.get_flight_info(flight.FlightDescriptor.for_path(dataset))
    assert error_of(missing.value)["code"] == "unknown_dataset"

    with (
        serving(place.argv("--max-streams", "1")) as server,
        flight.connect(server.address) as crowd,
    ):
        calls = [crowd.do_exchange(command(), TIMEOUT) for _ in range(8)]
        for writer, _ in calls:
            writer.begin(SCHEMA)
        eventually(lambda: num_begun(crowd) == 8, "8 calls have begun")
        with pytest.raises(flight.FlightUnavailableError, match="have begun") as refused:
            exchange(crowd, [rows(0, 1)], SCHEMA)
        assert error_of(refused.value)["retry_after_ms"] > 0
        for _, reader in calls:
            reader.cancel()
        eventually(lambda: num_begun(crowd) == 0, "they have ended")
        assert len(exchange(crowd, [rows(0, 1)], SCHEMA)) == 1


def test_two_hundred_clients_are_served_alike_and_leave_nothing_behind(
    server: ServerProcess, place: Place, client: flight.FlightClient
) -> None:
    num_clients, num_rows, num_batch = 200, 60, 20
    dataset = next(names)
    go = threading.Event()

    def one(first: int) -> float:
        """Wait until all are admitted; returns the seconds from then to the summary."""
        with flight.connect(server.address) as own:
            writer, reader = own.do_put(command(dataset=dataset), SCHEMA, TIMEOUT)
            writer.write_batch(rows(0, 0))
            assert go.wait(60)
            started_s = time.monotonic()
            for batch in batches(first, first + num_rows, num_batch):
                writer.write_batch(batch)
            writer.write_metadata(json.dumps({"end": True, "rows": num_rows}).encode())
            writer.done_writing()
            while (answer := reader.read()) is not None:
                last = json.loads(answer.to_pybytes())
            writer.close()
            assert last["complete"] is True
            return time.monotonic() - started_s

    def a_round(number: int) -> tuple[int, int, int]:
        """The server's threads, descriptors and bytes after all clients have left."""
        shift = number * num_clients * num_rows
        with ThreadPoolExecutor(num_clients) as clients:
            took = clients.map(one, range(shift, shift + num_clients * num_rows, num_rows))
            eventually(lambda: num_streams(client) == num_clients, "all are let in")
            go.set()
            took_s = list(took)
        go.clear()
        assert max(took_s) <= 2 * statistics.median(took_s), sorted(took_s)
        eventually(lambda: no_stream_is_open(client), "all streams are closed")
        return server.num_threads(), server.num_descriptors(), server.resident_bytes()

    threads, descriptors, num_bytes = a_round(0)
    a_round(1)
    # LanceDB's pool keeps a few idle threads for ten seconds; a leak would be one a client.
    eventually(lambda: server.num_threads() < threads + 40, "no thread is left behind")
    eventually(lambda: server.num_descriptors() <= descriptors, "no descriptor is left behind")
    assert server.resident_bytes() < 1.1 * num_bytes
    assert_rows(stored(place.vectors, dataset), list(range(2 * num_clients * num_rows)))
