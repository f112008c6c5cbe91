"""Longbows to kill and stop: the stand-in of the tests, or a real server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import flight

from tests.doubles.longbow import LongbowDouble
from tests.faults.schedules import free_port

# A real server loses batches that it acknowledged a few milliseconds before it is killed.
_LOST_S = 0.1
_MOST_LOST = 2
_START_S = 60.0
# Time to confirm rows: longer than the stand-in may lose them, and shorter than with a Longbow.
QUICK: dict[str, Any] = {
    f"fletcher.stores.flight.{module}.CONFIRM_S": 1.5 * _LOST_S
    for module in ("running_time", "longbow_writer")
}


class LongbowServer(Protocol):
    """A Longbow on the loopback interface."""

    data_port: int
    meta_port: int

    def start(self, *, empty: bool = False) -> bool:
        """Start it again after `kill`, with its rows or `empty`; False: it does not start."""
        ...

    def kill(self) -> None:
        """Kill it; batches that it acknowledged just before may be lost."""
        ...

    def end(self) -> None:
        """End it as its user does; it loses nothing."""
        ...

    def stop(self) -> None:
        """Let it answer nothing until `go_on`."""
        ...

    def go_on(self) -> None: ...

    def table(self, dataset: str) -> pa.Table | None:
        """A dataset's rows; None if there is no dataset."""
        ...

    def close(self) -> None: ...


class DoubleServer(LongbowDouble):
    """The stand-in, which loses what it acknowledged just before it is killed."""

    def __init__(self) -> None:
        super().__init__()
        self.data_port: int = self._data.port
        self.meta_port: int = self._meta.port
        self._stored_at: list[float] = []

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        super().store(dataset, batch)
        self._stored_at.append(time.monotonic())

    def kill(self, lost: int = 0) -> None:
        recent = [one for one in self._stored_at if time.monotonic() - one < _LOST_S]
        super().kill(max(lost, min(len(recent), _MOST_LOST)))
        self._stored_at.clear()

    def end(self) -> None:
        super().kill()

    def start(self, *, empty: bool = False) -> bool:
        if empty:
            self.log.clear()
        while True:
            try:
                return self.restart()
            except pa.ArrowException:  # another program has the port for a moment
                time.sleep(0.1)

    def stop(self) -> None:
        self.stall = threading.Event()

    def go_on(self) -> None:
        if self.stall is not None:
            self.stall.set()
            self.stall = None

    def table(self, dataset: str) -> pa.Table | None:  # type: ignore[override]
        return read_table(self.data_port, dataset)

    def close(self) -> None:
        self.__exit__()


class RealServer:
    """A process of a real Longbow.

    Args:
        command: Starts it. Its settings come as variables `LONGBOW_...`.
        folder: For its files; made if missing.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.data_port, self.meta_port, metrics_port = (free_port() for _ in range(3))
        self._command = list(command)
        self._folder = folder
        self._num_folders = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._environ = os.environ | {
            "LONGBOW_LISTEN_ADDR": f"127.0.0.1:{self.data_port}",
            "LONGBOW_META_ADDR": f"127.0.0.1:{self.meta_port}",
            "LONGBOW_METRICS_ADDR": f"127.0.0.1:{metrics_port}",
            "LONGBOW_MAX_MEMORY": str(2 << 30),
            "LONGBOW_AUTO_SHARDING_ENABLED": "false",
            "GOMEMLIMIT": "2GiB",
        }
        assert self.start(), f"no Longbow starts: see {folder}/log"

    def start(self, *, empty: bool = False) -> bool:
        self._num_folders += empty
        folder = self._folder / str(self._num_folders)
        folder.mkdir(parents=True, exist_ok=True)
        environ = self._environ | {"LONGBOW_DATA_PATH": str(folder)}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=folder, env=environ, stdout=log, stderr=log
            )
        until = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                for port in (self.data_port, self.meta_port):
                    socket.create_connection(("127.0.0.1", port), 0.2).close()
                return True
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def end(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def table(self, dataset: str) -> pa.Table | None:
        return read_table(self.data_port, dataset)

    def close(self) -> None:
        self.kill()


def read_table(port: int, dataset: str) -> pa.Table | None:
    """A dataset's rows by the data port; None if there are none."""
    with flight.connect(f"grpc://127.0.0.1:{port}") as client:
        ticket = flight.Ticket(json.dumps({"name": dataset}).encode())
        try:
            return client.do_get(ticket, flight.FlightCallOptions(timeout=60)).read_all()
        except KeyError:
            return None
        except flight.FlightInternalError as error:
            if "never sent a data message" in str(error):
                return None
            raise


def starter(command: Sequence[str] | None) -> Callable[[Path], LongbowServer]:
    """Starts a Longbow with files in a folder: by a command, or the stand-in."""
    if command is None:
        return lambda _: DoubleServer()
    return lambda folder: RealServer(command, folder)
