"""Server processes for tests that kill them: started, watched through /proc, always ended."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

READY = "listening on "
SERVE = "import sys; from fletcher.cli import serve_main; sys.exit(serve_main())"
FLETCHER = "import sys; from fletcher.cli import main; sys.exit(main())"


def eventually(holds: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Polls until the condition holds; fails with `what`, the missing event."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)


def is_steady(value: Callable[[], int]) -> bool:
    """Whether the number is above 0 and stays the same for a second."""
    before = value()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        if value() != before or not before:
            return False
        time.sleep(0.02)
    return True


def clean_environ(**more: str) -> dict[str, str]:
    """The environment without the caller's Fletcher options."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("FLETCHER_")}
    return {**environ, **more}


@dataclass(frozen=True)
class Place:
    """A FLETCHER_HOME with a tiny model, and a LanceDB folder."""

    home: Path
    vectors: Path
    model: str = "tiny"

    def argv(self, *options: str) -> list[str]:
        """The command `fletcher-serve` with null inference; later options override earlier."""
        given = [
            *("--home", str(self.home), "--model", self.model, "--backend", "null"),
            *("--port", "0", "--group-delay-ms", "20ms", "--max-journal", "0"),
        ]
        if "--store" not in options:
            given += ["--store", f"lance:{self.vectors}"]
        return [sys.executable, "-c", SERVE, *given, *options]


@dataclass
class ServerProcess:
    """A running server: its output lines, and its state by /proc."""

    process: subprocess.Popen[str]
    address: str = ""
    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[int]:
        """Process ids of live descendants."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child.pid for child in children if is_alive(child.pid)]

    def num_threads(self) -> int:
        return psutil.Process(self.pid).num_threads()

    def num_descriptors(self) -> int:
        return psutil.Process(self.pid).num_fds()

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.pid).memory_info().rss)

    def peak_bytes(self) -> int:
        return int(status_of(self.pid)["VmHWM"].split()[0]) * 1024

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Sends a signal and waits for the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def serving(argv: list[str], *, ready_s: float = 60.0) -> Iterator[ServerProcess]:
    """Starts a server and waits until it listens; kills it at the end if it still runs."""
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environ()
    )
    server = ServerProcess(process)
    first: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read_output() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.lines.append(line)
            first.put(line)
        first.put("")

    def read_errors() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.errors.append(line)

    readers = [threading.Thread(target=read) for read in (read_output, read_errors)]
    for reader in readers:
        reader.start()
    try:
        line = first.get(timeout=ready_s)
        assert line.startswith(READY), f"{line!r}: {''.join(server.errors)}"
        server.address = line.removeprefix(READY).split()[0]
        yield server
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join(30)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()


def status_of(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return status_of(pid)["State"][0] not in "ZX"
    except (OSError, KeyError):
        return False
