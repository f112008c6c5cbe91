"""No answer of a handler ends the server's process, whatever a store said."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.core.command import MAX_ANSWER_BYTES
from fletcher.net.flight_answers import (
    action_results,
    flight_info,
    flight_list,
    generator_stream,
    schema_result,
    table_stream,
)
from tests.doubles.nonsense_servers import SERVERS, all_handlers, handlers
from tests.unit.code_shape import ROOT, classes, modules

SCHEMA = pa.schema({"a": pa.int64()})


@pytest.mark.parametrize("name", SERVERS)
def test_no_answer_of_a_store_ends_a_server(name: str) -> None:
    # pyarrow ended the process: SIGSEGV in SchemaResult(None) and in GeneratorStream(None, ...).
    done = subprocess.run(
        [sys.executable, "-m", "tests.doubles.nonsense_servers", name],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == handlers(SERVERS[name][0])


def test_every_handler_of_every_server_is_asked() -> None:
    servers = {
        shape.name
        for module, path in modules().items()
        for shape in classes(module, ast.parse(path.read_text(encoding="utf-8")))
        if "FlightServerBase" in shape.bases or "_Server" in shape.bases
    }
    assert servers == {"_Server", *(kind.__name__ for kind, _ in SERVERS.values())}
    own = {handler for kind, _ in SERVERS.values() for handler in handlers(kind)}
    assert own | {"do_put"} == all_handlers()


def test_answers_are_made_in_one_module() -> None:
    made = re.compile(
        r"flight\.(SchemaResult|FlightInfo|Result|ActionType|\w*Stream)\(|FlightServerBase\.\w+\("
    )
    places = {
        module
        for module, path in modules().items()
        if made.search(path.read_text(encoding="utf-8"))
    }
    assert places == {"fletcher.net.flight_answers"}


@pytest.mark.parametrize("wrong", [None, "schema", 3, {"a": "int64"}])
def test_values_of_a_wrong_type_are_faults_of_the_server(wrong: Any) -> None:
    for answer in (schema_result, lambda schema: generator_stream(schema, iter([]))):
        with pytest.raises(TypeError, match="schema"):
            answer(wrong)
    with pytest.raises(TypeError, match="schema"):
        flight_info(wrong, "d", 1, 1)
    with pytest.raises(TypeError, match="answer"):
        action_results([wrong])
    with pytest.raises(TypeError, match="table"):
        table_stream(wrong)
    with pytest.raises(TypeError, match="dataset"):
        flight_list([wrong])


@pytest.mark.parametrize("wrong", ["many", 1.5, b"1"])
def test_sizes_of_a_wrong_type_are_faults_of_the_server(wrong: Any) -> None:
    for numbers in ((wrong, 1), (1, wrong)):
        with pytest.raises(TypeError, match="size"):
            flight_info(SCHEMA, "d", *numbers)


def test_answers() -> None:
    assert schema_result(SCHEMA).schema == SCHEMA
    info = flight_info(SCHEMA, "d", None, 2**70)
    assert (info.total_records, info.total_bytes) == (-1, 2**63 - 1)
    assert info.descriptor.path == [b"d"]
    assert action_results([b"{}", b""]) == [b"{}", b""]


def test_streams_are_cut_to_what_clients_receive_by_default() -> None:
    # Clients in Go, Rust and JavaScript refuse messages of more than 4 MiB.
    table = pa.table({"a": pa.array(range(2_000_000), pa.int64())})
    for answer in (table_stream, lambda one: generator_stream(one.schema, one.to_batches())):
        with served(lambda: answer(table)) as client:  # noqa: B023
            sizes, rows = [], []
            for chunk in client.do_get(flight.Ticket(b"")):
                sizes.append(pa.ipc.get_record_batch_size(chunk.data))
                rows.append(chunk.data)
            assert max(sizes) < MAX_ANSWER_BYTES
            assert pa.Table.from_batches(rows).equals(table)


@contextmanager
def served(answer: Callable[[], Any]) -> Iterator[flight.FlightClient]:
    class Server(flight.FlightServerBase):  # type: ignore[misc]
        def do_get(self, context: Any, ticket: Any) -> Any:
            return answer()

    with Server("grpc://127.0.0.1:0") as server:
        with flight.connect(f"grpc://127.0.0.1:{server.port}") as client:
            yield client
        server.shutdown()
