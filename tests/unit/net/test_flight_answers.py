"""No answer of a handler ends the server's process, whatever a store said."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest

from fletcher.net.flight_answers import (
    action_results,
    flight_info,
    generator_stream,
    schema_result,
)

SCHEMA = pa.schema({"a": pa.int64()})
SERVE = """
import sys
from types import SimpleNamespace
from pyarrow import flight
from fletcher.config.network import NetworkConfig
from fletcher.flight.middleware import Credentials
from fletcher.flight.server import FlightServer
from fletcher.serving.admission import Admission
from fletcher.stores.base import DatasetInfo
from fletcher.telemetry.tracing import Telemetry

info = SimpleNamespace(name="d", schema=None, num_rows=None, num_bytes=None)
store = SimpleNamespace(dataset=lambda name: info, datasets=lambda: [info])
delivery = SimpleNamespace(stores={"s": store}, store=lambda name: ("s", store))
telemetry = Telemetry()
admission = Admission(4, None, telemetry)
service = SimpleNamespace(telemetry=telemetry, delivery=delivery, admission=admission)
server = FlightServer(service, NetworkConfig(port=0), Credentials())
client = flight.connect(server.address)
for call in (
    lambda: client.get_schema(flight.FlightDescriptor.for_path("d")),
    lambda: client.get_flight_info(flight.FlightDescriptor.for_path("d")),
    lambda: list(client.list_flights()),
):
    try:
        call()
    except Exception as error:
        assert "incident" in str(error), error
        assert "Traceback" not in str(error), error
    else:
        raise AssertionError("no error")
print("alive")
"""


def test_a_store_without_a_schema_leaves_the_server_alive() -> None:
    # pyarrow ended the process: SIGSEGV in SchemaResult(None).
    done = subprocess.run(
        [sys.executable, "-c", SERVE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize("wrong", [None, "schema", 3, {"a": "int64"}])
def test_values_of_a_wrong_type_are_faults_of_the_server(wrong: Any) -> None:
    for answer in (schema_result, lambda schema: generator_stream(schema, iter([]))):
        with pytest.raises(TypeError, match="schema"):
            answer(wrong)
    with pytest.raises(TypeError, match="schema"):
        flight_info(wrong, "d", 1, 1)
    with pytest.raises(TypeError, match="answer"):
        action_results(wrong)


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
    assert action_results(b"{}") == [b"{}"]
