"""Answers of a Flight store that are not what was asked for."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.errors import RequestError, StoreUnavailableError
from fletcher.stores import protocol
from fletcher.stores.address import FlightStoreAddress
from fletcher.stores.flight.connection import FlightConnection, store_call
from fletcher.stores.flight.fletcher_server import FletcherServer, FletcherWriter
from fletcher.stores.flight.store import FlightStore
from fletcher.stores.flight.transfer import _await_acks, exchange_rows, put_rows
from tests.doubles.longbow import LongbowDouble

ANSWERS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"missing": 3, "ranges": [[1]]}',
    b"{}",
    b"NaN",
]


def connection(answer: bytes) -> Any:
    one = object.__new__(FlightConnection)
    one.address = FlightStoreAddress.from_text("grpc://127.0.0.1:1")
    one.run_action = lambda *_: answer  # type: ignore[method-assign]
    return one


def server(answer: bytes) -> FletcherServer:
    return FletcherServer(connection(answer), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_cannot_be_read_is_asked_for_again(answer: bytes) -> None:
    # A journaled group was rejected for it.
    writer = FletcherWriter(connection(answer), "d", pa.schema({}), "append")
    with pytest.raises(StoreUnavailableError, match="cannot be read"):
        writer.missing_keys(["u:0-9"])
    with pytest.raises(StoreUnavailableError, match="cannot be read"):
        connection(answer).ask(protocol.STORED_RANGES, {}, protocol.StoredRangesAnswer)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_dataset_is_replaced_only_if_the_store_says_so(answer: bytes) -> None:
    # The client was told that its overwrite was complete, and the dataset had its old rows.
    store = server(answer)
    with pytest.raises(StoreUnavailableError, match="cannot be read"):
        store.replace_dataset("d", "d.staged-0123456789abcdef")
    store = server(b"replaced")
    store.replace_dataset("d", "d.staged-0123456789abcdef")


@pytest.mark.parametrize("ranges", [b"[[5, 4]]", b"[[-1, 4]]", b"[[0, 9], [20, 15]]"])
def test_ranges_that_are_no_rows_are_no_answer(ranges: bytes) -> None:
    store = server(b'{"ranges": %b}' % ranges)
    with pytest.raises(StoreUnavailableError, match="not row offsets"):
        store.stored_ranges("d", "u")


@pytest.mark.parametrize("answer", ANSWERS)
def test_capabilities_that_cannot_be_read_are_not_those_of_a_longbow(answer: bytes) -> None:
    # The store was taken for a Longbow from then on: groups were stored twice, upserts refused.
    one = connection(answer)
    store = FlightStore(one)
    with pytest.raises(StoreUnavailableError, match="cannot be read"):
        assert store.capabilities
    can = b'{"dtypes": ["float32"], "null_vectors": true, "upsert": true, "durable": true, '
    one.run_action = lambda *_: can + b'"drops_repeated_keys": true}'
    assert store.capabilities.upsert


@pytest.mark.parametrize("schema", [pa.schema([]), pa.schema({"id": pa.int64()})])
def test_a_dataset_without_vectors_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, schema: pa.Schema
) -> None:
    # It had no incarnation, so that uploads were told that somebody had dropped their rows.

    class Meta:
        def get_flight_info(self, asked: Any, _: object) -> flight.FlightInfo:
            return flight.FlightInfo(schema, asked, [], -1, -1)

    store = server(b"")
    monkeypatch.setattr(FlightConnection, "meta_client", Meta())
    monkeypatch.setattr(FlightConnection, "call_options", lambda _: None)
    with pytest.raises(StoreUnavailableError, match="no column `vector`"):
        store.incarnation("d")


@pytest.mark.parametrize(
    ("acks", "said"),
    [
        ([{"status": "acked", "rows": 9}], "acknowledged 9 rows of 10"),
        ([{"status": "acked"}], "acknowledged None rows of 10"),
        ([{"status": "acked", "rows": 10}], "1 of 2 messages"),
        ([], "0 of 2 messages"),
    ],
)
def test_an_acknowledgement_of_other_rows_is_none(acks: list[dict[str, Any]], said: str) -> None:
    def read_chunk() -> Any:
        if not acks:
            raise StopIteration
        return SimpleNamespace(app_metadata=pa.py_buffer(json.dumps(acks.pop(0)).encode()))

    with pytest.raises(StoreUnavailableError, match=said):
        _await_acks(SimpleNamespace(read_chunk=read_chunk), [10, 5], "writing")


class _Failing:
    """A writer of a call whose first write fails on this machine."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def write_batch(self, batch: pa.RecordBatch) -> None:
        raise pa.ArrowMemoryError("no memory for this batch")


@pytest.mark.parametrize("send", ["exchange", "put"])
def test_a_store_does_not_wait_for_rows_after_a_local_failure(
    monkeypatch: pytest.MonkeyPatch, send: str
) -> None:
    # Both ends waited for each other until the call's deadline.
    rows = pa.record_batch({"id": [1, 2]})
    with LongbowDouble() as double:
        address = FlightStoreAddress.from_text(double.address)
        one = FlightConnection(address, timeout_s=20, compression="none", message_bytes=1 << 20)
        client = one.data_client

        def failing(call: Any) -> Any:
            def begin(*arguments: Any) -> Any:
                writer, reader = call(*arguments)
                return _Failing(writer), reader

            return begin

        calls = SimpleNamespace(
            do_exchange=failing(client.do_exchange), do_put=failing(client.do_put)
        )
        monkeypatch.setattr(FlightConnection, "data_client", calls)
        with pytest.raises(StoreUnavailableError, match="the store ended the call"):
            if send == "exchange":
                exchange_rows(one, "d", rows, None)
            else:
                put_rows(one, "d", rows)
        one.close()


class _Refusing(flight.FlightServerBase):  # type: ignore[misc]
    def do_action(self, _context: Any, action: Any) -> list[bytes]:
        raise {"invalid": pa.ArrowInvalid, "missing": pa.ArrowKeyError}[action.type]("not this")


@pytest.mark.parametrize("name", ["invalid", "missing"])
def test_a_refusal_that_a_store_sent_is_final(name: str) -> None:
    with (
        _Refusing("grpc://127.0.0.1:0") as server,
        flight.connect(f"grpc://127.0.0.1:{server.port}") as client,
        pytest.raises(RequestError, match="not this"),
        store_call("asking"),
    ):
        list(client.do_action(flight.Action(name, b"")))
