"""Numbers that users see of a Longbow's datasets: true ones, or none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.cli import doctor, main
from fletcher.stores import longbow_trouble
from fletcher.stores.address import open_store
from fletcher.stores.staging import staged_name
from tests.doubles import store_rows as rows
from tests.doubles.longbow import LongbowDouble
from tests.integration.conftest import StartServer


class Untelling(LongbowDouble):
    """A server that ignores the criteria of ListFlights, and therefore tells no number of rows."""

    def num_rows(self, dataset: str) -> int:
        return 1 << 63


@pytest.fixture
def double(double: LongbowDouble) -> LongbowDouble:
    """A Longbow with rows."""
    fill(double)
    return double


@pytest.fixture
def untelling() -> Iterator[LongbowDouble]:
    with Untelling() as served:
        fill(served)
        yield served


def fill(double: LongbowDouble) -> None:
    """15 rows of `d` in two batches, and 4 staged rows."""
    store = open_store(double.address, timeout_s=20)
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 10)])
    writer.append([rows.batch(10, 5)])
    store.open_writer(staged_name("d", "u"), rows.schema(), "append").append([rows.batch(0, 4)])
    store.close()


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Output of a command."""
    main(list(argv))
    return capsys.readouterr().out


def store_finding(text: str) -> str:
    (found,) = [one["value"] for one in json.loads(text)["findings"] if one["part"] == "stores"]
    return found


def test_doctor_shows_true_rows_or_none(
    double: LongbowDouble,
    untelling: LongbowDouble,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for one, text in ((double, "15 rows"), (untelling, "unknown rows")):
        where = ["--store", one.address, "--home", str(tmp_path)]
        found = store_finding(shown(capsys, "doctor", "--json", *where))
        assert found.endswith(f": 1 datasets, {text}")


def test_overwrites_are_listed_with_their_rows(
    double: LongbowDouble, untelling: LongbowDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    for one, number, text in ((double, 4, "4 rows"), (untelling, None, "unknown rows")):
        where = ["--store", one.address]
        (found,) = json.loads(shown(capsys, "overwrite", "list", "--json", *where))["overwrites"]
        assert found["rows"] == number
        assert f"  {text}  upload u  " in shown(capsys, "overwrite", "list", *where)


def test_a_server_answers_true_rows_or_none(
    double: LongbowDouble, untelling: LongbowDouble, start_server: StartServer
) -> None:
    for one, number in ((double, 15), (untelling, -1)):
        server = start_server(store=(one.address,))
        with flight.connect(server.address) as client:
            path = flight.FlightDescriptor.for_path("d")
            assert client.get_flight_info(path).total_records == number
            assert [info.total_records for info in client.list_flights()] == [number]
            assert client.get_schema(path).schema.field("id").type == pa.utf8()


def test_doctor_and_stats_show_rows_that_the_index_lost(
    double: LongbowDouble,
    start_server: StartServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "INDEX_GROWS_S", 0.01)
    monkeypatch.setattr(longbow_trouble, "AUTO_SHARDING_ROWS", 14)
    where = ["--store", double.address, "--home", str(tmp_path)]
    server = start_server(store=(double.address,))
    assert "default/d: 15 rows, 15 indexed (100%)" in shown(
        capsys, "stats", "--server", server.address
    )
    double.num_unindexed = 12
    findings = json.loads(shown(capsys, "doctor", "--json", *where))["findings"]
    assert [one for one in findings if one["part"] == "stores"][1:] == [
        {
            "part": "stores",
            "name": "default/d",
            "state": "note",
            "value": "15 rows, 3 indexed (20%)",
            "fix": longbow_trouble.LOST,
        }
    ]
