"""One text a request over an open DoExchange: one after the other, or at random times.

Plain pyarrow: the Client has threads, whose switches are no part of the server's time.
"""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from benchmarks.jobs import JobError
from fletcher import EmbedCommand

WARM_UP_REQUESTS = 20
_ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class LoadWindow:
    """Measurements of some seconds of bulk load.

    Attributes:
        seconds: How long it was.
        bulk_tokens: That the bulk load had computed in it.
        busy: Share of the time that the devices computed, by their counters.
        ms: Of each request, from when it was due until its vector was read; none were sent where
            empty.
    """

    seconds: float
    bulk_tokens: float
    busy: float
    ms: list[float]

    @property
    def bulk_rate(self) -> float:
        """The bulk load's tokens a second."""
        return self.bulk_tokens / self.seconds


def one_by_one(address: str, texts: list[str], num_requests: int) -> list[float]:
    """Milliseconds from writing one text to reading its vector, one after the other."""
    times = []
    with _exchange(address) as (writer, reader):
        for batch in itertools.islice(_batches(texts), WARM_UP_REQUESTS + num_requests):
            started = time.perf_counter()
            writer.write_batch(batch)
            _tokens_of(reader.read_chunk().data)
            times.append((time.perf_counter() - started) * 1000)
    return times[WARM_UP_REQUESTS:]


def alone(address: str, seconds: float) -> LoadWindow:
    """Measures the bulk load alone."""
    with flight.connect(address) as client:
        before, started = _devices(client), time.perf_counter()
        time.sleep(seconds)
        return _window(client, before, started)


def beside(
    address: str, texts: list[str], seconds: float, per_second: float, rng: np.random.Generator
) -> LoadWindow:
    """Measures requests beside the bulk load, one at a random moment of each interval."""
    num_requests = max(1, round(seconds * per_second))
    due_s = (np.arange(num_requests) + rng.random(num_requests)) / per_second
    batches = list(itertools.islice(_batches(texts), num_requests))
    with flight.connect(address) as client, _exchange(address) as (writer, reader):
        for batch in batches[:WARM_UP_REQUESTS]:
            writer.write_batch(batch)
            _tokens_of(reader.read_chunk().data)
        answers: queue.Queue[tuple[float, int] | Exception] = queue.Queue()

        def read() -> None:
            try:
                for _ in batches:
                    num_tokens = _tokens_of(reader.read_chunk().data)
                    answers.put((time.perf_counter(), num_tokens))
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                answers.put(error)

        before, started = _devices(client), time.perf_counter()
        threading.Thread(target=read, daemon=True).start()
        for due, batch in zip(due_s.tolist(), batches, strict=True):
            time.sleep(max(0.0, started + due - time.perf_counter()))
            writer.write_batch(batch)
        times, own_tokens = [], 0
        for due in due_s.tolist():
            answer = answers.get(timeout=_ANSWER_TIMEOUT_S)
            if isinstance(answer, Exception):
                raise answer
            times.append((answer[0] - started - due) * 1000)
            own_tokens += answer[1]
        return _window(client, before, started, own_tokens, times)


def busy_load(address: str) -> float:
    """Share of the load's time that devices computed, as the server reports; the least."""
    with flight.connect(address) as client:
        return float(min(one["busy_load"] for one in _stats(client)["replicas"]))


def _window(
    client: flight.FlightClient,
    before: tuple[float, float],
    started: float,
    own_tokens: int = 0,
    times: Sequence[float] = (),
) -> LoadWindow:
    """Makes the window from counters at its start and now."""
    tokens, busy_s = _devices(client)
    elapsed = time.perf_counter() - started
    runs = sum(one["concurrency"] for one in _stats(client)["replicas"])
    busy = (busy_s - before[1]) / (elapsed * runs)
    return LoadWindow(elapsed, tokens - before[0] - own_tokens, busy, list(times))


@contextmanager
def _exchange(address: str) -> Iterator[tuple[Any, Any]]:
    command = EmbedCommand(priority="interactive", dtype="float32").to_json()
    with flight.connect(address) as client:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command))
        writer.begin(pa.schema([("text", pa.utf8())]))
        yield writer, reader
        writer.done_writing()
        writer.close()


def _batches(texts: list[str]) -> Iterator[pa.RecordBatch]:
    return itertools.cycle(
        [pa.record_batch({"text": pa.array([text], pa.utf8())}) for text in texts]
    )


def _tokens_of(answer: pa.RecordBatch | None) -> int:
    if answer is None or answer.column("vector").null_count:
        raise JobError("the server answered without a vector")
    return int(answer.column("token_count")[0].as_py())


def _devices(client: flight.FlightClient) -> tuple[float, float]:
    """Tokens that devices have computed so far, and the seconds it took."""
    stats = _stats(client)
    return sum(stats["fletcher.device.tokens"].values()), sum(
        stats["fletcher.device.busy"].values()
    )


def _stats(client: flight.FlightClient) -> dict[str, Any]:
    (answer,) = client.do_action(flight.Action("stats", b""))
    return dict(json.loads(answer.body.to_pybytes()))
