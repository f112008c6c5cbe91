"""A TCP proxy that counts what passes, and may be slow."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """In front of a port of this machine, from `with` to its end.

    Args:
        port: Where to.
        bytes_per_s: Each way at most; None: no limit.

    Attributes:
        port: Where it listens.
        up: Bytes that went to the server.
        down: Bytes that came back.
    """

    def __init__(self, port: int, *, bytes_per_s: float | None = None) -> None:
        self.up = self.down = 0
        self._target = port
        self._bytes_per_s = bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, work, *arguments) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [near, far]
                self._start(self._pump, near, far, "up")
                self._start(self._pump, far, near, "down")

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                if self._bytes_per_s is not None:
                    time.sleep(len(data) / self._bytes_per_s)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
