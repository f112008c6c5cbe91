"""Callers that leave or fall silent: nothing of theirs stays, whatever they called."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.pipeline.scheduler import InferenceStage
from fletcher.runtime import Runtime
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import action, command, exchange, put
from tests.integration.processes import eventually

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8()})
UPLOAD_AND_WAIT = """
import sys
from pyarrow import flight
from tests.integration.flight_calls import command
from tests.integration.test_callers import SCHEMA, rows

writer, reader = flight.connect(sys.argv[1]).do_put(command(dataset="killed"), SCHEMA)
writer.write_batch(rows(100))
print("sent", flush=True)
reader.read()
"""


def rows(number: int) -> pa.RecordBatch:
    ids = list(range(number))
    return pa.record_batch({"id": ids, "text": [f"number {one}" for one in ids]}, SCHEMA)


class Stall:
    """Stops the model: while it lasts, no micro-batch reaches it, and texts wait in the queues."""

    def __init__(self) -> None:
        self._is_on = False
        self._schedule = InferenceStage.schedule
        self._num_scheduling = 0
        self._changed = threading.Condition()

    def begin(self) -> None:
        with self._changed:
            self._is_on = True
            assert self._changed.wait_for(lambda: not self._num_scheduling, 30)

    def end(self) -> None:
        with self._changed:
            self._is_on = False
            self._changed.notify_all()

    def schedule(self, stage: InferenceStage, **options: Any) -> Any:
        with self._changed:
            if self._is_on:
                self._changed.wait(0.1)
                return None
            self._num_scheduling += 1
        try:
            return self._schedule(stage, **options)
        finally:
            with self._changed:
                self._num_scheduling -= 1
                self._changed.notify_all()


@pytest.fixture(scope="module")
def stall() -> Iterator[Stall]:
    stall = Stall()

    def schedule(stage: InferenceStage, **options: Any) -> Any:
        return stall.schedule(stage, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InferenceStage, "schedule", schedule)
        yield stall


@pytest.fixture(scope="module")
def server(start_server: StartServer, stall: Stall) -> Runtime:
    return start_server(isolate_engine=True)


@pytest.fixture
def stalled(server: Runtime, stall: Stall) -> Iterator[Runtime]:
    eventually(lambda: is_idle(server), "nothing is left of the call before")
    stall.begin()
    yield server
    stall.end()


def is_idle(server: Runtime) -> bool:
    stats = server.service.statistics()
    depths = stats["fletcher.queue.depth"].values()
    return not (stats["fletcher.streams.open"] or stats["memory"]["used_bytes"] or any(depths))


def num_cancelled(server: Runtime) -> int:
    errors: dict[str, int] = server.service.statistics()["fletcher.errors"]
    return errors.get("cancelled", 0)


def waits(server: Runtime) -> bool:
    return bool(server.service.statistics()["fletcher.queue.depth"]["tokens"])


def options(how: str) -> flight.FlightCallOptions:
    return flight.FlightCallOptions(timeout=2.0 if how == "deadline" else 60.0)


class Put:
    def __init__(self, client: flight.FlightClient, how: str, *, done: bool) -> None:
        fields = {"dataset": "left", "upload_id": f"{how}-{done}"}
        self.writer, self.reader = client.do_put(command(**fields), SCHEMA, options(how))
        self.writer.write_batch(rows(100))
        if done:
            self.writer.write_metadata(b'{"end": true, "rows": 100}')
            self.writer.done_writing()

    def read(self) -> None:
        while self.reader.read() is not None:
            pass


class Exchange:
    fields: ClassVar[dict[str, Any]] = {}

    def __init__(self, client: flight.FlightClient, how: str, *, done: bool) -> None:
        self.writer, self.reader = client.do_exchange(command(**self.fields), options(how))
        self.writer.begin(SCHEMA)
        self.writer.write_batch(rows(100))
        if done:
            self.writer.done_writing()

    def read(self) -> None:
        while True:  # `read_all` raises KeyboardInterrupt when its call is cancelled
            self.reader.read_chunk()

    def cancel(self) -> None:
        self.reader.cancel()


class Continuous(Exchange):
    fields: ClassVar = {"continuous": True, "chunking": "tokens:8:none", "include_text": True}


class Embed:
    def __init__(self, client: flight.FlightClient, how: str, *, done: bool) -> None:
        body = {"texts": [f"number {one}" for one in range(100)]}
        embed = flight.Action("embed", json.dumps(body).encode())
        self.results = client.do_action(embed, options(how))

    def read(self) -> None:
        list(self.results)


@pytest.mark.parametrize(
    ("kind", "how", "done"),
    [
        (Put, "deadline", False),
        (Put, "deadline", True),
        (Exchange, "deadline", False),
        (Exchange, "deadline", True),
        (Exchange, "cancel", False),
        (Exchange, "cancel", True),
        (Continuous, "cancel", False),
        (Continuous, "deadline", True),
        (Embed, "deadline", True),
    ],
)
def test_the_work_of_a_caller_that_left_leaves_all_queues(
    stalled: Runtime,
    stall: Stall,
    caplog: pytest.LogCaptureFixture,
    kind: Callable[..., Any],
    how: str,
    done: bool,
) -> None:
    before = num_cancelled(stalled)
    with flight.connect(stalled.address) as client:
        call = kind(client, how, done=done)
        if how == "cancel":
            eventually(lambda: waits(stalled), "the texts wait for the model")
            call.cancel()
        with contextlib.suppress(flight.FlightError, pa.ArrowException, StopIteration):
            call.read()
    eventually(lambda: is_idle(stalled), "nothing of the call is left")
    eventually(lambda: num_cancelled(stalled) == before + 1, "it counts as cancelled")
    tokens = stalled.service.statistics()["fletcher.device.tokens"]
    stall.end()
    with flight.connect(stalled.address) as client:
        ((answer, _),) = exchange(client, [rows(1)], SCHEMA)
        assert answer.num_rows == 1
        later = stalled.service.statistics()["fletcher.device.tokens"]
        assert sum_of(later) - sum_of(tokens) < 100  # of the one row alone
        if kind is Put:
            body = {"upload_id": f"{how}-{done}", "dataset": "left"}
            assert action(client, "upload_status", body)["ranges"] == []
            fields = {"dataset": "left", "upload_id": f"{how}-{done}"}
            assert put(client, [rows(100)], SCHEMA, end=100, **fields)[-1]["rows_stored"] == 100
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def sum_of(metric: Any) -> float:
    return sum(map(sum_of, metric.values())) if isinstance(metric, dict) else float(metric)


def test_the_work_of_a_killed_client_leaves_all_queues(stalled: Runtime) -> None:
    argv = [sys.executable, "-c", UPLOAD_AND_WAIT, stalled.address]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        eventually(lambda: waits(stalled), "the texts wait for the model")
        process.kill()
    eventually(lambda: is_idle(stalled), "nothing of the call is left")


@pytest.mark.parametrize("kind", ["put", "exchange"])
def test_a_silent_client_gives_its_place_back_and_its_call_ends(
    start_server: StartServer, kind: str
) -> None:
    server = start_server(idle_timeout=0.3)
    silent = flight.connect(server.address)
    if kind == "put":
        writer, reader = silent.do_put(command(dataset="silent", upload_id="u"), SCHEMA)
        writer.write_batch(rows(3))
        assert json.loads(reader.read().to_pybytes())["rows_durable"] == 3
    else:
        writer, reader = silent.do_exchange(command())
        writer.begin(SCHEMA)
        writer.write_batch(rows(3))
        assert reader.read_chunk().data.num_rows == 3
    with flight.connect(server.address) as other:
        eventually(lambda: is_idle(server), "its place is free")
        summary = put(other, [rows(2)], SCHEMA, end=2, dataset="other")[-1]
        assert summary["complete"] is True
    if kind == "put":
        summary = json.loads(reader.read().to_pybytes())
        assert [one["code"] for one in summary["errors"]] == ["overloaded"]
    else:
        assert json.loads(reader.read_chunk().app_metadata.to_pybytes())["code"] == "overloaded"
    eventually(lambda: server.service.admission._num_calls == 0, "its call has ended")
    with contextlib.suppress(flight.FlightError, pa.ArrowException, OSError):
        writer.close()
    silent.close()


def test_a_server_ends_although_a_client_is_silent(start_server: StartServer) -> None:
    server = start_server()
    with flight.connect(server.address) as silent:
        writer, _ = silent.do_put(command(dataset="silent"), SCHEMA)
        writer.write_batch(rows(3))
        eventually(lambda: bool(server.service.admission.num_streams), "its call is open")
        server.drain(1)
        assert server.close() is True
        with contextlib.suppress(flight.FlightError, pa.ArrowException, OSError):
            writer.close()
