"""A TCP proxy that counts, and breaks or delays connections on request."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Any


class Proxy:
    """Forwards to a port of this machine; `up` and `answering` are switches.

    Attributes:
        up: Else connections are closed as soon as they come.
        answering: Else what the server says is swallowed.
        sent: Bytes that came from clients.
        received: Bytes that came back.

    Args:
        port: Where to.
        bytes_per_s: Each way at most; None: no limit.
    """

    def __init__(self, port: int, *, bytes_per_s: float = math.inf) -> None:
        self.up = True
        self.sent = self.received = 0
        self._bytes_per_s = bytes_per_s
        self.answering = True
        self._to = port
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.up = False
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        """Breaks all connections."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self.up:
                client.close()
                continue
            self._start(self._forward, client)

    def _forward(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._to))
        except OSError:  # the server is away
            client.close()
            return
        with client, server:
            both = {client, server}
            with self._lock:
                if not self.up:  # `cut` came between the accepted connection and its record
                    return
                self._sockets |= both
            back = self._start(self._pump, server, client, True)
            self._pump(client, server, False)
            back.join()
            with self._lock:
                self._sockets -= both

    def _pump(self, source: socket.socket, target: socket.socket, answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answer:
                    self.received += len(data)
                else:
                    self.sent += len(data)
                time.sleep(len(data) / self._bytes_per_s)
                if self.answering or not answer:
                    target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _start(self, run: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread
