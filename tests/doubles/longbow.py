"""A stand-in for Longbow in pure Python: it appends all input and promises little.

Two ports, an acknowledged DoExchange, a DoPut without acknowledgements, unknown actions refused,
ListFlights on the meta port alone, equality and range filters in DoGet.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import flight

TESTS = {
    "=": pc.equal, "==": pc.equal, "!=": pc.not_equal, ">": pc.greater, "<": pc.less,
    ">=": pc.greater_equal, "<=": pc.less_equal,
}  # fmt: skip


class LongbowDouble:
    """`fail_after` messages of the next call it breaks off, having stored those before.

    While `fail_with` is set nothing is stored and calls end so.
    """

    def __init__(self, *, exchange: bool = True) -> None:
        self.tables: dict[str, list[pa.RecordBatch]] = {}
        self.exchange = exchange
        self.fail_after: int | None = None
        self.fail_with: Exception | None = None
        self.stall: threading.Event | None = None
        self.calls: list[str] = []
        self._data = _Data(self)
        self._meta = _Meta(self)
        self.address = f"grpc://127.0.0.1:{self._data.port}?meta={self._meta.port}"

    def __enter__(self) -> LongbowDouble:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stall is not None:
            self.stall.set()
        self._data.shutdown()
        self._meta.shutdown()

    def table(self, dataset: str) -> pa.Table:
        return pa.Table.from_batches(self.tables[dataset])

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        if self.stall is not None:
            self.stall.wait(30)
        if self.fail_with is not None:
            raise self.fail_with
        if self.fail_after is not None:
            if self.fail_after == 0:
                self.fail_after = None
                raise flight.FlightInternalError("enqueue timeout")
            self.fail_after -= 1
        have = self.tables.setdefault(dataset, [])
        if have and have[0].schema != batch.schema:
            raise pa.ArrowInvalid("schema mismatch: vector")
        have.append(batch)


class _Data(flight.FlightServerBase):
    def __init__(self, double: LongbowDouble) -> None:
        self.double = double
        super().__init__("grpc+tcp://127.0.0.1:0")

    def do_put(self, context, descriptor, reader, writer):
        self.double.calls.append("put")
        if not descriptor.path:
            raise flight.FlightInternalError("missing flight descriptor path")
        for chunk in reader:
            self.double.store(descriptor.path[0].decode(), chunk.data)

    def do_exchange(self, context, descriptor, reader, writer):
        self.double.calls.append("exchange")
        path = [part.decode() for part in descriptor.path]
        for number, chunk in enumerate(reader):
            if not self.double.exchange or path[0] != "ingest":
                writer.write_metadata(b'{"status":"ack"}')
                return
            self.double.store(path[1], chunk.data)
            ack = {"status": "acked", "batch_id": number, "rows": chunk.data.num_rows}
            writer.write_metadata(json.dumps(ack).encode())

    def do_get(self, context, ticket):
        fields: dict[str, Any] = json.loads(ticket.ticket)
        search = fields.get("search")
        name = fields.get("name") or search["dataset"]
        if name not in self.double.tables:
            raise flight.FlightServerError(f"dataset not found: {name}")
        table = self.double.table(name)
        if search:
            vectors = np.stack(table["vector"].to_numpy(zero_copy_only=False))
            scores = vectors @ np.asarray(search["vector"], np.float32)
            best = np.argsort(-scores)[: search["k"]]
            found = pa.table(
                {"id": pa.array(best, pa.uint64()), "score": pa.array(scores[best], pa.float32())}
            )
            return flight.RecordBatchStream(found)
        for one in fields.get("filters", []):
            test = TESTS[one.get("operator", one.get("op"))]
            table = table.filter(test(table[one["field"]], one["value"]))
        return flight.RecordBatchStream(table)

    def do_action(self, context, action):
        body = json.loads(action.body.to_pybytes() or b"{}")
        if action.type == "delete-dataset":
            self.double.tables.pop(body["dataset"])
            return [flight.Result(b"deleted")]
        if action.type == "check_readiness":
            return [flight.Result(b'{"status":"READY"}')]
        raise flight.FlightServerError(f"unknown action: {action.type}")


class _Meta(flight.FlightServerBase):
    def __init__(self, double: LongbowDouble) -> None:
        self.double = double
        super().__init__("grpc+tcp://127.0.0.1:0")

    def list_flights(self, context, criteria):
        for name, batches in self.double.tables.items():
            descriptor = flight.FlightDescriptor.for_path(name)
            # Longbow says batches where the protocol says records.
            yield flight.FlightInfo(batches[0].schema, descriptor, [], len(batches), -1)
