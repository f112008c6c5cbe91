"""What crosses the pipe between the front process and a worker process.

Messages are frozen dataclasses, pickled with protocol 5: both ends are the same program on the same
machine. Large NumPy arrays are written from where they lie, and read to where they stay.
"""

from __future__ import annotations

import os
import pickle
import struct
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

_SIZE = struct.Struct("<Q")
# Smaller arrays are cheaper to copy than to read by themselves.
_MIN_ASIDE_BYTES = 16 << 10


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


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message as it crosses the pipe: a pickle, and behind it arrays that it only refers to."""

    head: bytes
    arrays: list[memoryview]


def encode(message: Any) -> Encoded:
    """A message for `send`; its large arrays must not change before that."""
    arrays: list[memoryview] = []

    def aside(buffer: pickle.PickleBuffer) -> bool:
        """Whether an array goes with the pickle: it is copied once more there, and read at once."""
        raw = buffer.raw()
        if raw.nbytes < _MIN_ASIDE_BYTES:
            return True
        arrays.append(raw)
        return False

    pickled = pickle.dumps(message, protocol=5, buffer_callback=aside)
    sizes = struct.pack(f"<{1 + len(arrays)}Q", len(arrays), *(one.nbytes for one in arrays))
    return Encoded(sizes + pickled, arrays)


def send(connection: Connection, message: Encoded) -> None:
    """Sends one message; the caller serialises senders. Raises OSError when the peer is gone."""
    connection.send_bytes(message.head)
    for array in message.arrays:
        left = array
        while left:
            left = left[os.write(connection.fileno(), left) :]


def receive(connection: Connection) -> Any:
    """Receives one message. Raises EOFError or OSError when the peer is gone."""
    head = memoryview(connection.recv_bytes())
    (num_arrays,) = _SIZE.unpack_from(head)
    sizes = struct.unpack_from(f"<{num_arrays}Q", head, _SIZE.size)
    arrays = [_read(connection, size) for size in sizes]
    return pickle.loads(head[_SIZE.size * (1 + num_arrays) :], buffers=arrays)  # noqa: S301 - our own


def _read(connection: Connection, size: int) -> memoryview:
    array = np.empty(size, np.uint8).data
    num_read = 0
    while num_read < size:
        num_new = os.readv(connection.fileno(), [array[num_read:]])
        if num_new == 0:
            raise EOFError
        num_read += num_new
    return array
