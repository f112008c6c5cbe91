"""Compressed both ways and into a store: the same rows arrive, in fewer bytes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

import fletcher
from fletcher.core.command import EmbedCommand
from fletcher.net import compression
from fletcher.runtime import Runtime
from fletcher.storeserver.server import StoreServer
from tests.doubles.longbow import LongbowDouble
from tests.doubles.proxy import Proxy
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import exchange
from tests.integration.numbered import SCHEMA, rows

NUM_ROWS = 300
names = (f"compressed-{n}" for n in itertools.count())


def long_rows() -> pa.RecordBatch:
    """Texts of some 2 kB in the letters that English has."""
    batch = rows(0, NUM_ROWS)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), 5)) for _ in range(500)]
    texts = [" ".join(rng.choice(words, 330)) for _ in range(NUM_ROWS)]
    return pa.record_batch({"id": batch.column("id"), "text": texts}, SCHEMA)


def uri(proxy: Proxy) -> str:
    return f"grpc://127.0.0.1:{proxy.port}"


def port(server: Runtime) -> int:
    return int(server.address.rpartition(":")[2])


@pytest.fixture
def proxy(server: Runtime) -> Iterator[Proxy]:
    with Proxy(port(server)) as one:
        yield one


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_the_client_compresses_uploads(server: Runtime, proxy: Proxy, codec: str) -> None:
    data, name = long_rows(), next(names)
    with fletcher.connect(uri(proxy), compression=codec) as client:
        assert client.put(data, name).complete
    assert (proxy.sent < data.nbytes * 3 // 4) == (codec != "none")
    stored = server.service.delivery.stores["default"].scan(name).read_all().sort_by("id")
    assert stored.column("text").to_pylist() == data.column("text").to_pylist()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_the_server_compresses_answers_for_any_client_that_can_read_them(
    server: Runtime, start_server: StartServer, codec: str
) -> None:
    data = long_rows()
    plain = start_server(compression="none")
    packed = start_server(compression=codec)
    sizes, answers = [], []
    for one, accepted in ((plain, [codec]), (packed, [codec]), (packed, [])):
        how = {"include_text": True, "accept_compression": accepted}
        with Proxy(port(one)) as proxy:
            with flight.connect(uri(proxy)) as client:  # as any client: pyarrow, no library
                ((answer, _),) = exchange(client, [data], SCHEMA, **how)
            with fletcher.connect(uri(proxy)) as client:
                assert len(client.embed(["a", "b"])) == 2
            sizes.append(proxy.received)
            answers.append(answer)
    assert sizes[1] < sizes[0] * 3 // 4
    assert abs(sizes[2] - sizes[0]) < sizes[0] // 20  # a client that names no codec
    columns = ["id", "vector", "text", "token_count"]
    assert answers[0].select(columns) == answers[1].select(columns)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("profile", ["fletcher", "longbow"])
def test_rows_reach_flight_stores_compressed(
    start_server: StartServer, tmp_path: Path, codec: str, profile: str
) -> None:
    data = long_rows()
    with LongbowDouble() as longbow:
        store = StoreServer(tmp_path, host="127.0.0.1", port=0, meta_port=0)
        target = store.address if profile == "fletcher" else longbow.address
        target, _, query = target.partition("?")
        with Proxy(int(target.rpartition(":")[2])) as proxy:
            query = query or f"meta={store.meta_port}"
            server = start_server(
                store=(f"{uri(proxy)}?{query}&profile={profile}",), store_compression=codec
            )
            with fletcher.connect(server.address) as client:
                assert client.put(data, "d").complete
            assert (proxy.sent < data.nbytes * 3 // 4) == (codec != "none")
            there = server.service.delivery.stores["default"].scan("d").read_all()
            assert there.sort_by("id").column("text").to_pylist() == data["text"].to_pylist()
            # Its calls must end before the proxy does.
            server.drain(5)
            server.close()
        store.close(5)


def test_auto_measures_a_slow_connection_and_compresses(
    server: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compression, "is_loopback", lambda _: False)
    monkeypatch.setattr(compression, "_PROBE_BYTES", 1 << 18)
    data = long_rows()
    options = EmbedCommand(include_text=False)
    with Proxy(port(server), bytes_per_s=4e6) as proxy, fletcher.connect(uri(proxy)) as client:
        with caplog.at_level(logging.INFO, "fletcher.net.compression"):
            summary = client.put(data, next(names))
            with client.exchange(data, options) as answers:
                assert sum(batch.num_rows for batch in answers) == NUM_ROWS
        probes = 2 * (1 << 18)
        assert proxy.sent - probes < 1.5 * data.nbytes, "of both calls together"
    assert summary.complete
    (message,) = [one for one in caplog.messages if uri(proxy) in one]
    assert f"compression to {uri(proxy)}: " in message
    assert ": none (" not in message
