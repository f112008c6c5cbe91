"""Ingests whose order matters, and values that a second ingest must take, into each store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fletcher
from fletcher.core.command import EmbedCommand
from fletcher.runtime import Runtime
from fletcher.stores.address import open_store
from tests.integration.conftest import StartServer

FILES = {
    "A": [("1", "old one"), ("2", "old two")],
    "B": [("2", "new two")],
    "C": [("9", "nine")],
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses by name."""
    folder = tmp_path_factory.mktemp("stores")
    return {kind: f"{kind}:{folder / kind}" for kind in ("lance", "parquet")}


@pytest.fixture(scope="module")
def server(start_server: StartServer, stores: dict[str, str]) -> Runtime:
    named = tuple(f"{name}={address}" for name, address in stores.items())
    return start_server(store=named, max_journal=64 << 20)


@pytest.fixture(scope="module")
def client(server: Runtime) -> Iterator[fletcher.Client]:
    with fletcher.connect(server.address) as client:
        yield client


def _rows(address: str, dataset: str, *columns: str) -> list[tuple[Any, ...]]:
    store = open_store(address)
    try:
        table = store.scan(dataset, columns=["id", *columns]).read_all()
    finally:
        store.close()
    return sorted(zip(*(table[name].to_pylist() for name in ("id", *columns)), strict=True))


@pytest.mark.parametrize(
    ("store", "steps", "expected"),
    [
        ("lance", "upsert A, upsert B, upsert A", "A"),
        ("lance", "upsert A, upsert B, upsert A, upsert B", "1: old one, 2: new two"),
        ("lance", "delta A, delta B, delta A", "A"),
        ("lance", "append A, upsert B, delta A", "A"),
        ("lance", "overwrite A, append C, overwrite A", "A"),
        ("lance", "overwrite A, overwrite B, overwrite A", "A"),
        ("lance", "append A, overwrite B, append A, append A", "B and A"),
        ("lance", "overwrite A, upsert B, upsert C, overwrite B", "B"),
        ("parquet", "overwrite A, append C, overwrite A", "A"),
        ("parquet", "overwrite A, overwrite B, overwrite A", "A"),
        ("parquet", "append A, overwrite B, append A, append A", "B and A"),
    ],
)
def test_the_last_command_takes_effect_whatever_was_seen_before(
    client: fletcher.Client,
    stores: dict[str, str],
    tmp_path: Path,
    store: str,
    steps: str,
    expected: str,
) -> None:
    dataset = "-".join(part[0] + part[-1] for part in steps.split(", "))
    for step in steps.split(", "):
        mode, name = step.split()
        file = tmp_path / f"{name}.csv"
        file.write_text("id,text\n" + "".join(f"{id_},{text}\n" for id_, text in FILES[name]))
        options = EmbedCommand(
            dataset=dataset,
            store=store,
            mode=mode,  # type: ignore[arg-type]
            durability="store",
        )
        summary = client.ingest(file, options)
        assert summary.complete
        assert not summary.errors
    if ":" in expected:
        wanted = [tuple(one.split(": ")) for one in expected.split(", ")]
    else:
        wanted = [row for name in expected.split(" and ") for row in FILES[name]]
    assert _rows(stores[store], dataset, "text") == sorted(wanted)


@pytest.mark.parametrize("store", ["lance", "parquet"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("times", ["2021-01-01T00:00:00Z", "2022-01-01T00:00:00Z"]),
        ("fractions", ["2021-01-01T00:00:00.123456Z", "2022-01-01T00:00:00.500000Z"]),
        ("local_times", ["2021-01-01 00:00:01", "2022-01-01 00:00:02"]),
        ("dates", ["2021-01-01", "2022-01-01"]),
        ("clock", ["10:00:01", "23:59:59"]),
        ("decimals", ["1.10", "2.20"]),
        ("numbers", ["1", "22"]),
        ("truths", ["true", "false"]),
    ],
)
def test_a_second_file_of_the_same_columns_is_taken(
    client: fletcher.Client,
    stores: dict[str, str],
    tmp_path: Path,
    store: str,
    name: str,
    values: list[str],
) -> None:
    # Times of CSV are in seconds, which Parquet does not have. The second file was refused.
    for number, value in enumerate(values):
        file = tmp_path / f"{number}.csv"
        file.write_text(f"id,when,text\n{number},{value},alpha\n")
        source = fletcher.open_source(file, columns=("when",))
        options = EmbedCommand(dataset=name, store=store, columns=("when",), durability="store")
        assert client.ingest(source, options).complete
    assert [str(row[0]) for row in _rows(stores[store], name, "when")] == ["0", "1"]
    found = {row[1] for row in _rows(stores[store], name, "when")}
    assert len(found) == 2
    assert None not in found
