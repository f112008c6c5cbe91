"""Launchers of real processes, which tests kill.

Starting Python and importing everything takes a second or two. A `Forking` launcher has one process
that has imported everything, and forks it for each role. Each process has its own session, and so
have a server's workers, so that a SIGKILL hits one process alone. A `Spawning` launcher starts new
interpreters. Both play the roles of `tests.faults.roles`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.faults import callsites
from tests.integration.processes import READY, eventually

_START_S = 60.0
_PR_SET_PDEATHSIG = 1
_INJECTING = "CALL_SITES"
# LanceDB warns at every fork, which it survives.
_PYTHON = [sys.executable, "-W", "ignore:lancedb fork support", "-m"]
_ROOT = Path(__file__).resolve().parents[2]


class SiteName(NamedTuple):
    """A call site's name, the text of its call, and whether the call may have a time limit."""

    name: str
    text: str
    timed: bool


class Process:
    """A process, not necessarily a child of this one."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._lock = threading.Lock()  # several threads of a server watch a worker
        try:
            self._watch: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._watch = None

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self._watch is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._watch, number)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False if it has not ended by then."""
        watch = self._watch
        if watch is not None:
            poll = select.poll()
            poll.register(watch, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                return False
            with self._lock:
                if self._watch is not None:
                    os.close(watch)
                self._watch = None
        return True

    @property
    def alive(self) -> bool:
        return not self.wait(0)

    def kill(self) -> None:
        """Kill it and wait until it has ended."""
        self.send(signal.SIGKILL)
        assert self.wait(30), f"process {self.pid} survives a SIGKILL"

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Launcher:
    """Starts processes, and kills the remaining ones on close."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    def start(self, role: str, log: Path, **arguments: Any) -> Process:
        """Start a role; its output is appended to `log`."""
        process = Process(self._launch({"role": role, "log": str(log), **arguments}), log)
        self._started = [one for one in self._started if one.alive] + [process]
        return process

    def start_server(self, role: str, log: Path, **arguments: Any) -> Process:
        """Start a server's role, and wait until it listens."""
        log.touch()
        before = len(log.read_text(errors="replace"))
        process = self.start(role, log, **arguments)

        def listens() -> bool:
            said = process.output()[before:]
            assert process.alive, f"{role} does not start: {said}"
            return READY in said

        eventually(listens, f"{role} listens", _START_S)
        return process

    def _launch(self, request: dict[str, Any]) -> int:
        raise NotImplementedError

    def end_all(self) -> None:
        """Kill all processes that have not ended."""
        for process in self._started:
            process.send(signal.SIGCONT)
            process.kill()
        self._started = []

    def close(self) -> None:
        self.end_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Forking(Launcher):
    """Forks a process that has imported everything.

    Args:
        preload: The library `filecalls.c`. If given, single calls of a process can be made to fail:
            `start` takes `faults`, see `tests.faults.callsites`.

    Attributes:
        sites: The call sites in the processes' modules, by their numbers.
    """

    def __init__(self, preload: Path | None = None) -> None:
        super().__init__()
        self._socket, theirs = socket.socketpair()
        more = {} if preload is None else {"LD_PRELOAD": str(preload), _INJECTING: "1"}
        with theirs:
            self._process = subprocess.Popen(
                [*_PYTHON, "tests.faults.launching", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=_ROOT,
                env=_environ() | more,
                start_new_session=True,
            )
        self._replies = self._socket.makefile("r")
        self.sites = [SiteName(*one) for one in json.loads(self._replies.readline())]

    def _launch(self, request: dict[str, Any]) -> int:
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        return int(self._replies.readline())

    def close(self) -> None:
        super().close()
        self._replies.close()
        self._socket.close()
        self._process.wait(30)


class Spawning(Launcher):
    """Starts a new interpreter for each role."""

    def _launch(self, request: dict[str, Any]) -> int:
        with Path(request["log"]).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.launching", json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=_ROOT,
                env=_environ(),
                start_new_session=True,
            )
        # `Process` watches it by its number; this reaps it.
        threading.Thread(target=process.wait, daemon=True).start()
        return process.pid


def _environ() -> dict[str, str]:
    environ = {name: text for name, text in os.environ.items() if not name.startswith("FLETCHER_")}
    return {**environ, "PYTHONPATH": str(_ROOT)}


class _WorkerForks:
    """Replaces `subprocess` in a server: forks its workers from a child.

    It is forked from the main thread before there is any other, and dies with the server; the
    workers die with it.
    """

    DEVNULL = subprocess.DEVNULL

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        if os.fork() == 0:
            self._socket.close()
            _die_with_parent()
            _fork_workers(theirs)
        theirs.close()

    def Popen(self, _: Any, *, pass_fds: list[int], **__: Any) -> _Worker:
        with self._lock:
            socket.send_fds(self._socket, [b"fork"], pass_fds)
            return _Worker(int(self._socket.recv(32)))


def _fork_workers(requests: socket.socket) -> None:
    from fletcher.workers import child

    callsites.become_worker()
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 16, 1)
        if not descriptors:  # the server has ended
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child.main([str(descriptors[0]), str(os.getppid())])
        os.close(descriptors[0])
        requests.send(str(pid).encode())


class _Worker:
    """The part of Popen that the pool needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._process = Process(pid, Path(os.devnull))

    def poll(self) -> int | None:
        if not self._process.alive:
            self.returncode = -signal.SIGKILL
        return self.returncode

    def kill(self) -> None:
        self._process.send(signal.SIGKILL)

    def wait(self) -> int:
        self._process.wait(60)
        self.returncode = -signal.SIGKILL
        return self.returncode


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _fork_on_request(descriptor: int) -> None:
    import pyarrow.flight  # noqa: F401

    if _INJECTING in os.environ:
        del os.environ["LD_PRELOAD"]
        callsites.install()

    import fletcher.cli.serve
    import fletcher.cli.store
    import fletcher.inference.null
    import fletcher.runtime
    import fletcher.stores.flight.store
    import fletcher.stores.lance.store
    import fletcher.storeserver.server
    import fletcher.tokenization.worker
    import fletcher.workers.child  # noqa: F401
    from fletcher.stores.lance.library import import_lancedb
    from tests.faults import poison, roles

    import_lancedb()
    poison.install()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    requests = socket.socket(fileno=descriptor)
    names = [SiteName(str(site), site.text, site.timed) for site in callsites.sites]
    requests.sendall(json.dumps(names).encode() + b"\n")
    for line in requests.makefile("r"):
        pid = os.fork()
        if pid == 0:
            requests.detach()
            os.close(descriptor)
            _become(json.loads(line), roles)
        requests.sendall(f"{pid}\n".encode())


def _become(request: dict[str, Any], roles: Any) -> None:
    os.setsid()
    _die_with_parent()
    log = os.open(request.pop("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    code = 70
    try:
        if (faults := request.pop("faults", None)) is not None:
            callsites.attach(**faults)
        if request["role"] in ("serve", "command"):
            from fletcher.workers import worker_handle

            worker_handle.subprocess = _WorkerForks()  # type: ignore[assignment]
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        code = roles.play(**request)
    except BaseException:  # noqa: BLE001 - the end of a process
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(argument: str) -> int:
    """Run in a new interpreter: fork on request, or play a role itself."""
    if argument.isdecimal():
        _fork_on_request(int(argument))
        return 0
    from tests.faults import roles

    _die_with_parent()
    request = json.loads(argument)
    del request["log"]
    return roles.play(**request)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
