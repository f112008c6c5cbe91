"""Sockets of clients, found by their address."""

from __future__ import annotations

import os
import socket

import pytest

from fletcher.net.connections import ServerConnections, parse_peer


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("ipv4:10.0.0.1:5000", ("10.0.0.1", 5000)),
        ("ipv6:%5B::1%5D:5000", ("::1", 5000)),
        ("ipv6:[::ffff:127.0.0.1]:80", ("127.0.0.1", 80)),
        ("ipv6:%5Bfe80::1%25eth0%5D:80", ("fe80::1", 80)),
        ("unix:/tmp/socket", None),
        ("", None),
    ],
)
def test_names_of_peers(text: str, peer: tuple[str, int] | None) -> None:
    assert parse_peer(text) == peer


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_connection_of_one_client_ends_and_no_other(family: int) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        ends = []
        for _ in range(2):
            client = socket.create_connection((host, port))
            ends.append((client, listener.accept()[0]))
        (first, accepted), (second, other) = ends
        peer = (host, first.getsockname()[1])
        num_open = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only their number
        connections = ServerConnections(port)
        connections.keep_alive({peer})
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert other.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        connections.shut_down({peer, (host, 1)})
        assert first.recv(1) == b""
        assert accepted.recv(1) == b""
        other.send(b"x")
        assert second.recv(1) == b"x"
        assert len(os.listdir("/proc/self/fd")) == num_open  # noqa: PTH208
        for one in (*ends[0], *ends[1]):
            one.close()
