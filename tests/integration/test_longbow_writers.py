"""Two writers into one dataset of a Longbow, which would let both write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fletcher.cli import main
from fletcher.errors import StoreUnavailableError
from fletcher.net.address import FlightAddress
from fletcher.stores.address import open_store
from fletcher.stores.base import Store
from fletcher.stores.flight.exclusive import lock_dataset
from tests.doubles import store_rows as rows
from tests.doubles.longbow import LongbowDouble


@pytest.fixture
def stores(double: LongbowDouble) -> Iterator[list[Store]]:
    """The same store by several addresses."""
    hosts = ("127.0.0.1", "localhost", "127.0.0.1")
    opened = [open_store(double.address.replace("127.0.0.1", host), timeout_s=20) for host in hosts]
    yield opened
    for store in opened:
        store.close()


def test_a_dataset_has_one_writer(stores: list[Store]) -> None:
    writer = stores[0].open_writer("d", rows.schema(), "append")
    for store in stores:
        with pytest.raises(StoreUnavailableError, match="is being written") as caught:
            store.open_writer("d", rows.schema(), "append")
        assert caught.value.field == "dataset"  # the other datasets are available
        store.open_writer("e", rows.schema(), "append").close()
    writer.append([rows.batch(0, 10)])
    writer.close()
    stores[1].open_writer("d", rows.schema(), "append").close()


def test_a_store_that_is_closed_has_no_writer(stores: list[Store]) -> None:
    writer = stores[0].open_writer("d", rows.schema(), "append")
    stores[0].close()
    writer.close()
    stores[1].open_writer("d", rows.schema(), "append").close()


def test_other_ports_and_hosts_are_other_stores() -> None:
    one = FlightAddress("127.0.0.1", 3000)
    with (
        lock_dataset(one, "d"),
        lock_dataset(one.with_port(3001), "d"),
        lock_dataset(FlightAddress("192.0.2.1", 3000), "d"),
        lock_dataset(FlightAddress("no-such-host.invalid", 3000), "d"),
    ):
        for host in ("localhost", "::1", "127.0.0.2"):
            with pytest.raises(StoreUnavailableError):
                lock_dataset(FlightAddress(host, 3000), "d")


def test_a_command_does_not_write_to_a_dataset_that_has_a_writer(
    double: LongbowDouble,
    stores: list[Store],
    tiny_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "models").symlink_to(tiny_home / "models")  # a home of its own shares no lock
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": "c", "text": "one text"}\n')
    argv = ["ingest", str(file), "--store", double.address, "--home", str(tmp_path)]
    argv += ["--model", "tiny", "--backend", "null", "--dataset"]
    monkeypatch.setenv("FLETCHER_STORE_RETRY", "0")
    writer = stores[0].open_writer("d", rows.schema(), "append")
    assert main([*argv, "d"]) == 1
    assert "dataset `d` is being written by another process" in capsys.readouterr().err
    assert "d" not in double.tables
    writer.close()
