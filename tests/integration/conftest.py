"""Real servers on free ports: real sockets, real worker processes, a tiny model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pyarrow import flight

import fletcher
from fletcher.config.server import ServeConfig
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.runtime import Runtime
from fletcher.storeserver.server import StoreServer
from tests.doubles.longbow import LongbowDouble

StartServer = Callable[..., Runtime]

# A stream's reserve is 64 KiB then: texts come in parts of some 2 kB, or less with small chunks.
SMALL_PARTS = {"max_memory": 64 << 20, "max_message_bytes": 32 << 20, "max_streams": 128}


@pytest.fixture(scope="session")
def tiny_home(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLETCHER_HOME with the tiny model."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").symlink_to(tiny_bundle.folder.parent)
    return home


@pytest.fixture(scope="module")
def start_server(
    tiny_home: Path, tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartServer]:
    """Starts servers, with null inference and LanceDB, and closes them at the module's end."""
    with ExitStack() as servers:

        def start(**options: Any) -> Runtime:
            folder = tmp_path_factory.mktemp("vectors")
            fields = {
                "port": 0,
                "home": tiny_home,
                "model": tiny_bundle.name,
                "backend": "null",
                "store": (f"lance:{folder}",),
                "group_delay_ms": 20,
                "drain_timeout": 5,
                "max_journal": 0,
            }
            return servers.enter_context(Runtime(ServeConfig.from_options(**{**fields, **options})))

        yield start


@pytest.fixture(scope="module")
def server(start_server: StartServer, request: pytest.FixtureRequest) -> Runtime:
    """The module's server, with its `SERVER_OPTIONS` if it has any."""
    return start_server(**getattr(request.module, "SERVER_OPTIONS", {}))


@pytest.fixture(scope="module")
def client(server: Runtime) -> Iterator[fletcher.Client]:
    """A client of the module's server."""
    with fletcher.connect(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """The module's `fletcher store`, in this process."""
    served = StoreServer(tmp_path_factory.mktemp("store"), host="127.0.0.1", port=0, meta_port=0)
    yield served
    assert served.close(10)


@pytest.fixture
def double() -> Iterator[LongbowDouble]:
    """A stand-in for Longbow."""
    with LongbowDouble() as served:
        yield served


@pytest.fixture
def data(store_server: StoreServer) -> Iterator[flight.FlightClient]:
    """A client of the data port of `store_server`."""
    with flight.connect(store_server.address) as client:
        yield client


@pytest.fixture
def meta(store_server: StoreServer) -> Iterator[flight.FlightClient]:
    """A client of the meta port of `store_server`."""
    with flight.connect(store_server.meta_address) as client:
        yield client


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The test's name, as the name of a dataset."""
    return "".join(letter if letter.isalnum() else "_" for letter in request.node.name)[:100]
