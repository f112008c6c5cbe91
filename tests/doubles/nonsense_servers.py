"""Servers whose stores and actions answer with a value of a wrong type. A process has one of them.

    python -m tests.doubles.nonsense_servers SERVER

asks every handler of SERVER whose answer has something of a store in it, and prints its name. It
fails where an answer came, or an error that is none for clients.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.config.network import NetworkConfig
from fletcher.flight.actions import ACTIONS, ActionHandler
from fletcher.flight.middleware import Credentials
from fletcher.flight.server import FlightServer
from fletcher.serving.admission import Admission
from fletcher.storeserver.actions import Action
from fletcher.storeserver.requests import EmptyRequest
from fletcher.storeserver.server import _DataServer, _MetaServer
from fletcher.telemetry.tracing import Telemetry

# Handlers that answer with JSON and batches of the server itself.
OWN_ANSWERS = {
    FlightServer: {"do_put", "do_exchange"},
    _DataServer: {"do_put"},
    _MetaServer: {"do_put"},
}
VALUES = (None, 3, "x", b"x", object())
SCHEMA = pa.schema({"a": pa.int64()})


class NonsenseRows:
    """Answer of a scan."""

    def __init__(self, schema: Any, batch: Any) -> None:
        self.schema = schema
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch])


class NonsenseStore:
    """A store of one dataset, `d`, described by `value`; a scan has the schema of its batches."""

    def __init__(self, value: Any, *, has_schema: bool) -> None:
        schema = SCHEMA if has_schema else value
        self.info = SimpleNamespace(name="d", schema=value, num_rows=None, num_bytes=None)
        self.rows = NonsenseRows(schema, value)

    def dataset(self, name: str) -> Any:
        return self.info

    def datasets(self) -> list[Any]:
        return [self.info]

    def scan(self, name: str, **_: Any) -> Any:
        return self.rows


def embedding_server(store: NonsenseStore, value: Any) -> FlightServer:
    ACTIONS["nonsense"] = ActionHandler(value, lambda *_: object())  # type: ignore[arg-type]
    telemetry = Telemetry()
    service: Any = SimpleNamespace(
        telemetry=telemetry,
        delivery=SimpleNamespace(stores={"s": store}, store=lambda _: ("s", store)),
        admission=Admission(4, None, telemetry),
    )
    return FlightServer(service, NetworkConfig(port=0), Credentials())


def store_server(kind: Any, *more: Any) -> Callable[[NonsenseStore, Any], Any]:
    def make(store: NonsenseStore, value: Any) -> Any:
        actions = {"nonsense": Action(EmptyRequest, lambda _: value)}
        Action.about = property(lambda _: value)  # type: ignore[assignment]
        given: Any = SimpleNamespace(
            store=store, data=actions, meta=actions, search_rows=lambda _: value
        )
        return kind("grpc://127.0.0.1:0", given, *more)

    return make


SERVERS: dict[str, tuple[type, Callable[[NonsenseStore, Any], Any]]] = {
    "embedding": (FlightServer, embedding_server),
    "data": (_DataServer, store_server(_DataServer)),
    "meta": (_MetaServer, store_server(_MetaServer, "grpc://127.0.0.1:1")),
}


def all_handlers() -> set[str]:
    """The methods of a server that pyarrow calls."""
    return {name for name in dir(flight.FlightServerBase) if re.match("(do|get|list)_", name)}


def handlers(kind: type) -> set[str]:
    """The handlers of a class whose answers have something of a store."""
    base = flight.FlightServerBase
    own = {name for name in all_handlers() if getattr(kind, name) is not getattr(base, name)}
    return own - OWN_ANSWERS[kind]


def calls(client: flight.FlightClient) -> dict[str, list[Callable[[], object]]]:
    path = flight.FlightDescriptor.for_path("d")
    search = b'{"search": {"dataset": "d", "vector": [1.0], "k": 1}}'

    def exchange() -> None:
        rows = pa.table({"dataset": ["d"], "query_vector": [[1.0]]})
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"VectorSearch"))
        with writer:
            writer.begin(rows.schema)
            writer.write_table(rows)
            writer.done_writing()
            reader.read_all()

    return {
        "do_action": [lambda: list(client.do_action(("nonsense", b"{}")))],
        "do_exchange": [exchange],
        "do_get": [
            lambda: client.do_get(flight.Ticket(b'{"name": "d"}')).read_all(),
            lambda: client.do_get(flight.Ticket(search)).read_all(),
        ],
        "get_flight_info": [lambda: client.get_flight_info(path)],
        "get_schema": [lambda: client.get_schema(path)],
        "list_actions": [lambda: list(client.list_actions())],
        "list_flights": [lambda: list(client.list_flights())],
    }


def main(name: str) -> None:
    kind, make = SERVERS[name]
    for value in VALUES:
        for has_schema in (True, False):
            server = make(NonsenseStore(value, has_schema=has_schema), value)
            with flight.connect(f"grpc://127.0.0.1:{server.port}") as client:
                asked = calls(client)
                for handler in sorted(handlers(kind)):
                    for call in asked[handler]:
                        case = f"{handler}, {value!r}"
                        try:
                            call()
                        except (flight.FlightError, pa.ArrowException) as error:
                            text = str(error)
                            told = "incident" in text or "is not supported" in text
                            assert told, f"{case}: {text}"
                            assert "Traceback" not in text, f"{case}: {text}"
                        else:
                            is_text = handler == "list_actions" and value == "x"
                            assert is_text, f"{case}: an answer"
                    print(handler)
            server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
