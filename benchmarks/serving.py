"""A real server in a separate process, and the memory of its processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.corpus import ROOT
from benchmarks.hardware import cpu_seconds
from benchmarks.jobs import JobError, clean_environment
from fletcher.stores.lance.library import import_lancedb

_SERVE = "import sys; from fletcher.cli import serve_main; sys.exit(serve_main())"
_STORE = "import sys; from fletcher.cli import main; sys.exit(main(['store', *sys.argv[1:]]))"
_STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Served:
    """A listening server.

    Attributes:
        address: `grpc://HOST:PORT`.
        pid: Process id of its front process.
        vectors: Folder of its LanceDB store.
    """

    address: str
    pid: int
    vectors: Path

    def count(self, dataset: str) -> int:
        """Number of rows that a reader of the store's folder sees."""
        return int(import_lancedb().connect(self.vectors).open_table(dataset).count_rows())

    def cpu_seconds(self) -> float:
        """CPU seconds of the server's processes so far."""
        return cpu_seconds([self.pid, *_children(self.pid)])

    def memory(self) -> dict[str, int]:
        """Resident bytes of the front process now and at its peak, and of its workers now."""
        status = _status(self.pid)
        children = [_status(pid).get("VmRSS", 0) for pid in _children(self.pid)]
        return {"now": status["VmRSS"], "peak": status["VmHWM"], "workers": sum(children)}


@contextmanager
def serve(
    home: Path,
    model: str,
    *options: str,
    arguments: Sequence[str] = (),
    store_process: bool = False,
    with_store: bool = True,
) -> Iterator[Served]:
    """Runs `fletcher-serve` on a free port, with an empty LanceDB store.

    Args:
        home: FLETCHER_HOME with the model.
        model: Name of the model.
        options: Flags of the benchmark.
        arguments: Flags added on the command line.
        store_process: Use a `fletcher store` over Flight.
        with_store: False: no store, vectors are only returned.

    Raises:
        JobError: The server does not start; the message is its log.
    """
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        folder = Path(scratch)
        vectors = folder / "vectors"
        store = f"lance:{vectors}" if with_store else "none"
        with contextlib.ExitStack() as stack:
            if store_process:
                argv = [_STORE, "--path", str(vectors), "--port", "0", "--meta-port", "0"]
                store = stack.enter_context(listening(argv, folder / "store-log"))[0]
            argv = [_SERVE, "--port", "0", "--home", str(home), "--model", model]
            argv += ["--store", store, "--log-level", "warning", *options, *arguments]
            address, pid = stack.enter_context(listening(argv, folder / "log"))
            yield Served(address, pid, vectors)


@contextmanager
def listening(argv: Sequence[str], log_file: Path) -> Iterator[tuple[str, int]]:
    """Runs a server's script that prints `listening on ADDRESS`; yields address and pid."""
    with log_file.open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", *argv],
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield _address(process, log_file), process.pid
        finally:
            _stop(process)


def _address(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    words = process.stdout.readline().split()
    if words[:2] != ["listening", "on"]:
        process.wait(_STOP_TIMEOUT_S)
        raise JobError(f"the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
    return words[2]


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes; empty if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith("kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}


def _children(pid: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(word) for one in threads for word in (one / "children").read_text().split()]
    except OSError:
        return []
