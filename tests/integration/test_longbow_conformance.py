"""`scripts/longbow_conformance` against the stand-in for Longbow, and against `fletcher store`."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pyarrow import flight

from fletcher.storeserver.server import StoreServer
from tests.doubles.longbow import LongbowDouble

PROGRAM = Path(__file__).parents[2] / "scripts" / "longbow_conformance"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("longbow_conformance", str(PROGRAM))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(loader.name, loader)  # type: ignore[arg-type]
    )
    sys.modules[loader.name] = module  # its annotations are looked up there
    loader.exec_module(module)
    return module


def ports(double: LongbowDouble) -> tuple[str, int, int]:
    return "127.0.0.1", double._data.port, double._meta.port


def test_the_stand_in_answers_as_longbow_does(program):
    with LongbowDouble() as double:
        found = program.differences(
            *ports(double), restart=double.restart, with_fatal=True, settle_s=0
        )
    assert found == []


def test_fletcher_store_answers_as_documented(program, tmp_path):
    def start(port=0, meta_port=0):
        return StoreServer(tmp_path, host="127.0.0.1", port=port, meta_port=meta_port)

    server = start()
    ports = server.port, server.meta_port

    def restart():
        nonlocal server
        assert server.close(30)
        server = start(*ports)
        return True

    found = program.differences(
        "127.0.0.1", *ports, "fletcher", restart=restart, with_fatal=True, settle_s=0
    )
    assert server.close(30)
    assert found == []


def test_a_server_that_answers_otherwise_is_told(program):
    class Filtering(LongbowDouble):
        def read(self, ticket):
            self.parser._filters = []  # no filter is inherited
            return super().read(ticket)

    with Filtering() as double:
        found = program.differences(*ports(double), settle_s=0)
        assert [line.partition(":")[0] for line in found] == ["bare name after a filter"]
        assert double.tables == {}, "its datasets are deleted"


def test_the_program_leaves_other_datasets_alone(program):
    rows = program.batch([1, 2])
    with LongbowDouble() as double:
        double.store("mine", rows)
        double.namespaces.append("own")
        program.differences(*ports(double), settle_s=0)
        assert list(double.tables) == ["mine"]
        assert double.tables["mine"] == [rows]
        assert double.namespaces == ["default", "own"]


def test_a_kill_breaks_open_streams_and_loses_the_last_rows(program):
    with LongbowDouble() as double:
        client = flight.connect(f"grpc://127.0.0.1:{double._data.port}")
        path = flight.FlightDescriptor.for_path("ingest", "d")
        writer, reader = client.do_exchange(path)
        rows = program.batch([1, 2])
        writer.begin(rows.schema)
        for _ in range(3):
            writer.write_batch(rows)
            reader.read_chunk()
        double.kill(lost=1)
        with pytest.raises((flight.FlightError, OSError)):
            reader.read_chunk()
        assert double.restart()
        ticket = flight.Ticket(b'{"name":"d"}')
        assert client.do_get(ticket).read_all().num_rows == 4
        assert double.num_rows("d") == 4
        with contextlib.suppress(flight.FlightError, OSError):
            writer.close()
