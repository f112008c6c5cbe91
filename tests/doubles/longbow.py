"""A stand-in for Longbow in plain Python that answers as the real server does, faults included.

`scripts/longbow_conformance` asks both the same questions. `longbow_tickets.py` reads tickets.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from fletcher.net.connections import Peer, ServerConnections, parse_peer
from tests.doubles.longbow_tickets import (
    Parser,
    filter_rows,
    invalid,
    missing,
    text_id,
    unimplemented,
)


class LongbowDouble:
    """Longbow's two ports on the loopback interface.

    It breaks off the next call after `fail_after` messages, having stored those before. While
    `fail_with` is set nothing is stored and calls end so.

    Args:
        exchange: False: a server whose DoExchange stores nothing.

    Attributes:
        tables: Batches of each dataset, as they were sent.
        num_unindexed: Number of rows, the last ones of each dataset, that searches do not find.
        calls: Names of the calls that sent rows.
        stall: While it is not set, calls that write wait for it. Other calls are answered.
        num_stalled: Number of calls that waited.
    """

    def __init__(self, *, exchange: bool = True) -> None:
        self.exchange = exchange
        self.fail_after: int | None = None
        self.fail_with: Exception | None = None
        self.stall: threading.Event | None = None
        self.num_stalled = 0
        self.num_unindexed = 0
        self.calls: list[str] = []
        self.log: list[tuple[str, pa.RecordBatch]] = []  # survives a restart; deletes are not in it
        self._forget()
        self._start(0, 0)
        self.address = f"grpc://127.0.0.1:{self._data.port}?meta={self._meta.port}"

    def __enter__(self) -> LongbowDouble:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stall is not None:
            self.stall.set()
        self.kill()

    def table(self, dataset: str) -> pa.Table:
        """A dataset's rows in the order in which they were sent."""
        return pa.Table.from_batches(self.tables[dataset])

    def kill(self, lost: int = 0) -> None:
        """End at once, open streams included; of the acknowledged batches, lose the last ones."""
        self._data.kill()
        self._meta.kill()
        self.log = self.log[: len(self.log) - lost]

    def restart(self) -> bool:
        """Start again with the rows that are not lost, on the same ports.

        Deleted rows and datasets are there again. Returns False if the start fails because a column
        has two types.
        """
        self.kill()
        self._forget()
        try:
            for dataset, batch in self.log:
                self.check_types(dataset, batch.schema)
                self.tables.setdefault(dataset, []).append(batch)
        except pa.ArrowInvalid:
            return False
        self.unknown_ids = {name: self.num_rows(name) for name in self.tables}
        self._start(self._data.port, self._meta.port)
        return True

    def _forget(self) -> None:
        self.tables: dict[str, list[pa.RecordBatch]] = {}
        self.types: dict[str, dict[str, pa.DataType]] = {}  # what DoPut checks
        self.deleted: defaultdict[str, set[int]] = defaultdict(set)  # row numbers
        self.unknown_ids: dict[str, int] = {}  # number of rows that came before the restart
        self.namespaces = ["default"]
        self.parser = Parser()
        self.cache: dict[str, pa.Table] = {}
        self.filter_cache: dict[tuple[str, str], Any] = {}

    def _start(self, data: int, meta: int) -> None:
        self._data: _Port = _Data(self, data)
        self._meta: _Port = _Meta(self, meta)

    # Writing

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        """Keep a batch; no check of its types."""
        self.wait_stalled()
        if self.fail_with is not None:
            raise self.fail_with
        if self.fail_after is not None:
            if self.fail_after == 0:
                self.fail_after = None
                raise flight.FlightInternalError("enqueue timeout")
            self.fail_after -= 1
        self.types.setdefault(dataset, {field.name: field.type for field in batch.schema})
        self.log.append((dataset, batch))
        self.tables.setdefault(dataset, []).append(batch)

    def acknowledge(self, number: int, rows: int) -> bytes:
        """The answer to a message of a DoExchange."""
        ack = {"batch_id": number, "rows": rows, "status": "acked"}
        return json.dumps(ack, separators=(",", ":")).encode()

    def wait_stalled(self) -> None:
        """Wait while calls that write are stalled, as with a full memory."""
        if self.stall is not None:
            self.num_stalled += 1
            self.stall.wait(30)

    def check_types(self, dataset: str, schema: pa.Schema) -> None:
        """The check of a DoPut. Columns that are new are known from then on."""
        known = self.types.setdefault(dataset, {})
        for field in schema:
            kind = known.get(field.name, field.type)
            if kind != field.type:
                raise pa.ArrowInvalid(
                    f'schema mismatch: type mismatch for column "{field.name}": existing='
                    f"{_go_type(kind)}, new={_go_type(field.type)}"
                )
        known.update({field.name: field.type for field in schema})

    # Reading

    def num_rows(self, dataset: str) -> int:
        return sum(batch.num_rows for batch in self.tables.get(dataset, []))

    def batches(self, dataset: str) -> list[pa.RecordBatch]:
        if dataset not in self.types:
            raise missing(f"dataset {dataset} not found")
        return self.tables.get(dataset, [])

    def read(self, ticket: bytes) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Answer of a DoGet: columns of the first batch, batches in any order."""
        query = self.parser.parse(ticket)
        if query.get("search"):
            key = json.dumps(query["search"])
            if key not in self.cache:
                self.cache[key] = self.search(query["search"])
            return self.cache[key].schema, iter(self.cache[key].to_batches())
        batches = self.batches(query["name"])
        if not batches:  # in a Longbow the call ends without any message
            raise flight.FlightInternalError("Server never sent a data message")
        return batches[0].schema, self._read(query, batches)

    def _read(
        self, query: dict[str, Any], batches: list[pa.RecordBatch]
    ) -> Iterator[pa.RecordBatch]:
        starts = itertools.accumulate((batch.num_rows for batch in batches), initial=0)
        deleted = self.deleted[query["name"]]
        asked = {one["field"] for one in query["filters"]}
        num_workers = 2  # each ends at a batch that lacks the columns of all filters
        for start, batch in reversed(list(zip(starts, batches, strict=False))):
            if asked and not asked & set(batch.schema.names):
                num_workers -= 1
                continue
            if not num_workers:
                return
            keep = np.ones(batch.num_rows, bool)
            if query["filters"]:  # deleted rows are there again
                met = filter_rows(batch, query["filters"])
                keep = np.zeros_like(keep) if met is None else met
            else:
                keep[[row - start for row in deleted if 0 <= row - start < len(keep)]] = False
            rows = batch.filter(pa.array(keep))
            columns = [_aligned(rows, field) for field in batches[0].schema]
            yield pa.RecordBatch.from_arrays(columns, schema=batches[0].schema)

    def search(self, asked: dict[str, Any], vector: Any = None) -> pa.Table:
        """Rows that the index has, by distance; ids as the index knows them."""
        name, k = asked["dataset"], asked.get("k", 0)
        if name not in self.tables:
            raise missing(f"dataset not found: {name}")
        query = np.asarray(asked["vector"] if vector is None else vector, np.float32)
        rows = pa.concat_batches([one.select(["id", "vector"]) for one in self.tables[name]])
        dims = rows["vector"].type.list_size
        if len(query) != dims:
            raise invalid(f"dimension mismatch: expected {dims}, got {len(query)}")
        found = self._filtered(name, asked.get("filters") or [])
        vectors = np.asarray(rows["vector"].flatten()).reshape(-1, dims)[found]
        distances = np.linalg.norm(vectors - query, axis=1)
        best = np.argsort(distances, kind="stable")[:k]
        ids = (
            np.asarray(rows["id"]) if pa.types.is_integer(rows["id"].type) else np.arange(len(rows))
        )
        return pa.table(
            {
                "id": (ids[found[best]].astype(np.int64) & 0xFFFFFFFF).astype(np.uint64),
                "score": (1 / (1 + distances[best])).astype(np.float32),
            }
        )

    def _filtered(self, name: str, filters: list[dict[str, Any]]) -> Any:
        """Numbers of the indexed rows that meet all filters; kept, and never brought up to date."""
        key = name, json.dumps(filters)
        if filters and key in self.filter_cache:
            return self.filter_cache[key]
        met = [np.zeros(0, bool)]
        for batch in self.tables[name]:
            one = filter_rows(batch, filters)
            if one is None:
                raise flight.FlightInternalError(
                    "vector search failed: failed to bind any filters to schema fields"
                )
            met.append(one)
        found = np.flatnonzero(np.concatenate(met)[: self.index_len(name)])
        self.filter_cache[key] = found
        return found

    def index_len(self, dataset: str) -> int:
        return max(self.num_rows(dataset) - self.num_unindexed, 0)

    def row_of(self, dataset: str, given: Any) -> int | None:
        """Number of the row with an id, of those that came since the start; the last one."""
        ids = [text_id(one) for batch in self.tables[dataset] for one in batch["id"].to_pylist()]
        first = self.unknown_ids.get(dataset, 0)
        return next((row for row in reversed(range(first, len(ids))) if ids[row] == given), None)


class _Port(flight.FlightServerBase):
    """The calls that both ports answer."""

    def __init__(self, double: LongbowDouble, port: int) -> None:
        self.double = double
        self.peers: set[Peer | None] = set()
        self.actions: dict[str, Callable[[dict[str, Any]], Any]] = {
            "VectorSearch": self._vector_search,
            "VectorSearchByID": self._search_by_id,
            "HybridSearch": self._hybrid_search,
            "delete": self._delete,
            "delete-dataset": self._delete_dataset,
            "DeleteNamespace": self._delete_dataset,
            "check_readiness": self._check_readiness,
            "add-edge": lambda _: _raise(invalid("missing predicate")),
            "traverse-graph": lambda _: [],
            "GetGraphStats": lambda _: {
                "community_count": 0, "edge_count": 0, "predicates": None},
        }  # fmt: skip
        super().__init__(f"grpc+tcp://127.0.0.1:{port}")

    def kill(self) -> None:
        """End at once: the connections of all clients break."""
        ending = threading.Thread(target=self.shutdown)
        ending.start()
        while ending.is_alive():
            peers = {peer for peer in list(self.peers) if peer is not None}
            ServerConnections(self.port).shut_down(peers)
            ending.join(0.01)

    def meet(self, context: Any) -> None:
        self.peers.add(parse_peer(context.peer()))

    def do_get(self, context, ticket):
        self.meet(context)
        return flight.GeneratorStream(*self.double.read(ticket.ticket))

    def get_schema(self, context, descriptor):
        raise invalid("Tried reading schema message, was null or length 0")

    def list_actions(self, context):
        raise unimplemented("method ListActions not implemented")

    def do_action(self, context, action):
        self.meet(context)
        if action.type not in self.actions:
            raise unimplemented(f"unknown action type {action.type}")
        try:
            body = json.loads(action.body.to_pybytes() or b"{}")
        except ValueError:
            raise invalid("invalid json body: unexpected end of JSON input") from None
        answer = self.actions[action.type](body)
        if isinstance(answer, list) and answer and isinstance(answer[0], bytes):
            return [flight.Result(one) for one in answer]
        text = answer if isinstance(answer, str) else json.dumps(answer, separators=(",", ":"))
        return [flight.Result(text.encode())]

    def _vector_search(self, body: dict[str, Any]) -> list[bytes]:
        if body.get("k", 0) < 1:
            raise invalid("k must be at least 1")
        queries = [*([body["vector"]] if body.get("vector") else []), *body.get("vectors", [])]
        if not queries:
            raise invalid("no query vector(s) provided")
        answers = []
        for query in queries:
            sink = pa.BufferOutputStream()
            found = self.double.search(body, query)
            with pa.ipc.new_stream(sink, found.schema) as writer:
                writer.write_table(found)
            answers.append(sink.getvalue().to_pybytes())
        return answers

    def _search_by_id(self, body: dict[str, Any]) -> dict[str, Any]:
        name, given = body["dataset"], _text(body["id"])
        self.double.batches(name)
        row = self.double.row_of(name, given)
        if row is None:
            raise missing(f"id '{given}' not found in dataset '{name}'")
        query = self.double.table(name)["vector"][row].as_py()
        found = self.double.search({"dataset": name, "k": body.get("k", 0)}, query)
        scores = [int(one) if one == 1 else one for one in found["score"].to_pylist()]
        return {"ids": found["id"].to_pylist(), "scores": scores}

    def _hybrid_search(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        found = self.double.search(body)
        own = {"Distance": 0, "Metadata": None, "Vector": None}
        return [{"ID": one, "Score": 1 / (61 + place), **own}
                for place, one in enumerate(found["id"].to_pylist())]  # fmt: skip

    def _delete(self, body: dict[str, Any]) -> str:
        name, given = body["dataset"], _text(body["id"])
        self.double.batches(name)
        row = self.double.row_of(name, given)
        if row is None:
            raise missing(f"id {given} not found in dataset {name}")
        self.double.deleted[name].add(row)
        return "deleted"

    def _delete_dataset(self, body: dict[str, Any]) -> str:
        if "dataset" not in body:
            raise invalid("missing dataset name")
        self.double.batches(body["dataset"])
        for kept in (self.double.tables, self.double.types, self.double.deleted):
            kept.pop(body["dataset"], None)
        return "deleted"

    def _check_readiness(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("dataset")
        if name is None:
            return {"status": "READY"}
        if name not in self.double.types:
            return {"reason": "dataset not found", "status": "NOT_FOUND"}
        return {"index_len": self.double.index_len(name), "status": "READY"}


class _Data(_Port):
    def do_put(self, context, descriptor, reader, writer):
        self.meet(context)
        if not descriptor.path:
            raise flight.FlightInternalError("missing flight descriptor path")
        name = descriptor.path[0].decode()
        self.double.wait_stalled()
        self.double.check_types(name, reader.schema)
        for number, chunk in enumerate(reader):
            if not number:
                self.double.calls.append("put")
            self.double.store(name, chunk.data)

    def do_exchange(self, context, descriptor, reader, writer):
        self.meet(context)
        if descriptor.command == b"VectorSearch":
            return self._exchange_search(reader, writer)
        self.double.calls.append("exchange")
        path = [part.decode() for part in descriptor.path]
        for number, chunk in enumerate(reader, 1):
            if not self.double.exchange or path[0] != "ingest":
                writer.write_metadata(b'{"status":"ack"}')
                return None
            self.double.store(path[1], chunk.data)
            writer.write_metadata(self.double.acknowledge(number, chunk.data.num_rows))
        return None

    def _exchange_search(self, reader: Any, writer: Any) -> None:
        for row in reader.read_all().to_pylist():
            found = self.double.search(row, row["query_vector"])
            writer.begin(found.schema)
            writer.write_table(found)

    def list_flights(self, context, criteria):
        raise unimplemented("ListFlights not implemented on DataServer; use MetaServer")

    def get_flight_info(self, context, descriptor):
        raise unimplemented("GetFlightInfo not implemented on DataServer; use MetaServer")


class _Meta(_Port):
    def __init__(self, double: LongbowDouble, port: int) -> None:
        super().__init__(double, port)
        self.actions |= {
            "CreateNamespace": self._create_namespace,
            "DeleteNamespace": self._delete_namespace,
            "ListNamespaces": lambda _: {
                "count": len(double.namespaces), "namespaces": double.namespaces},
            "GetTotalNamespaceCount": lambda _: {"count": len(double.namespaces)},
        }  # fmt: skip

    def list_flights(self, context, criteria):
        self.meet(context)
        if criteria and not criteria.startswith(b"{"):
            raise invalid("Invalid criteria: expected opening brace")
        conditions = json.loads(criteria or b"{}").get("filters", [])
        for name in list(self.double.types):
            if all(self._is_met(name, one) for one in conditions):
                descriptor = flight.FlightDescriptor.for_path(name)
                yield flight.FlightInfo(None, descriptor, [], 0, 0)

    def _is_met(self, name: str, condition: dict[str, str]) -> bool:
        """A condition of ListFlights. Conditions of other kinds are ignored."""
        value, rows = condition["value"], self.double.num_rows(name)
        tests: dict[tuple[str, str], Callable[[], bool]] = {
            ("name", "contains"): lambda: value in name,
            ("rows", ">"): lambda: rows > int(value),
            ("rows", "<="): lambda: rows <= int(value),
            ("rows", "=="): lambda: rows == int(value),
        }
        return tests.get((condition["field"], condition["operator"]), lambda: True)()

    def get_flight_info(self, context, descriptor):
        self.meet(context)
        name = descriptor.path[0].decode()
        if name not in self.double.types:
            raise missing("dataset not found")
        batches = self.double.batches(name)
        size = sum(batch.nbytes for batch in batches)
        return flight.FlightInfo(None, descriptor, [], len(batches), size)

    def do_put(self, context, descriptor, reader, writer):
        raise unimplemented("DoPut not implemented on MetaServer; use DataServer")

    def do_exchange(self, context, descriptor, reader, writer):
        raise unimplemented("DoExchange not implemented")

    def _create_namespace(self, body: dict[str, Any]) -> dict[str, str]:
        if body["name"] in self.double.namespaces:
            raise flight.FlightInternalError(f"namespace already exists: {body['name']}")
        self.double.namespaces.append(body["name"])
        return {"status": "created"}

    def _delete_namespace(self, body: dict[str, Any]) -> dict[str, str]:
        name = body.get("name", "")
        if name not in self.double.namespaces:
            raise flight.FlightInternalError(f"namespace not found: {name}")
        self.double.namespaces.remove(name)
        return {"status": "deleted"}


def _aligned(rows: pa.RecordBatch, field: pa.Field) -> pa.Array:
    """A column of a batch as a DoGet gives it back: null if the batch lacks it."""
    if field.name not in rows.schema.names:
        return pa.nulls(rows.num_rows, field.type)
    if rows[field.name].type != field.type:
        raise flight.FlightInternalError(
            "arrow/ipc: tried to write record batch with different schema"
        )
    return rows[field.name]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(
            "invalid json body: json: cannot unmarshal number into a field of type string"
        )
    return value


def _raise(error: Exception) -> None:
    raise error


def _go_type(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<item: {_go_type(kind.value_type)}, nullable>[{kind.list_size}]"
    return {"string": "utf8", "float": "float32", "double": "float64"}.get(str(kind), str(kind))
