"""`FlightStore` against a stand-in for Longbow, which only appends."""

from __future__ import annotations

import json
import threading

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.errors import (
    DimensionMismatchError,
    InternalError,
    RequestError,
    StoreUnavailableError,
    UnauthorizedError,
    UnknownDatasetError,
)
from fletcher.net.flight_errors import to_flight_error
from fletcher.stores.address import open_store
from fletcher.stores.protocol import CAPABILITIES
from fletcher.stores.staging import staged_name
from tests.doubles import store_rows as rows
from tests.doubles.longbow import LongbowDouble


@pytest.fixture(params=["exchange", "put"])
def double(request):
    with LongbowDouble(exchange=request.param == "exchange") as served:
        yield served


@pytest.fixture
def store(double):
    opened = open_store(double.address, timeout_s=20)
    yield opened
    opened.close()


def test_rows_are_widened_and_lose_nothing(double, store):
    assert store.capabilities.dtypes == ("float32",)
    assert not store.capabilities.drops_repeated_keys
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 10), rows.batch(10, 5)])
    writer.append([rows.batch(15, 5)])
    writer.close()
    table = double.table("d")
    assert table.num_rows == 20
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert table.schema.field("timestamp").type == pa.timestamp("ns")
    assert table["timestamp"].cast(pa.int64())[7].as_py() == 1_700_000_000_000_007_000
    assert table["id"].to_pylist() == [f"id{row}" for row in range(20)]
    got = np.stack(table["vector"].to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(got, rows.vectors(0, 20).astype(np.float16).astype(np.float32))


def test_the_acknowledged_ingest_comes_first_and_put_stands_in(double, store):
    store.open_writer("d", rows.schema(), "append").append([rows.batch(0, 10)])
    assert double.calls == (["exchange"] if double.exchange else ["exchange", "put"])


def test_after_a_broken_send_only_the_rest_is_sent(double):
    store = open_store(double.address, timeout_s=20, message_bytes=1024)
    writer = store.open_writer("d", rows.schema(), "append")
    batches = [rows.batch(0, 100), rows.batch(100, 100)]
    double.fail_after = 5
    with pytest.raises(StoreUnavailableError, match="enqueue timeout") as caught:
        writer.append(batches)
    assert "Traceback" not in caught.value.message
    before = double.table("d").num_rows
    assert 0 < before < 200
    keys = ["u:0-99", "u:100-199"]
    missing = writer.missing_keys(keys)
    assert "u:100-199" in missing
    writer.append([batch for batch, key in zip(batches, keys, strict=True) if key in missing])
    assert sorted(double.table("d")["id"].to_pylist()) == sorted(f"id{row}" for row in range(200))
    assert writer.missing_keys(keys) == []
    assert store.stored_ranges("d", "u") == [(0, 199)]
    assert store.stored_ranges("d", "other") == []
    store.close()


def test_keys_of_a_dataset_that_is_not_there_are_missing(store):
    writer = store.open_writer("d", rows.schema(), "append")
    assert writer.missing_keys(["u:0-9"]) == ["u:0-9"]
    assert store.stored_ranges("d", "u") == []
    assert store.dataset("d") is None


def test_a_stalled_store_is_unavailable_within_the_deadline(double):
    store = open_store(double.address, timeout_s=0.5)
    assert store.capabilities.dtypes == ("float32",)
    writer = store.open_writer("d", rows.schema(), "append")
    double.stall = threading.Event()
    with pytest.raises(StoreUnavailableError, match="deadline"):
        writer.append([rows.batch(0, 10)])
    double.stall.set()
    store.close()


def test_a_store_that_answers_and_takes_no_rows_has_a_full_memory(double):
    double.stall = threading.Event()
    store = open_store(double.address, timeout_s=0.5)
    told = r"deadline while writing to dataset `d`.* larger LONGBOW_MAX_MEMORY"
    with pytest.raises(StoreUnavailableError, match=told):
        store.open_writer("d", rows.schema(), "append")
    double.stall.set()
    store.open_writer("d", rows.schema(), "append").close()
    store.close()


def test_what_longbow_cannot_do_is_refused(double, store):
    with pytest.raises(RequestError, match="upsert"):
        store.open_writer("d", rows.schema(), "upsert")
    writer = store.open_writer("d", rows.schema(), "append")
    with pytest.raises(RequestError, match="no `vector`"):
        writer.append([rows.batch(0, 3, null_rows=(1,))])
    writer.append([rows.batch(0, 3)])
    with pytest.raises(DimensionMismatchError):
        store.open_writer("d", rows.schema(dims=9), "append")
    if not double.exchange:  # a DoExchange checks nothing
        wrong = store.open_writer("e", rows.schema(dims=9), "append")
        wrong._dataset = "d"  # as if another client had made it meanwhile
        with pytest.raises(RequestError, match="schema mismatch"):
            wrong.append([rows.batch(0, 1, dims=9)])


def test_reading_searching_and_deleting(double, store):
    writer = store.open_writer("d", rows.schema(), "append")
    writer.append([rows.batch(0, 50)])
    table = store.scan("d", columns=["text", "id"], limit=7).read_all()
    assert table.column_names == ["text", "id"]
    assert table["id"].to_pylist() == [f"id{row}" for row in range(7)]
    found = store.search("d", rows.vectors(9, 1)[0], k=3, columns=["id", "text"])
    assert found.column_names == ["id", "text", "score"]
    assert found.to_pylist()[0] == {
        "id": "id9",
        "text": "text 9",
        "score": pytest.approx(1, abs=1e-3),
    }
    assert [one.name for one in store.datasets()] == ["d"]
    staged = staged_name("d", "u")
    store.open_writer(staged, rows.schema(dims=9), "append").append([rows.batch(0, 2, dims=9)])
    assert [one.name for one in store.datasets()] == ["d"]
    assert [one.name for one in store.staged_datasets()] == [staged]
    with pytest.raises(RequestError, match="brings deleted rows back"):
        store.replace_dataset("d", staged)
    assert double.table("d").num_rows == 50
    store.delete_dataset("d")
    with pytest.raises(UnknownDatasetError):
        store.delete_dataset("d")


def test_a_store_that_is_not_there_is_unavailable():
    with LongbowDouble() as double:
        address = double.address
    store = open_store(address, timeout_s=5)
    with pytest.raises(StoreUnavailableError) as caught:
        store.open_writer("d", rows.schema(), "append")
    assert caught.value.field == "store"
    store.close()


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (flight.FlightUnavailableError("connection reset"), StoreUnavailableError),
        (flight.FlightTimedOutError("too slow"), StoreUnavailableError),
        (flight.FlightUnauthorizedError("not you"), UnauthorizedError),
        (flight.FlightUnauthenticatedError("who are you"), UnauthorizedError),
        (to_flight_error(InternalError("broken")), StoreUnavailableError),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else "",
)
def test_a_store_that_failed_once_is_not_taken_for_a_longbow(failure, kind):
    class Failing(flight.FlightServerBase):
        def __init__(self):
            super().__init__("grpc://127.0.0.1:0")
            self.failures = [failure]

        def do_action(self, context, action):
            if action.type == CAPABILITIES:
                if self.failures:
                    raise self.failures.pop()
                flags = ("null_vectors", "upsert", "drops_repeated_keys", "durable")
                can = {"dtypes": ["float16"], **dict.fromkeys(flags, True)}
                return [json.dumps(can).encode()]
            return [b'{"status":"READY"}']

    with Failing() as server:
        store = open_store(f"grpc://127.0.0.1:{server.port}", timeout_s=10)
        with pytest.raises(kind) as caught:
            assert store.capabilities
        assert type(caught.value) is kind
        assert store.capabilities.drops_repeated_keys
        store.close()


def test_profile_fletcher_is_refused_where_the_store_is_none(double):
    store = open_store(f"{double.address}&profile=fletcher", timeout_s=5)
    with pytest.raises((RequestError, StoreUnavailableError)):
        assert store.capabilities
    store.close()
    plain = open_store(f"{double.address}&profile=longbow", timeout_s=5)
    assert plain.capabilities.dtypes == ("float32",)
    plain.close()


def test_nobody_asks_a_longbow_for_an_incarnation(store, double, monkeypatch):
    # Each question began to send all rows: an upload asked nine times before its first row.
    store.open_writer("d", rows.schema(), "append").append([rows.batch(0, 10)])
    monkeypatch.setattr(double, "read", None)
    assert store.incarnation("d") == store.incarnation("missing") == ""
