"""Journals on a full or failing disk, and before a store that stalls or is slow."""

from __future__ import annotations

import json
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.delivery.journal.segment import Segment, read_segment
from tests.doubles.longbow import LongbowDouble
from tests.integration.flight_calls import TIMEOUT, action, command, error_of, put
from tests.integration.numbered import SCHEMA, batches, text_of
from tests.integration.processes import Place, ServerProcess, eventually, is_steady, serving

MIB = 2**20
UPLOAD = {"dataset": "d", "upload_id": "u"}


@pytest.fixture
def place(tiny_home: Path, tmp_path: Path) -> Place:
    """A separate home, so that no other test shares its journal."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to((tiny_home / "models").resolve())
    return Place(home, tmp_path / "vectors")


class Gated(LongbowDouble):
    """Takes rows only while `open` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def __exit__(self, *_: object) -> None:
        self.open.set()
        super().__exit__()

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        self.open.wait(60)
        super().store(dataset, batch)

    @property
    def options(self) -> tuple[str, ...]:
        return ("--store", f"{self.address}&profile=longbow", "--store-timeout", "60s")


class Sender:
    """A client that writes as fast as the server accepts."""

    def __init__(self, address: str, num_rows: int) -> None:
        self.summary: dict[str, Any] = {}
        self.failure: flight.FlightError | None = None
        self.sent = 0
        self._thread = threading.Thread(target=self._run, args=(address, num_rows))
        self._thread.start()

    def _run(self, address: str, num_rows: int) -> None:
        def counted() -> Iterator[pa.RecordBatch]:
            for batch in batches(0, num_rows, 200):
                yield batch
                self.sent += batch.num_rows

        try:
            with flight.connect(address) as client:
                self.summary = put(client, counted(), SCHEMA, end=num_rows, **UPLOAD)[-1]
        except flight.FlightError as error:
            self.failure = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(60)
        assert self.done


@contextmanager
def file_size_limit(server: ServerProcess, num_bytes: int) -> Iterator[None]:
    """Limit the size of the server's files, which to a writer is a full disk."""
    process = psutil.Process(server.pid)
    before = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, before)


def durable(client: flight.FlightClient) -> int:
    return int(action(client, "upload_status", UPLOAD)["rows_durable"])


def segments(place: Place) -> list[Path]:
    return sorted(place.home.glob("journal/*/d/*.arrow"))


def test_a_disk_that_is_full_for_a_while_only_holds_clients_back(place: Place) -> None:
    with Gated() as store:
        store.open.set()
        argv = place.argv(*store.options, "--max-journal", "64MiB", "--store-retry", "60s")
        with serving(argv) as server, flight.connect(server.address) as client:
            with file_size_limit(server, 600):
                sender = Sender(server.address, 2000)
                eventually(lambda: sender.sent > 0, "it has begun")
                eventually(lambda: len(segments(place)) > 0, "a group is being written")
                assert durable(client) == 0
                assert not sender.done
            sender.join()
            assert sender.failure is None
            assert sender.summary["complete"] is True
            assert sender.summary["rows_durable"] == 2000
            eventually(lambda: stored_rows(store) == 2000, "all rows are in the store")
            assert server.end() == 0
        assert sorted(read_rows(store)) == list(range(2000))
        assert "Traceback" not in "".join(server.errors)


def test_a_disk_that_stays_full_is_told_and_the_upload_can_be_resumed(place: Place) -> None:
    with Gated() as store:
        store.open.set()
        argv = place.argv(*store.options, "--max-journal", "64MiB", "--store-retry", "1s")
        with serving(argv) as server, flight.connect(server.address) as client:
            with file_size_limit(server, 600):
                with pytest.raises(flight.FlightUnavailableError) as caught:
                    put(client, batches(0, 500, 50), SCHEMA, end=500, **UPLOAD)
                error = error_of(caught.value)
                assert error["code"] == "journal_full"
                assert error["retry_after_ms"] > 0
            assert durable(client) == 0
            summary = put(client, batches(0, 500, 50), SCHEMA, end=500, **UPLOAD)[-1]
            assert summary["complete"] is True
            eventually(lambda: stored_rows(store) == 500, "all rows are in the store")
            assert server.end() == 0
        assert sorted(read_rows(store)) == list(range(500))
        assert "Traceback" not in "".join(server.errors)


def test_a_store_that_stalls_costs_nothing_while_the_journal_has_room(place: Place) -> None:
    with Gated() as store:
        options = (*store.options, "--max-journal", "64MiB")
        with serving(place.argv(*options)) as server, flight.connect(server.address) as client:
            sender = Sender(server.address, 5000)
            sender.join()
            assert sender.failure is None
            assert sender.summary["complete"] is True
            assert sender.summary["rows_durable"] == 5000
            assert sender.summary["rows_stored"] == 0
            store.open.set()
            eventually(lambda: stored_rows(store) == 5000, "all rows are in the store")
            assert durable(client) == 5000
            assert server.end() == 0
        assert sorted(store.table("d").column("id").to_pylist()) == list(range(5000))


