"""The proxy's configuration in deploy/: what it lets through, and what never reaches the server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.runtime import Runtime
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import command
from tests.integration.processes import eventually

CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
TOKEN = "a-token"
SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8()})

pytestmark = pytest.mark.skipif(
    NGINX is None and not os.environ.get("REQUIRE_NGINX"), reason="nginx is not installed"
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def proxy(folder: Path, upstream: int) -> Iterator[int]:
    """Run nginx with the configuration in deploy/, without TLS and on a free port."""
    assert NGINX is not None, "nginx is required here"
    port, tokens = free_port(), folder / "tokens.map"
    tokens.write_text(f'"Bearer {TOKEN}" 1;\n')
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = CONF.read_text()
    for there, here in (
        ("http {\n", f"http {{\n{temporary}"),
        ("listen 443 ssl http2;", f"listen 127.0.0.1:{port} http2;"),
        ("ssl_certificate /etc/nginx/fletcher.crt;", ""),
        ("ssl_certificate_key /etc/nginx/fletcher.key;", ""),
        ("/etc/nginx/fletcher-tokens.map", str(tokens)),
        ("127.0.0.1:8815", f"127.0.0.1:{upstream}"),
    ):
        assert there in text
        text = text.replace(there, here)
    conf = folder / "nginx.conf"
    conf.write_text(f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\n{text}")
    argv = [NGINX, "-p", str(folder), "-c", str(conf), "-e", str(folder / "error.log")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        try:
            eventually(lambda: process.poll() is not None or listens(port), "nginx listens")
            assert process.poll() is None, process.communicate()[1]
            yield port
        finally:
            process.terminate()
            process.wait(30)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def options(token: str | None) -> flight.FlightCallOptions:
    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    return flight.FlightCallOptions(timeout=60, headers=headers)


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(TOKEN)
    return start_server(token_file=tokens)


def test_calls_with_a_token_pass(server: Runtime, tmp_path: Path) -> None:
    upstream = int(server.address.rpartition(":")[2])
    with (
        proxy(tmp_path, upstream) as port,
        flight.connect(f"grpc://127.0.0.1:{port}") as client,
    ):
        body = json.dumps({"texts": ["a"]}).encode()
        (answer,) = client.do_action(flight.Action("embed", body), options(TOKEN))
        assert len(json.loads(answer.body.to_pybytes())["embeddings"]) == 1
        batch = pa.record_batch({"id": [1, 2], "text": ["a", "b"]}, SCHEMA)
        # Answers come while the stream is open, in both directions.
        writer, reader = client.do_put(command(dataset="d"), SCHEMA, options(TOKEN))
        for number in (1, 2):
            writer.write_batch(batch)
            assert json.loads(reader.read().to_pybytes())["rows_durable"] == 2 * number
        writer.close()
        exchanging, vectors = client.do_exchange(command(), options(TOKEN))
        exchanging.begin(SCHEMA)
        for _ in range(2):
            exchanging.write_batch(batch)
            assert vectors.read_chunk().data.num_rows == 2
        exchanging.close()
        # An error keeps its class and code.
        with pytest.raises(flight.FlightInternalError) as caught:
            list(client.do_action(flight.Action("nonsense", b""), options(TOKEN)))
        assert json.loads(caught.value.extra_info)["code"] == "invalid_command"


class Upstream:
    """A server that only counts connections."""

    def __init__(self) -> None:
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._listener.accept()[0].close()
                self.num_connections += 1

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


@pytest.mark.parametrize("token", [None, "another"])
def test_calls_without_a_known_token_do_not_reach_the_server(
    upstream: Upstream, tmp_path: Path, token: str | None
) -> None:
    with (
        proxy(tmp_path, upstream.port) as port,
        flight.connect(f"grpc://127.0.0.1:{port}") as client,
    ):
        with pytest.raises(flight.FlightUnauthenticatedError, match="no known token"):
            list(client.do_action(flight.Action("health", bytes(1 << 20)), options(token)))
        # The refusal may arrive while the schema is written, or later.
        with pytest.raises((flight.FlightError, pa.ArrowException, OSError)):
            client.do_put(command(dataset="d"), SCHEMA, options(token))[0].close()
    assert upstream.num_connections == 0


def test_other_failures_are_told_in_grpcs_way(upstream: Upstream, tmp_path: Path) -> None:
    with (
        proxy(tmp_path, upstream.port) as port,
        flight.connect(f"grpc://127.0.0.1:{port}") as client,
        pytest.raises(flight.FlightUnavailableError, match="does not answer"),
    ):
        list(client.do_action(flight.Action("health", b""), options(TOKEN)))
    assert upstream.num_connections > 0


def header(name: str, value: str) -> bytes:
    """A header field without compression (RFC 7541, 6.2.2); both texts under 127 bytes."""
    return b"\0" + b"".join(bytes([len(one)]) + one.encode() for one in (name, value))


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def http2(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 30)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    return connection


def call(**more: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/arrow.flight.protocol.FlightService/DoAction",
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return b"".join(header(*field) for field in fields.items())


def test_compressed_messages_do_not_reach_the_server(upstream: Upstream, tmp_path: Path) -> None:
    with proxy(tmp_path, upstream.port) as port, http2(port) as connection:
        headers = call(authorization=f"Bearer {TOKEN}", grpc_encoding="gzip")
        connection.sendall(frame(1, 5, 1, headers))
        received = b""
        while b"compressed message" not in received:  # the text, unless nginx compresses it
            part = connection.recv(1 << 16)
            received += part
            if not part or frame_ends(received):
                break
    assert upstream.num_connections == 0


def frame_ends(received: bytes) -> bool:
    """Whether a frame of stream 1 ends the stream."""
    while len(received) >= 9:
        size = int.from_bytes(received[:3], "big")
        flags, stream = received[4], int.from_bytes(received[5:9], "big")
        if stream == 1 and flags & 1:
            return True
        received = received[9 + size :]
    return False


def test_calls_that_are_begun_and_reset_do_not_reach_the_server(
    upstream: Upstream, tmp_path: Path
) -> None:
    with proxy(tmp_path, upstream.port) as port:
        with http2(port) as connection, suppress(OSError):
            for number in range(5000):
                stream = 2 * number + 1
                reset = frame(3, 0, stream, struct.pack(">I", 8))
                connection.sendall(frame(1, 4, stream, call()) + reset)
        with (
            flight.connect(f"grpc://127.0.0.1:{port}") as client,
            pytest.raises(flight.FlightUnauthenticatedError),
        ):
            list(client.do_action(flight.Action("health", b""), options(None)))
    assert upstream.num_connections == 0
