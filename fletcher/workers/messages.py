"""Messages on the pipe between the front process and a worker process.

Messages are frozen dataclasses, pickled with protocol 5. That is possible because both ends are the
same program on the same machine. Large NumPy arrays are not copied into the pickle. They follow it
on the pipe, written directly from one array's memory and read directly into the other's. Runs of a
few rows, and their answers, are sent without pickle. Pickle takes a tenth of a millisecond at each
end to describe an array, and a search would wait for that.
"""

from __future__ import annotations

import os
import pickle
import struct
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fletcher.core.batches import InferenceResult, MicroBatch

_SIZE = struct.Struct("<Q")
# Size from which arrays follow the pickle. Smaller ones are cheaper to copy into it.
_MIN_ASIDE_BYTES = 16 << 10

# Marks that are sent instead of the number of arrays. After _RUN a small run follows, and after
# _RAN its answer, both without pickle.
_RUN, _RAN = 2**64 - 1, 2**64 - 2
# Heads consist of 8-byte fields, so the arrays after them are aligned.
# Head of a run: mark, job, urgent, layers, number of rows, number of tokens. The tokens and the
# lengths follow.
_RUN_HEAD = struct.Struct("<Qq4q")
# Head of an answer: mark, job, seconds in the worker, seconds of the device, budget, rows, columns,
# whether the answer has norms. The vectors and the norms follow.
_RAN_HEAD = struct.Struct("<Qqdd4q")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Recipe for a worker.

    Attributes:
        name: Name in logs and metrics, such as `tokenizer-0` or `cpu-0`.
        factory: Function that builds the worker, as `package.module:function`. The worker process
            calls `function(config)`, which returns a `child.Worker`.
        config: Argument of the factory, a picklable frozen dataclass.
    """

    name: str
    factory: str
    config: Any


@dataclass(frozen=True, slots=True)
class Ready:
    """Message that the worker is loaded and warm; for its fields see `child.Worker`."""

    concurrency: int
    urgent_concurrency: int
    description: dict[str, str]


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    job_id: int
    payload: Any
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """Result of a job, and its duration in the worker."""

    job_id: int
    payload: Any
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Error of a job, and a traceback for the log.

    With `job_id` -1 it is the error of the worker's start.
    """

    job_id: int
    error: Exception
    traceback: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message in wire form: its head with the pickle, and the arrays that follow it."""

    head: bytes
    arrays: list[memoryview]


def encode(message: Any) -> Encoded:
    """Encodes a message for `send`.

    Large arrays of the message must not change until it is sent.
    """
    if (short := _short(message)) is not None:
        return Encoded(short, [])
    arrays: list[memoryview] = []

    def aside(buffer: pickle.PickleBuffer) -> bool:
        """Returns whether to copy an array into the pickle, as is done with small arrays."""
        raw = buffer.raw()
        if raw.nbytes < _MIN_ASIDE_BYTES:
            return True
        arrays.append(raw)
        return False

    pickled = pickle.dumps(message, protocol=5, buffer_callback=aside)
    sizes = struct.pack(f"<{1 + len(arrays)}Q", len(arrays), *(one.nbytes for one in arrays))
    return Encoded(sizes + pickled, arrays)


def send(connection: Connection, message: Encoded) -> None:
    """Sends one message. Raises OSError if the peer is gone.

    Not thread-safe: only one thread may send at a time.
    """
    connection.send_bytes(message.head)
    for array in message.arrays:
        left = array
        while left:
            left = left[os.write(connection.fileno(), left) :]


def receive(connection: Connection) -> Any:
    """Receives one message. Raises EOFError or OSError if the peer is gone."""
    head = memoryview(connection.recv_bytes())
    (num_arrays,) = _SIZE.unpack_from(head)
    if num_arrays == _RUN:
        return _run(head)
    if num_arrays == _RAN:
        return _ran(head)
    sizes = struct.unpack_from(f"<{num_arrays}Q", head, _SIZE.size)
    arrays = [_read(connection, size) for size in sizes]
    return pickle.loads(head[_SIZE.size * (1 + num_arrays) :], buffers=arrays)  # noqa: S301 - our own


def is_answer(message: Any) -> bool:
    """Whether a message has the form of an answer to a request."""
    match message:
        case Response(job_id=int(), seconds=int() | float()):
            return True
        case Failure(job_id=int(), error=Exception(), traceback=str()):
            return True
    return False


def _short(message: Any) -> bytes | None:
    """Encodes a small run, or its answer, without pickle; None for other messages."""
    if isinstance(message, WorkerRequest) and isinstance(message.payload, MicroBatch):
        return _short_run(message, message.payload)
    if isinstance(message, Response) and isinstance(message.payload, InferenceResult):
        return _short_answer(message, message.payload)
    return None


def _short_run(request: WorkerRequest, batch: MicroBatch) -> bytes | None:
    ids, lengths = batch.input_ids, batch.lengths
    plain = batch.spans is None and not batch.half and ids.dtype == lengths.dtype == np.int32
    if not plain or ids.nbytes >= _MIN_ASIDE_BYTES:
        return None
    head = _RUN_HEAD.pack(
        _RUN, request.job_id, request.urgent, batch.layers, len(lengths), len(ids)
    )
    return head + ids.tobytes() + lengths.tobytes()


def _short_answer(response: Response, result: InferenceResult) -> bytes | None:
    vectors, norms = result.embeddings, result.norms
    if (
        result.errors
        or result.counts is not None
        or vectors.ndim != 2
        or vectors.dtype != np.float32
    ):
        return None
    if norms is not None and (norms.shape != vectors.shape[:1] or norms.dtype != np.float32):
        return None
    if vectors.nbytes >= _MIN_ASIDE_BYTES:
        return None
    head = _RAN_HEAD.pack(
        *(_RAN, response.job_id, response.seconds, result.compute_s, result.budget_tokens),
        *(*vectors.shape, norms is not None),
    )
    return head + vectors.tobytes() + (b"" if norms is None else norms.tobytes())


def _run(head: memoryview) -> WorkerRequest:
    _, job_id, urgent, layers, num_rows, num_tokens = _RUN_HEAD.unpack_from(head)
    numbers = np.frombuffer(head, np.int32, num_tokens + num_rows, _RUN_HEAD.size)
    return WorkerRequest(
        job_id, MicroBatch(numbers[:num_tokens], numbers[num_tokens:], layers), urgent
    )


def _ran(head: memoryview) -> Response:
    _, job_id, seconds, compute_s, budget, num_rows, width, normed = _RAN_HEAD.unpack_from(head)
    numbers = np.frombuffer(head, np.float32, num_rows * (width + normed), _RAN_HEAD.size)
    vectors, norms = numbers[: num_rows * width], numbers[num_rows * width :]
    result = InferenceResult(
        vectors.reshape(num_rows, width), norms if normed else None, compute_s, budget
    )
    return Response(job_id, result, seconds)


def _read(connection: Connection, size: int) -> memoryview:
    array = np.empty(size, np.uint8).data
    num_read = 0
    while num_read < size:
        num_new = os.readv(connection.fileno(), [array[num_read:]])
        if num_new == 0:
            raise EOFError
        num_read += num_new
    return array
