"""Sockets of a server's clients: found by address, kept alive, and shut down.

gRPC offers no way to do either on a server. The sockets are found in /proc/self/fd.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import unquote

Peer = tuple[str, int]  # address and port of a client

# A client that answers nothing is given up after 30 + 3 * 10 seconds.
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


def parse_peer(text: str) -> Peer | None:
    """Parse a client's name in gRPC, as `ipv4:127.0.0.1:80`; None for other kinds."""
    kind, _, rest = text.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return _plain(host.strip("[]")), int(port)


class ServerConnections:
    """Sockets that accepted connections on one port. Thread-safe.

    Attributes:
        port: The server's port; 0 until it is known.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port

    def keep_alive(self, peers: Collection[Peer]) -> None:
        """Let the kernel end the connections of clients whose machine answers no more."""

        def set_options(connection: socket.socket) -> None:
            for level, name, value in _KEEP_ALIVE:
                connection.setsockopt(level, name, value)

        self._for_each(peers, set_options)

    def shut_down(self, peers: Collection[Peer]) -> None:
        """End the connections of clients, with all calls on them."""
        self._for_each(peers, lambda connection: connection.shutdown(socket.SHUT_RDWR))

    def _for_each(self, peers: Collection[Peer], work: Callable[[socket.socket], None]) -> None:
        """Call `work` with the socket of each client; skip sockets that have just ended."""
        if not peers or not self.port:
            return
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                # A copy: the descriptor may be closed, and its number reused, at any time.
                copy = os.dup(int(entry.name))
                try:
                    if stat.S_ISSOCK(os.fstat(copy).st_mode):
                        self._call_if_peer(copy, peers, work)
                finally:
                    os.close(copy)

    def _call_if_peer(
        self, descriptor: int, peers: Collection[Peer], work: Callable[[socket.socket], None]
    ) -> None:
        connection = socket.socket(fileno=descriptor)
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                host, port = connection.getpeername()[:2]
                if connection.getsockname()[1] == self.port and (_plain(host), port) in peers:
                    work(connection)
        finally:
            connection.detach()


def _plain(host: str) -> str:
    """An address in one form: IPv4 addresses in IPv6 form become IPv4."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
