"""Worker process: answers requests until its pipe closes.

Two mechanisms end the process when its parent dies: the kernel kills it (PR_SET_PDEATHSIG), and the
closed pipe ends its reading loop. The process ignores SIGINT and SIGTERM, which are often sent to a
whole process group or control group. The front process needs its workers until it has drained.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, Protocol

from fletcher.errors import FletcherError, InternalError
from fletcher.workers.messages import Failure, Ready, Response, WorkerSpec, encode, receive, send
from fletcher.workers.request_queue import RequestQueue

_PR_SET_PDEATHSIG = 1


class Worker(Protocol):
    """Object that does the work of a worker process; made by `WorkerSpec.factory`.

    Attributes:
        concurrency: Number of threads that may call `run` at the same time.
        urgent_concurrency: Number of further threads that may call `run` for urgent work, which
            then need not wait for the end of another run.
    """

    concurrency: int
    urgent_concurrency: int

    def run(self, payload: Any) -> Any:
        """Answers one request."""

    def describe(self) -> dict[str, str]:
        """Facts about the loaded worker, for logs and statistics."""


def main(argv: list[str]) -> None:
    """Runs the worker behind an inherited socket: `child.py FD PARENT_PID`."""
    descriptor, parent = int(argv[0]), int(argv[1])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):  # the parent died or closed the pipe
        serve(connection)
    # Exits without cleaning up: engines may have native threads, which need no orderly end.
    os._exit(0)


def serve(connection: Connection) -> None:
    """Builds the worker and answers requests. Raises EOFError when the pipe closes."""
    spec: WorkerSpec = receive(connection)
    try:
        module, _, function = spec.factory.partition(":")
        worker: Worker = getattr(importlib.import_module(module), function)(spec.config)
        ready = Ready(worker.concurrency, worker.urgent_concurrency, worker.describe())
    except Exception as error:  # noqa: BLE001 - the parent needs to know, whatever it is
        send(connection, encode(_failure(-1, error)))
        return
    send(connection, encode(ready))

    sending = threading.Lock()
    requests = RequestQueue(worker.concurrency)  # the parent limits their number

    def answer_request() -> None:
        request = requests.take_request()
        try:
            started = time.perf_counter()
            answer = worker.run(request.payload)
            seconds = time.perf_counter() - started
            message = encode(Response(request.job_id, answer, seconds))
        except BaseException as error:  # noqa: BLE001 - also a panic of a Rust library
            message = encode(_failure(request.job_id, error))
        requests.finish_request(request)
        with sending:
            send(connection, message)

    def work() -> None:
        try:
            while True:
                answer_request()
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:  # the front process would wait for the answer; now it starts another worker
            os._exit(1)

    for _ in range(worker.concurrency + worker.urgent_concurrency):
        threading.Thread(target=work, daemon=True).start()
    while True:
        requests.add_request(receive(connection))


def _failure(job_id: int, error: BaseException) -> Failure:
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, FletcherError):
        error = InternalError(
            f"{type(error).__name__} in a worker process; its log has the details"
        )
    return Failure(job_id, error, trace)


def _die_with(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
