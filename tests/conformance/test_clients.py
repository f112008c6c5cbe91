"""Every client runs the same cases, with and without faults."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fletcher.cli import main
from fletcher.config.server import ServeConfig
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.runtime import Runtime
from fletcher.stores.address import open_store
from tests.conformance.drivers import TOOLS, Driver, running
from tests.conftest import GOLDEN
from tests.faults.schedules import free_port
from tests.integration.processes import Place, ServerProcess, eventually, serving

CASES = json.loads((Path(__file__).parent / "cases.json").read_text())
# A language's first test builds its driver. That takes minutes if the caches are empty.
pytestmark = pytest.mark.timeout(1300)
RETRIES = {"max_retries": 30}
_numbers = itertools.count()


@pytest.fixture(scope="module", params=TOOLS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as driver:
        yield driver


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with running("python", tmp_path_factory.mktemp("reference")) as driver:
        yield driver


class Server:
    """A server that can be killed and started again at its address."""

    def __init__(self, place: Place, *options: str) -> None:
        self.place = place
        self._argv = place.argv("--port", str(free_port()), "--max-journal", "1GiB", *options)
        self._exits = ExitStack()
        self.process: ServerProcess
        self.start()

    @property
    def address(self) -> str:
        return self.process.address

    def start(self) -> None:
        self.process = self._exits.enter_context(serving(self._argv))

    def end(self, number: int) -> None:
        self.process.process.send_signal(number)
        self.process.process.wait(60)

    def close(self) -> None:
        self._exits.close()

    def ids(self, dataset: str) -> list[int]:
        store = open_store(f"lance:{self.place.vectors}")
        try:
            return sorted(store.scan(dataset, columns=["id"]).read_all()["id"].to_pylist())
        finally:
            store.close()


StartServer = Callable[..., Server]


@pytest.fixture(scope="module")
def start_server(
    tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartServer]:
    with ExitStack() as servers:

        def start(*options: str) -> Server:
            home = tmp_path_factory.mktemp("home")
            (home / "models").symlink_to(tiny_bundle.folder.parent)
            server = Server(Place(home, home / "vectors"), *options)
            servers.callback(server.close)
            return server

        yield start


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server()


def new_dataset(name: str) -> str:
    return f"{name}-{next(_numbers)}" if name == "d" else name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_case(driver: Driver, python: Driver, server: Server, case: dict[str, Any]) -> None:
    fields = {name: value for name, value in case.items() if name not in ("name", "expect")}
    expect, times = case["expect"], fields.pop("times", 1)
    fields["address"] = server.address
    if "dataset" in fields:
        fields["dataset"] = new_dataset(fields["dataset"])
    for _ in range(times):
        outcome = driver.run(**fields)
    if "error" in expect:
        told = {name: outcome["error"][name] for name in expect["error"]}
        assert told == expect["error"], outcome
        assert outcome["error"]["message"]
    elif "row_error" in expect:
        assert expect["row_error"].items() <= outcome["row_error"].items(), outcome
    elif "vectors" in expect:
        assert len(outcome["answer"] or ()) == expect["vectors"], outcome
        reference = python.run(**fields)["answer"]
        found = np.array(outcome["answer"] or [], np.float32)
        np.testing.assert_array_equal(found, np.array(reference, np.float32))
    else:
        assert expect["summary"].items() <= outcome["answer"].items(), outcome
        errors = [
            {"row": one["row"], "code": one["code"]} for one in outcome["answer"]["errors"] or ()
        ]
        assert errors == expect.get("errors", [])
    if "stored" in expect:
        eventually(
            lambda: server.ids(fields["dataset"]) == list(range(expect["stored"])),
            f"{expect['stored']} rows are stored",
        )


def test_ranges_of_int8_vectors_are_applied(
    driver: Driver, python: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path))
    monkeypatch.setenv("FLETCHER_BACKEND", "null")
    Registry(tmp_path / "models").add_model(str(GOLDEN / "tiny"), progress=print)
    texts = [f"text {number}" for number in range(100)]
    sample = tmp_path / "sample.txt"
    sample.write_text("\n".join(texts))
    assert main(["model", "calibrate", "tiny", str(sample)]) == 0
    config = ServeConfig.from_options(home=tmp_path, model="tiny", port=0, int8="ranges")
    with Runtime(config) as server:
        case = {"call": "embed", "address": server.address, "texts": texts}
        case["command"] = {"dtype": "int8"}
        found, reference = driver.run(**case)["answer"], python.run(**case)["answer"]
    np.testing.assert_allclose(found, reference, rtol=1e-6, atol=1e-7)


def test_a_token_is_sent(driver: Driver, start_server: StartServer, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("right\n")
    case = {"call": "embed", "address": start_server("--token-file", str(tokens)).address}
    case |= {"texts": ["a"], "token": "right"}
    assert len(driver.run(**case)["answer"]) == 1
    assert driver.run(**{**case, "token": "wrong"})["error"]["code"] == "unauthenticated"


def test_answers_larger_than_a_message(driver: Driver, python: Driver, server: Server) -> None:
    # One answer takes more than 4 MiB, which most libraries refuse by default.
    texts = [f"text {number % 100}" for number in range(40_000)]
    vectors = driver.run(call="embed", address=server.address, texts=texts)["answer"]
    few = python.run(call="embed", address=server.address, texts=texts[:100])["answer"]
    assert np.array_equal(
        np.array(vectors, np.float32), np.tile(np.array(few, np.float32), (400, 1))
    )


@pytest.mark.parametrize("seed", range(int(os.environ.get("CONFORMANCE_KILLS", "1"))))
def test_an_upload_survives_kills_of_its_server(
    driver: Driver, start_server: StartServer, seed: int
) -> None:
    chance = random.Random(seed)
    server = start_server()
    case = {"rows": 3000, "batch_rows": 50, "pause_ms": 20, **RETRIES}
    upload = driver.start(call="put", address=server.address, dataset="d", **case)
    eventually(lambda: _calls(server) > 0, "the client is connected")
    for _ in range(2):
        time.sleep(chance.uniform(0.2, 1.0))
        server.end(signal.SIGKILL)
        server.start()
    upload.join(60)
    assert not upload.is_alive()
    assert upload.outcome.get("answer", {}).get("complete"), upload.outcome
    eventually(lambda: server.ids("d") == list(range(3000)), "each row is stored once")


def test_a_cancelled_upload_continues_with_other_batches(driver: Driver, server: Server) -> None:
    # The server has rows up to the middle of a batch of the second call.
    case = {"call": "put", "address": server.address, "dataset": new_dataset("d")}
    case |= {"rows": 200, "batch_rows": 9, "command": {"upload_id": "u"}}
    cancelled = driver.run(**case, pause_ms=40, cancel_ms=500)
    assert cancelled["error"]["code"] == "cancelled"
    assert driver.run(**{**case, "batch_rows": 70})["answer"]["complete"]
    eventually(lambda: server.ids(case["dataset"]) == list(range(200)), "each row is stored once")


def test_an_upload_survives_the_restart_of_its_server(
    driver: Driver, start_server: StartServer
) -> None:
    server = start_server()
    case = {"rows": 500, "batch_rows": 10, "pause_ms": 20, **RETRIES}
    upload = driver.start(call="put", address=server.address, dataset="d", **case)
    eventually(lambda: _calls(server) > 0, "the client is connected")
    time.sleep(0.4)
    server.end(signal.SIGTERM)
    server.start()
    upload.join(60)
    assert upload.outcome.get("answer", {}).get("complete"), upload.outcome
    eventually(lambda: server.ids("d") == list(range(500)), "each row is stored once")


def test_a_busy_server_is_asked_again(
    driver: Driver, python: Driver, start_server: StartServer
) -> None:
    server = start_server("--max-streams", "1")
    slow = {"rows": 30, "batch_rows": 1, "pause_ms": 50}
    holding = python.start(call="put", address=server.address, dataset="a", **slow)
    eventually(lambda: _calls(server) > 0, "a call holds the only stream")
    case = {
        "call": "put",
        "address": server.address,
        "dataset": "b",
        "rows": 3,
        "batch_rows": 3,
    }
    assert driver.run(**case)["error"]["code"] == "overloaded"
    assert driver.run(**case, **RETRIES)["answer"]["complete"]
    holding.join(60)


def _calls(server: Server) -> int:
    import fletcher

    with fletcher.connect(server.address) as client:
        return int(client.stats()["fletcher.streams.open"])


def test_a_server_that_is_gone_is_named(driver: Driver) -> None:
    outcome = driver.run(call="embed", address=f"grpc://127.0.0.1:{free_port()}", texts=["a"])
    assert outcome["error"]["code"] in ("unavailable", "store_unavailable"), outcome
