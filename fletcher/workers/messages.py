"""What crosses the pipe between the front process and a worker process.

Messages are frozen dataclasses, pickled with protocol 5: both ends are the same program on the same
machine, and NumPy arrays then cost one copy.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to make a worker.

    Attributes:
        name: For logs and metrics, such as `tokenizer-0` or `cpu-0`.
        factory: `package.module:function`; called as `function(config)` in the worker process, it
            returns the Worker.
        config: A picklable frozen dataclass for the factory.
    """

    name: str
    factory: str
    config: Any


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker is loaded and warm; `concurrency` requests may run in it at once.

    `express` more may, of urgent ones.
    """

    concurrency: int
    express: int
    description: dict[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    job_id: int
    payload: Any
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """A job is done; it took the worker so many seconds."""

    job_id: int
    payload: Any
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A job failed (or, with job_id -1, the start): the error, and a traceback for the log."""

    job_id: int
    error: Exception
    traceback: str


def encode(message: Any) -> bytes:
    """A message for `Connection.send_bytes`; the caller serialises senders."""
    return pickle.dumps(message, protocol=5)


def receive(connection: Connection) -> Any:
    """Receives one message. Raises EOFError or OSError when the peer is gone."""
    return pickle.loads(connection.recv_bytes())  # noqa: S301 - the peer is our own process
