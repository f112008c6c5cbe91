"""Fletcher's worker pools alone: payloads in, answers dropped."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.bare import Timing
from benchmarks.hardware import cpu_seconds
from benchmarks.jobs import JobError
from fletcher.core.batches import TextBatch
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tokenization.tokenizer import Tokenizer
from fletcher.workers.jobs import Job
from fletcher.workers.messages import WorkerSpec
from fletcher.workers.pool import WorkerPool
from fletcher.workers.roster import PoolConfig


class _Jobs:
    """Job source with a fixed list of jobs."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def put(self, job: Job) -> None:
        self._queue.put(job)

    def schedule(self, *, urgent: bool, timeout_s: float = 0.0) -> Job | None:
        if urgent:
            return None
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        job.task(result, error)


def through_pool(specs: Sequence[WorkerSpec], payloads: Sequence[Any]) -> Timing:
    """Runs all payloads through workers twice, and times the second round.

    Returns:
        Seconds; CPU seconds of the workers and of this process, which feeds them.

    Raises:
        JobError: A job failed.
        FletcherError: A worker could not load.
    """
    source = _Jobs()
    pool = WorkerPool(PoolConfig("benchmark", specs), source)
    pool.start()
    try:
        _do_all(source, payloads)
        workers = pool.process_ids()
        started, cpu_started = time.perf_counter(), time.process_time() + cpu_seconds(workers)
        _do_all(source, payloads)
        seconds = time.perf_counter() - started
        return Timing(seconds, time.process_time() + cpu_seconds(workers) - cpu_started)
    finally:
        pool.close()


def _do_all(source: _Jobs, payloads: Sequence[Any]) -> None:
    errors: list[Exception] = []
    left = threading.Semaphore(0)

    def done(_: Any, error: Exception | None) -> None:
        if error is not None:
            errors.append(error)
        left.release()

    for payload in payloads:
        source.put(Job(payload, task=done))
    for _ in payloads:
        left.acquire()
    if errors:
        raise JobError(f"a worker failed: {errors[0]}")


@dataclass(frozen=True)
class Held:
    """Data that a tokenizer process has from its start.

    Attributes:
        bundle: The model's folder.
        texts: Texts; `run` names one by its place.
    """

    bundle: str
    texts: tuple[TextBatch, ...]


class HoldingTokenizer:
    """Tokenizer process with its texts in memory, which returns no tokens."""

    concurrency = 1
    urgent_concurrency = 0

    def __init__(self, held: Held) -> None:
        self._tokenizer = Tokenizer.from_bundle(Path(held.bundle))
        self._texts = held.texts

    def run(self, place: int) -> int:
        """Tokenizes the texts at a place; returns the number of tokens."""
        return len(self._tokenizer.encode(self._texts[place]).input_ids)

    def describe(self) -> dict[str, str]:
        """Returns an empty description."""
        return {}


class HoldingLibrary:
    """The tokenizers library in one thread, on texts in memory."""

    concurrency = 1
    urgent_concurrency = 0

    def __init__(self, held: Held) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        bundle = ModelBundle.from_folder(Path(held.bundle))
        self._tokenizer = tokenizers.Tokenizer.from_file(str(bundle.tokenizer))
        self._tokenizer.enable_truncation(bundle.max_length)
        self._tokenizer.no_padding()
        self._texts = [_strings(texts) for texts in held.texts]

    def run(self, place: int) -> int:
        """Tokenizes the texts at a place; returns the number of tokens."""
        return sum(len(one.ids) for one in self._tokenizer.encode_batch_fast(self._texts[place]))

    def describe(self) -> dict[str, str]:
        """Returns an empty description."""
        return {}


def hold_library(held: Held) -> HoldingLibrary:
    """Factory named by a worker's spec."""
    return HoldingLibrary(held)


def _strings(texts: TextBatch) -> list[str]:
    view = memoryview(texts.data)
    return [str(view[first:last], "utf-8") for first, last in pairwise(texts.offsets.tolist())]


def hold(held: Held) -> HoldingTokenizer:
    """Factory named by a worker's spec."""
    return HoldingTokenizer(held)
