"""`dedupe` and `mode: delta` into every kind of store, and when the server is killed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

import fletcher
from fletcher.config.server import ServeConfig
from fletcher.core.command import EmbedCommand
from fletcher.errors import UnavailableError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.runtime import Runtime
from fletcher.stores.address import open_store
from fletcher.storeserver.server import StoreServer
from tests.doubles.longbow import LongbowDouble
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import action, error_of, put
from tests.integration.numbered import SCHEMA, assert_every_row_once, rows, stored, text_of
from tests.integration.processes import Place, eventually, serving

KINDS = ("parquet", "fletcher", "longbow", "longbow-put")
names = (f"d{number}" for number in itertools.count())


@dataclass(frozen=True)
class Served:
    """A store by its name in the server's configuration, and where it is."""

    name: str
    address: str

    def rows(self, dataset: str) -> pa.Table:
        """What it has, sorted by id."""
        store = open_store(self.address)
        try:
            if store.dataset(dataset) is None:  # a Longbow makes it with the first rows
                return SCHEMA.empty_table()
            return store.scan(dataset, columns=["id", "text"]).read_all().sort_by("id")
        finally:
            store.close()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """One of each kind."""
    folder = tmp_path_factory.mktemp("stores")
    with ExitStack() as stack:
        served = StoreServer(folder / "served", host="127.0.0.1", port=0, meta_port=0)
        stack.callback(served.close, 10)
        addresses = [
            f"parquet:{folder / 'files'}",
            f"{served.address}?meta={served.meta_port}",
            stack.enter_context(LongbowDouble()).address,
            stack.enter_context(LongbowDouble(exchange=False)).address,
        ]
        yield {name: Served(name, one) for name, one in zip(KINDS, addresses, strict=True)}


def config(stores: dict[str, Served], home: Path, **options: Any) -> dict[str, Any]:
    given = tuple(f"{one.name}={one.address}" for one in stores.values())
    return {"store": given, "home": home, "max_journal": 64 << 20, **options}


@pytest.fixture(scope="module")
def home(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes homes, for each has one server."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("home")
        (folder / "models").symlink_to(tiny_bundle.folder.parent)
        return folder

    return make


@pytest.fixture(scope="module")
def client(
    stores: dict[str, Served], home: Callable[[], Path], start_server: StartServer
) -> Iterator[flight.FlightClient]:
    with flight.connect(start_server(**config(stores, home())).address) as connection:
        yield connection


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest, stores: dict[str, Served]) -> Served:
    return stores[request.param]


@pytest.mark.parametrize("durability", ["journal", "store"])
def test_an_id_is_stored_once(client: flight.FlightClient, served: Served, durability: str) -> None:
    fields = {"dataset": next(names), "store": served.name, "durability": durability}
    batches = [rows(0, 300), rows(0, 300), rows(200, 500)]
    summary = put(client, batches, SCHEMA, end=900, dedupe="id", **fields)[-1]
    assert summary["complete"] is True
    assert (summary["rows_durable"], summary["rows_failed"]) == (900, 0)
    again = put(client, [rows(0, 600)], SCHEMA, end=600, dedupe="id", **fields)[-1]
    assert again["complete"] is True
    assert (summary["rows_deduplicated"], again["rows_deduplicated"]) == (400, 500)
    if durability == "store":
        assert (summary["rows_stored"], again["rows_stored"]) == (500, 100)
    else:
        eventually(lambda: served.rows(fields["dataset"]).num_rows == 600, "all is stored")
    table = served.rows(fields["dataset"])
    assert table.column("id").to_pylist() == list(range(600))
    assert table.column("text").to_pylist() == [text_of(row) for row in range(600)]


def test_a_text_is_stored_once(client: flight.FlightClient, served: Served) -> None:
    fields = {"dataset": next(names), "store": served.name, "dedupe": "text", "durability": "store"}
    put(client, [rows(0, 100)], SCHEMA, end=100, **fields)
    others = pa.record_batch({"id": [900, 901, 902], "text": ["new", "new", text_of(7)]}, SCHEMA)
    summary = put(client, [rows(50, 150), others], SCHEMA, end=103, **fields)[-1]
    assert (summary["rows_stored"], summary["rows_deduplicated"]) == (51, 52)
    assert summary["complete"] is True
    assert served.rows(fields["dataset"]).column("id").to_pylist() == [*range(150), 900]


def test_duplicates_behind_rows_that_are_sent_again(
    client: flight.FlightClient, served: Served
) -> None:
    """Of one piece, whose places are counted from its first new row on."""
    fields = {"dataset": next(names), "upload_id": "u", "store": served.name, "dedupe": "id"}
    put(client, [rows(0, 50)], SCHEMA, durability="store", **fields)
    ids = [*range(50), *range(30, 80)]
    batch = pa.record_batch({"id": ids, "text": [text_of(one) for one in ids]}, SCHEMA)
    summary = put(client, [batch], SCHEMA, end=100, durability="store", **fields)[-1]
    assert (summary["complete"], summary["rows_deduplicated"]) == (True, 50 + 20)
    assert served.rows(fields["dataset"]).column("id").to_pylist() == list(range(80))


