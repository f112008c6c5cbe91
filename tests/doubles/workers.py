"""Workers that misbehave on request; `load_*` makes them in a worker process."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from fletcher.errors import BackendError, RowTooLargeError
from fletcher.workers import child
from fletcher.workers.request_queue import RequestQueue


class EchoWorker:
    """Answers with its input; some payloads are commands."""

    def __init__(self, concurrency: int = 1, urgent_concurrency: int = 0) -> None:
        self.concurrency, self.urgent_concurrency = concurrency, urgent_concurrency

    def run(self, payload: Any) -> Any:
        match payload:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case ("die once", path):
                if not os.path.exists(path):  # noqa: PTH110
                    open(path, "w").close()  # noqa: PTH123
                    os.kill(os.getpid(), signal.SIGKILL)
                return "survived"
            case ("break once", name, path):
                if not os.path.exists(path):  # noqa: PTH110
                    open(path, "w").close()  # noqa: PTH123
                    _break(name)
                return "survived"
            case "panic":
                raise Panic
            case "refuse":
                raise RowTooLargeError("too large", field="text", allowed=["less"])
            case "break":
                raise ZeroDivisionError("a secret of the server")
            case "answer unsendable":
                return lambda: None
            case "answer unreadable":
                return Unreadable()
            case "pid":
                return os.getpid()
            case ("pause", seconds):
                time.sleep(seconds)
            case ("wait for", path):
                open(f"{path}.begun", "w").close()  # noqa: PTH123
                deadline = time.monotonic() + 30
                while not os.path.exists(path):  # noqa: PTH110
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    time.sleep(0.005)
        return payload

    def describe(self) -> dict[str, str]:
        return {"kind": "echo"}


class Panic(BaseException):
    """As a panic of a Rust library, which is no Exception."""


def _break(name: str) -> None:
    """Let a function of the worker process fail from now on."""

    def failing(*_: Any) -> Any:
        raise MemoryError

    owner = child if hasattr(child, name) else RequestQueue
    setattr(owner, name, failing)


class Unreadable:
    """Can be pickled and not unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def load_echo(concurrency: int) -> EchoWorker:
    return EchoWorker(concurrency)


def load_express(_: Any) -> EchoWorker:
    """One run at a time, and one more for urgent work."""
    return EchoWorker(1, 1)


def load_broken(message: str) -> EchoWorker:
    raise BackendError(message)


def load_dying(_: Any) -> EchoWorker:
    os._exit(7)


class PacedWorker(EchoWorker):
    """Takes the number of seconds in a file for each job."""

    def __init__(self, pace: str) -> None:
        super().__init__()
        self._pace = pace

    def run(self, payload: Any) -> Any:
        with open(self._pace) as file:  # noqa: PTH123
            time.sleep(float(file.read()))
        return payload


class StickyWorker(EchoWorker):
    """Fails every job as long as a file exists, like a device after a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self._fault = fault
        self._broken = False

    def run(self, payload: Any) -> Any:
        self._broken = self._broken or os.path.exists(self._fault)  # noqa: PTH110
        if self._broken:
            raise BackendError("an illegal memory access was encountered")
        return super().run(payload)


def load_paced(pace: str) -> PacedWorker:
    return PacedWorker(pace)


def load_sticky(fault: str) -> StickyWorker:
    return StickyWorker(fault)


def load_unless(path: str) -> EchoWorker:
    """A worker that cannot load while a file exists."""
    if os.path.exists(path):  # noqa: PTH110
        raise BackendError("no such device")
    return EchoWorker()
