"""Rows on their way to stores that die, drop connections and refuse, over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.config.delivery import DeliveryConfig, JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.upload import Upload
from fletcher.errors import (
    FletcherError,
    OverloadedError,
    RequestError,
    StoreUnavailableError,
    UnauthorizedError,
)
from fletcher.stores.address import open_store
from fletcher.stores.flight.longbow import longbow_schema
from fletcher.stores.flight.longbow_writer import LongbowWriter
from fletcher.storeserver.server import StoreServer
from fletcher.telemetry.tracing import Telemetry
from tests.doubles import store_rows as rows
from tests.doubles.longbow import LongbowDouble
from tests.doubles.proxy import Proxy
from tests.doubles.refusals import Refusals

SCHEMA = pa.schema(list(rows.schema())[:-1], metadata=rows.schema().metadata)


class Served:
    """A store behind a proxy: its address, and the ids it has."""

    def __init__(self, address: str, proxy: Proxy, ids: Callable[[], list[str]]) -> None:
        self.address = address
        self.proxy = proxy
        self.ids = ids
        self.double: Any = None


@pytest.fixture(params=["longbow", "longbow-put", "fletcher"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    if request.param == "fletcher":
        yield from _fletcher(tmp_path / "store")
    else:
        yield from _longbow(exchange=request.param == "longbow")


def _longbow(*, exchange: bool) -> Iterator[Served]:
    with LongbowDouble(exchange=exchange) as double, Proxy(double._data.port) as proxy:
        one = Served(
            f"grpc://127.0.0.1:{proxy.port}?meta={double._meta.port}&profile=longbow",
            proxy,
            lambda: double.table("d")["id"].to_pylist() if "d" in double.tables else [],
        )
        one.double = double
        yield one


def _fletcher(folder: Path) -> Iterator[Served]:
    server = StoreServer(folder, host="127.0.0.1", port=0, meta_port=0)
    direct = open_store(server.address, timeout_s=20)

    def ids() -> list[str]:
        there = direct.dataset("d") is not None
        return direct.scan("d", columns=["id"]).read_all()["id"].to_pylist() if there else []

    try:
        with Proxy(server.port) as proxy:
            meta = server.meta_port
            yield Served(f"grpc://127.0.0.1:{proxy.port}?meta={meta}&profile=fletcher", proxy, ids)
    finally:
        direct.close()
        server.close(10)


@contextmanager
def delivering(address: str, journal: Path, timeout_s: float = 20) -> Iterator[Delivery]:
    config = DeliveryConfig(
        group_rows=50, commit_rows=500, group_delay_ms=10, store_retry_s=60, store_timeout_s=20
    )
    kept = JournalConfig(folder=journal, max_bytes=1 << 30, segment_bytes=1 << 20, retention_s=0)
    store = open_store(address, timeout_s=timeout_s)
    delivery = Delivery({"default": store}, config, Telemetry(), kept)
    try:
        yield delivery
    finally:
        delivery.close()


def open_(delivery: Delivery, **fields: Any) -> tuple[Upload, DatasetSink]:
    return delivery.open_upload(
        EmbedCommand(**{"dataset": "d", "upload_id": "u", **fields}), SCHEMA
    )


def send(sink: DatasetSink, upload: Upload, first: int, num_rows: int) -> None:
    batch = rows.batch(first, num_rows)
    assert upload.claim_rows(first, first + num_rows - 1)
    sink.submit_rows(
        Rows.from_batch(upload, batch.select(SCHEMA.names).cast(SCHEMA), first, (), lambda: None)
    )


def stored(upload: Upload, num_rows: int, timeout_s: float = 30) -> bool:
    with upload.changed:
        return upload.changed.wait_for(
            lambda: upload.counts()["rows_stored"] == num_rows or upload.failure is not None,
            timeout_s,
        )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def expected(num_rows: int) -> list[str]:
    return sorted(f"id{row}" for row in range(num_rows))


def test_a_store_that_dies_and_comes_back_has_each_row_once(served: Served, tmp_path: Path) -> None:
    with delivering(served.address, tmp_path / "journal") as delivery:
        upload, sink = open_(delivery)
        for first in range(0, 200, 50):
            send(sink, upload, first, 50)
        served.proxy.up = False
        served.proxy.cut()  # in the midst of whatever is under way
        for first in range(200, 400, 50):
            send(sink, upload, first, 50)
        state = delivery.statistics
        until(lambda: state()["default"]["state"] != "there")
        assert upload.failure is None
        until(lambda: upload.counts()["rows_durable"] == 400)
        served.proxy.up = True
        assert stored(upload, 400)
        assert upload.failure is None
        assert state()["default"]["state"] == "there"
    assert sorted(served.ids()) == expected(400)


def test_a_store_that_took_the_rows_and_died_before_it_said_so(
    served: Served, tmp_path: Path
) -> None:
    with delivering(served.address, tmp_path / "journal") as delivery:
        upload, sink = open_(delivery)
        send(sink, upload, 0, 50)
        assert stored(upload, 50)
        served.proxy.answering = False
        send(sink, upload, 50, 50)
        until(lambda: len(served.ids()) == 100)
        served.proxy.cut()
        served.proxy.answering = True
        assert stored(upload, 100)
        assert upload.failure is None
    assert sorted(served.ids()) == expected(100)


def test_after_an_outage_and_a_restart_of_ours_each_row_is_there_once(
    served: Served, tmp_path: Path
) -> None:
    with delivering(served.address, tmp_path / "journal") as delivery:
        upload, sink = open_(delivery)
        send(sink, upload, 0, 50)
        assert stored(upload, 50)
        served.proxy.answering = False
        send(sink, upload, 50, 50)
        until(lambda: len(served.ids()) == 100)  # in the store, and still in the journal
        served.proxy.up = False
        served.proxy.cut()
        send(sink, upload, 100, 50)
        until(lambda: upload.counts()["rows_durable"] == 150)
    served.proxy.up = served.proxy.answering = True
    with delivering(served.address, tmp_path / "journal") as delivery:
        assert delivery.recover() >= 100
        assert delivery.flush(30)
    assert sorted(served.ids()) == expected(150)


@pytest.mark.parametrize(
    "error",
    [
        flight.FlightInternalError("enqueue timeout"),
        flight.FlightUnavailableError("memory limit"),
        flight.FlightTimedOutError("ingestion backpressure"),
        flight.FlightServerError("worse"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_passes_by_itself_is_waited_for(error: Exception, tmp_path: Path) -> None:
    for one in _longbow(exchange=True):
        with delivering(one.address, tmp_path) as delivery:
            upload, sink = open_(delivery, durability="store")
            one.double.fail_with = error
            send(sink, upload, 0, 50)
            until(lambda: delivery.statistics()["default"]["state"] != "there")
            one.double.fail_with = None
            assert stored(upload, 50)
            assert upload.failure is None
        assert sorted(one.ids()) == expected(50)


def test_a_stall_is_cut_off_and_what_follows_is_smaller(tmp_path: Path) -> None:
    for one in _longbow(exchange=True):
        with delivering(one.address, tmp_path, timeout_s=0.5) as delivery:
            upload, sink = open_(delivery)
            one.double.stall = threading.Event()
            send(sink, upload, 0, 50)
            until(lambda: delivery._telemetry.store_retries.values().get((), 0) >= 1)
            one.double.stall.set()
            assert stored(upload, 50)
            assert upload.failure is None


def test_a_refusal_is_not_retried_and_its_rows_are_kept(tmp_path: Path) -> None:
    for one in _longbow(exchange=True):
        with delivering(one.address, tmp_path) as delivery:
            upload, sink = open_(delivery)
            one.double.fail_with = pa.ArrowInvalid("schema mismatch: vector")
            send(sink, upload, 0, 50)
            assert stored(upload, 50)
            assert isinstance(upload.failure, RequestError)
            assert "schema mismatch" in upload.failure.message
            assert delivery._telemetry.store_retries.values() == {}
            until(lambda: bool(list(tmp_path.glob("*/d/*.rejected"))))


@pytest.mark.parametrize("use_put", [False, True], ids=["exchange", "put"])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        # pyarrow raises this one as it does a refusal: rows were given up for good.
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, StoreUnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, StoreUnavailableError),
        (grpc.StatusCode.INTERNAL, StoreUnavailableError),
        (grpc.StatusCode.ABORTED, StoreUnavailableError),
        (grpc.StatusCode.UNKNOWN, StoreUnavailableError),
        (grpc.StatusCode.CANCELLED, StoreUnavailableError),
        (grpc.StatusCode.INVALID_ARGUMENT, RequestError),
        (grpc.StatusCode.FAILED_PRECONDITION, RequestError),
        (grpc.StatusCode.PERMISSION_DENIED, UnauthorizedError),
        (grpc.StatusCode.UNAUTHENTICATED, UnauthorizedError),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_each_status_is_taken_for_what_it_is(
    status: grpc.StatusCode, kind: type[FletcherError], use_put: bool
) -> None:
    with Refusals(status, "no room") as server:
        address = f"grpc://127.0.0.1:{server.port}?meta={server.port}&profile=longbow"
        store = open_store(address, timeout_s=10)
        own = store._server
        schema = longbow_schema(rows.schema())
        writer = LongbowWriter(own._connection, "d", schema, own._uploads)
        writer._use_put = use_put
        with pytest.raises(kind, match=r"no room|deadline") as caught:
            writer.append([rows.batch(0, 10)])
        assert type(caught.value) is kind
        store.close()
