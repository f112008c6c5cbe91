"""A Flight server in front of `fletcher store`, which answers wrongly on request."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.stores import protocol

_TIMEOUT = flight.FlightCallOptions(timeout=60)
_SLOW_S = 1.5

ANSWERS = (
    *("cut", "empty", "wrong type", "wrong counts", "slow", "failed", "not done"),
    "refused",
)


class NonsenseStore:
    """Forwards all calls to the two ports of a `fletcher store`. Thread-safe.

    Args:
        data, meta: Addresses of the ports.
        may_refuse: Returns whether rows for a dataset may be refused for good.

    Attributes:
        told: Number of wrong answers by kind.
    """

    def __init__(self, data: str, meta: str, may_refuse: Callable[[str], bool]) -> None:
        self.told: Counter[str] = Counter()
        self._may_refuse = may_refuse
        self._lock = threading.Lock()
        self._left = 0
        self._kind = "cut"
        self._chance = random.Random(0)
        self._server = _Server(self, data, meta)
        self.address = f"grpc://127.0.0.1:{self._server.port}?meta={self._server.port}"

    def begin(self, number: int) -> None:
        """Answer one to four calls wrongly; `number` chooses how."""
        with self._lock:
            self._chance = random.Random(number)
            self._kind = self._chance.choice(ANSWERS)
            self._left = self._chance.choice([1, 2, 4])

    def end(self) -> None:
        """Answer rightly from now on."""
        with self._lock:
            self._left = 0

    def close(self) -> None:
        self._server.shutdown()

    def next_kind(self, call: str, dataset: str = "") -> str:
        """Kind of wrong answer to a call; empty for the right answer."""
        with self._lock:
            if not self._left:
                return ""
            refusable = call == protocol.INGEST and self._may_refuse(dataset)
            if self._kind == "refused" and not refusable:
                return ""
            self._left -= 1
            self.told[f"answer {self._kind}"] += 1
            return self._kind

    def choice(self, *answers: Any) -> Any:
        with self._lock:
            return self._chance.choice(answers)


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    def __init__(self, store: NonsenseStore, data: str, meta: str) -> None:
        self._store = store
        self._addresses = (data, meta)
        self._mutex = threading.Lock()
        self._clients: dict[str, flight.FlightClient] = {}
        super().__init__("grpc+tcp://127.0.0.1:0")

    def do_action(self, context: Any, action: Any) -> list[flight.Result]:
        kind = self._before(action.type)
        results = []
        if kind != "not done":
            results = [one.body.to_pybytes() for one in self._data().do_action(action, _TIMEOUT)]
        if kind in ("", "slow"):
            return [flight.Result(one) for one in results]
        right = results[0] if results else b"{}"
        wrong = {
            "cut": right[: len(right) // 2],
            "empty": b"",
            "wrong type": self._store.choice(b"7", b"[]", b'"x"', b"null", b"\xff\xfe", b"{}"),
            "wrong counts": self._store.choice(
                b'{"ranges": [[5, 2]]}', b'{"ranges": [[-3, 4]]}', b'{"missing": ["not:0-1"]}'
            ),
            "not done": b"",
        }[kind]
        none = kind == "empty" and self._store.choice(True, False)
        return [] if none else [flight.Result(wrong)]

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        path = [part.decode() for part in descriptor.path or ()]
        kind = self._before(path[0] if path else "search", path[-1] if path else "")
        acks = (b"" for _ in reader)
        if kind not in ("not done", "refused"):
            acks = self._forward(descriptor, reader)
        for ack in acks:
            match kind:
                case "cut":
                    ack = ack[: len(ack) // 2]  # noqa: PLW2901
                case "empty":
                    return
                case "wrong type":
                    ack = self._store.choice(b"7", b"[]", b"null", b'{"status": 7}')  # noqa: PLW2901
                case "wrong counts":
                    ack = json.dumps({**json.loads(ack), "rows": 1 << 40}).encode()  # noqa: PLW2901
                case "not done":
                    ack = self._store.choice(b"{}", b"\xff", b'{"status": "acked"}')  # noqa: PLW2901
                case "refused":
                    refusal = {"code": "not_finite", "message": "these rows are refused"}
                    ack = json.dumps({"status": "error", "batch_id": 0, **refusal}).encode()  # noqa: PLW2901
            writer.write_metadata(ack)

    def do_get(self, context: Any, ticket: Any) -> flight.FlightDataStream:
        self._before("get")
        return flight.RecordBatchStream(self._data().do_get(ticket, _TIMEOUT).read_all())

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[flight.FlightInfo]:
        kind = self._before("list")
        infos = list(self._meta().list_flights(criteria, _TIMEOUT))
        return iter([] if kind == "not done" else infos)

    def get_flight_info(self, context: Any, descriptor: Any) -> flight.FlightInfo:
        kind = self._before("info")
        if kind in ("cut", "empty", "wrong type", "wrong counts", "not done"):
            return flight.FlightInfo(pa.schema([]), descriptor, [], -1, -1)
        return self._meta().get_flight_info(descriptor, _TIMEOUT)

    def _before(self, call: str, dataset: str = "") -> str:
        kind = self._store.next_kind(call, dataset)
        if kind == "slow":
            time.sleep(_SLOW_S)
        if kind == "failed" and call == protocol.CAPABILITIES:
            raise flight.FlightUnavailableError("nonsense")  # a Longbow answers with other errors
        if kind == "failed":
            raise self._store.choice(
                flight.FlightInternalError("nonsense"),
                flight.FlightServerError("nonsense"),
                flight.FlightTimedOutError("nonsense"),
                flight.FlightUnavailableError("nonsense"),
            )
        return kind

    def _forward(self, descriptor: Any, rows: Any) -> Iterator[bytes]:
        """Forward each message and yield its answer, as the call stays open for a while."""
        writer, reader = self._data().do_exchange(descriptor, _TIMEOUT)
        with writer:
            writer.begin(rows.schema)
            for one in rows:
                if one.app_metadata is None:
                    writer.write_batch(one.data)
                else:
                    writer.write_with_metadata(one.data, one.app_metadata)
                yield reader.read_chunk().app_metadata.to_pybytes()
            writer.done_writing()

    def _data(self) -> flight.FlightClient:
        return self._client(self._addresses[0])

    def _meta(self) -> flight.FlightClient:
        return self._client(self._addresses[1])

    def _client(self, address: str) -> flight.FlightClient:
        with self._mutex:
            if address not in self._clients:
                self._clients[address] = flight.connect(address)
            return self._clients[address]