def test_delta_replaces_what_changed_or_is_refused_in_its_own_name(
    client: flight.FlightClient, served: Served
) -> None:
    fields = {"dataset": next(names), "store": served.name, "mode": "delta", "durability": "store"}
    if served.name != "fletcher":
        with pytest.raises(flight.FlightInternalError, match="delta") as caught:
            put(client, [rows(0, 10)], SCHEMA, end=10, **fields)
        told = error_of(caught.value)
        allowed = ["append"] if served.name.startswith("longbow") else ["append", "overwrite"]
        assert (told["field"], told["allowed"]) == ("mode", allowed)
        return
    put(client, [rows(0, 100)], SCHEMA, end=100, **fields)
    changed = pa.record_batch({"id": [5, 7, 2000], "text": ["edited", text_of(7), "new"]}, SCHEMA)
    summary = put(client, [rows(0, 5), changed], SCHEMA, end=8, **fields)[-1]
    assert (summary["rows_stored"], summary["rows_deduplicated"]) == (2, 6)
    assert summary["complete"] is True
    table = served.rows(fields["dataset"])
    assert table.column("id").to_pylist() == [*range(100), 2000]
    assert table.column("text")[5].as_py() == "edited"


def test_delta_into_a_store_server_takes_vectors_from_there(
    client: flight.FlightClient, stores: dict[str, Served]
) -> None:
    served, schema = stores["fletcher"], SCHEMA.append(pa.field("url", pa.utf8()))
    fields = {"dataset": next(names), "store": served.name, "mode": "delta", "columns": ["url"]}
    for url in ("u", "v"):
        batch = rows(0, 50).append_column("url", pa.array([url] * 50))
        summary = put(client, [batch], schema, end=50, durability="store", **fields)[-1]
        assert summary["rows_stored"] == 50
        counted = action(client, "stats")["fletcher.rows.reused"]
        assert counted == (50 if url == "v" else 0)
    store = open_store(served.address)
    table = store.scan(fields["dataset"]).read_all()
    store.close()
    assert sorted(table["id"].to_pylist()) == list(range(50))
    assert set(table["url"].to_pylist()) == {"v"}
    assert table["vector"].null_count == 0


def test_what_was_acknowledged_is_durable_after_a_restart(
    stores: dict[str, Served], home: Callable[[], Path], tiny_bundle: ModelBundle
) -> None:
    """Groups that are in the store in part, and groups of which it has nothing."""
    where, dataset = home(), next(names)
    options = config(stores, where, port=0, model=tiny_bundle.name, backend="null")
    upload = {"dataset": dataset, "upload_id": "u"}
    batches = [rows(0, 300), rows(0, 300), rows(200, 500)]

    def of(served: Served) -> dict[str, Any]:
        return {**upload, "store": served.name}

    with (
        Runtime(ServeConfig.from_options(**options)) as server,
        flight.connect(server.address) as client,
    ):
        for served in stores.values():
            assert (
                put(client, batches, SCHEMA, dedupe="id", **of(served))[-1]["rows_durable"] == 900
            )
    with (
        Runtime(ServeConfig.from_options(**options)) as server,
        flight.connect(server.address) as client,
    ):
        for served in stores.values():
            assert action(client, "upload_status", of(served))["ranges"] == [[0, 899]]
            summary = put(client, batches, SCHEMA, end=900, dedupe="id", **of(served))[-1]
            assert summary["complete"] is True
            assert summary["rows_durable"] == 900
            assert served.rows(dataset).column("id").to_pylist() == list(range(500))


@pytest.mark.parametrize("in_journal", [True, False])
def test_kill_9_amid_an_upload_leaves_each_id_once(
    home: Callable[[], Path], tmp_path: Path, in_journal: bool
) -> None:
    """Every other batch holds only ids that came before: a group of which the store gets nothing.

    When the server is killed, all groups are in the journal, or the first ones only in the store.
    """
    place = Place(home(), tmp_path / "vectors")
    half = [rows(50 * (number // 2), 50 * (number // 2) + 100) for number in range(40)]
    whole = [*half, *(rows(first, first + 100) for first in range(500, 1500, 50))]
    ids = [one for batch in whole for one in batch.column("id").to_pylist()]
    total = len(ids)
    delay = "60s" if in_journal else "20ms"
    argv = place.argv("--max-journal", "64MiB", "--group-delay-ms", delay)
    wanted = EmbedCommand(dataset="d", upload_id="u", dedupe="id")
    body = {"upload_id": "u", "dataset": "d"}

    with serving(argv) as server, flight.connect(server.address) as plain:

        def durable(num_rows: int) -> bool:
            return bool(action(plain, "upload_status", body)["rows_durable"] >= num_rows)

        def sent() -> Iterator[pa.RecordBatch]:
            yield from half[:10]
            eventually(lambda: durable(1000), "rows are durable")
            if not in_journal:
                journal = place.home / "journal"
                eventually(lambda: not any(journal.glob("*/d/*.arrow")), "the journal is empty")
            yield from half[10:]
            eventually(lambda: durable(2000), "more are")
            server.process.kill()
            server.process.wait(10)

        once = fletcher.TransferOptions(max_retries=0)
        killed = pytest.raises(UnavailableError)
        with fletcher.connect(server.address, transfer=once) as client, killed:
            client.put(sent(), wanted)

    with serving(argv) as server:
        with flight.connect(server.address) as plain:
            ((first, last),) = action(plain, "upload_status", body)["ranges"]
        assert first == 0
        assert 2000 <= last + 1 <= 4000
        dropped = total - last - 1 - len(set(ids[last + 1 :]) - set(ids[: last + 1]))
        with fletcher.connect(server.address) as client:
            summary = client.put(whole, wanted, resume=True)
            assert (summary.complete, summary.rows_skipped) == (True, last + 1)
            assert (summary.rows_received, summary.rows_durable) == (total, total)
            assert (summary.rows_failed, summary.errors) == (0, ())
            assert summary.rows_deduplicated == dropped
            assert summary.rows_stored <= total - dropped
            assert client.put(whole, wanted, resume=True).rows_skipped == total
        assert server.end() == 0
    assert_every_row_once(stored(place.vectors, "d"), len(set(ids)))