def test_a_full_journal_blocks_its_clients_and_fills_no_memory(place: Place) -> None:
    with Gated() as store:
        options = (
            *(*store.options, "--store-retry", "60s", "--max-memory", "256MiB"),
            *("--max-journal", "1MiB", "--group-rows", "200"),
        )
        with serving(place.argv(*options)) as server, flight.connect(server.address) as client:
            sender = Sender(server.address, 400_000)
            eventually(lambda: journal_bytes(place) >= MIB, "it is full", 60)
            eventually(lambda: is_steady(lambda: sender.sent), "its writes block")
            held = durable(client)
            assert 0 < held < 400_000
            assert not sender.done
            assert server.peak_bytes() < 512 * MIB
            store.open.set()
            eventually(lambda: durable(client) > held, "it goes on")
            server.process.kill()
            sender.join()
            assert isinstance(sender.failure, flight.FlightUnavailableError)


def journal_bytes(place: Place) -> int:
    return sum(path.stat().st_size for path in segments(place))


def stored_rows(store: LongbowDouble) -> int:
    return sum(batch.num_rows for batch in store.tables.get("d", []))


def test_a_journal_that_stays_full_is_told_and_the_upload_can_be_resumed(place: Place) -> None:
    with Gated() as store:
        options = (
            *(*store.options, "--store-retry", "1s", "--max-journal", "256KiB"),
            *("--group-rows", "200", "--journal-retention", "0"),
        )
        with serving(place.argv(*options)) as server, flight.connect(server.address) as client:
            with pytest.raises(flight.FlightUnavailableError) as caught:
                put(client, batches(0, 20_000, 200), SCHEMA, end=20_000, **UPLOAD)
            assert error_of(caught.value)["code"] == "journal_full"
            assert error_of(caught.value)["retry_after_ms"] > 0
            acknowledged = durable(client)
            assert 0 < acknowledged < 20_000
            store.open.set()
            eventually(lambda: stored_rows(store) >= acknowledged, "what is journaled is stored")
            # On a slow machine it may be full again; that is retryable.
            eventually(lambda: is_uploaded(server, 20_000), "the upload is complete", 60)
            eventually(lambda: stored_rows(store) == 20_000, "all rows are in the store")
            assert server.end() == 0
        assert sorted(store.table("d").column("id").to_pylist()) == list(range(20_000))


def test_a_damaged_journal_loses_what_was_hit_says_so_and_starts(place: Place) -> None:
    chance = random.Random(1)
    total = 4000
    options = ("--max-journal", "64MiB", "--group-rows", "200")
    with Gated() as store:
        argv = place.argv(*store.options, *options)
        with serving(argv) as server, flight.connect(server.address) as client:
            writer, reader = client.do_put(command(**UPLOAD), SCHEMA, TIMEOUT)
            for batch in batches(0, total, 200):
                writer.write_batch(batch)
            while json.loads(reader.read().to_pybytes())["rows_durable"] < total:
                pass
            server.process.kill()
            server.process.wait(10)
        (path,) = segments(place)
        found = read_segment(path)
        assert isinstance(found, Segment)
        hit = chance.sample(found.groups[1:], 2)  # the schema is in the first
        data = bytearray(path.read_bytes())
        for group in hit:
            place_in_it = group.offset + chance.randrange(group.num_bytes)
            data[place_in_it : place_in_it + 16] = chance.randbytes(16)
        path.write_bytes(bytes(data))
        store.open.set()

        with serving(argv) as server, flight.connect(server.address) as client:
            left = total - sum(group.info.num_rows for group in hit)
            eventually(lambda: stored_rows(store) >= left, "the good groups are in the store")
            log = "".join(server.errors)
            kept = read_rows(store)
            for group in hit:
                if not set(range(group.info.first, group.info.last + 1)) <= set(kept):
                    assert str(group.info) in log
            assert action(client, "upload_status", UPLOAD)["complete"] is False
            eventually(
                lambda: [one.suffix for one in path.parent.iterdir()] == [".damaged"],
                "the file is set aside",
            )
            # Whoever has the rows sends them again; those that are there are not stored twice.
            summary = put(client, batches(0, total, 200), SCHEMA, end=total, **UPLOAD)[-1]
            assert summary["complete"] is True
            eventually(lambda: stored_rows(store) >= total, "the rest is in the store")
            assert server.end() == 0
        table = store.table("d").sort_by("id")
        assert table.column("id").to_pylist() == list(range(total))
        assert table.column("text").to_pylist() == [text_of(row) for row in range(total)]


def is_uploaded(server: ServerProcess, num_rows: int) -> bool:
    """Send the whole upload; False if the journal is full meanwhile."""
    sender = Sender(server.address, num_rows)
    sender.join()
    assert sender.failure is None or error_of(sender.failure)["code"] == "journal_full"
    return bool(sender.summary.get("complete"))


def read_rows(store: LongbowDouble) -> list[int]:
    return store.table("d").column("id").to_pylist() if store.tables.get("d") else []
