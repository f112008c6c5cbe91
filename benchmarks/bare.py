"""One engine alone on ready tokens, measured in a separate process.

    python -m benchmarks.bare JOB

The job (JSON) has `config` (the fields of BackendConfig), `loader` (the backend's function to load
it with; `load` if absent), `tokens` (a .npz file of `input_ids` and `offsets`), `result`, and
either `embeddings` (a .npy file to write: measures throughput) or `requests` (measures so many runs
of one text each, one after the other and with pauses).
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import MicroBatch
from fletcher.errors import BackendError
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.inference.graph_io import LENGTH_GRID
from fletcher.pipeline.planner import plan

# Plans as the server does, but all texts at once.
MAX_BATCH_ROWS = 1024
# About the time that a request to an idle server spends outside the engine. Caches cool meanwhile.
PAUSE_S = 0.002


@dataclass(frozen=True)
class Timing:
    """Duration: `seconds` by the clock, `cpu_seconds` of all threads together."""

    seconds: float
    cpu_seconds: float


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = BackendConfig(**job["config"])
    try:
        engine = importlib.import_module(f"fletcher.inference.{config.backend}")
        backend = getattr(engine, job.get("loader", "load"))(config)
    except BackendError as error:
        answer: dict[str, Any] = {"skipped": error.message}
    else:
        tokens = np.load(job["tokens"])
        input_ids, offsets = tokens["input_ids"], tokens["offsets"]
        if "requests" in job:
            answer = {
                name: latencies(backend, input_ids, offsets, job["requests"], pause_s)
                for name, pause_s in (("ms", 0.0), ("paced_ms", PAUSE_S))
            }
        else:
            row_sets, batches = planned(
                input_ids,
                offsets,
                max_batch_tokens=config.max_batch_tokens,
                num_runners=backend.concurrency,
            )
            timing, embeddings = embed_all(backend, row_sets, batches)
            answer = {
                **asdict(timing),
                "shapes": [[len(one.lengths), _padded_length(one)] for one in batches],
            }
            np.save(job["embeddings"], embeddings)
        answer["engine"] = backend.describe()
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def planned(
    input_ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    *,
    max_batch_tokens: int,
    num_runners: int,
) -> tuple[list[npt.NDArray[np.intp]], list[MicroBatch]]:
    """Micro-batches of all texts, and the texts in each."""
    row_sets = plan(
        np.diff(offsets).astype(np.int32),
        max_batch_tokens=max_batch_tokens,
        max_batch_rows=MAX_BATCH_ROWS,
        num_runners=num_runners,
    )
    return row_sets, [_micro_batch(input_ids, offsets, rows) for rows in row_sets]


def embed_all(
    backend: Backend, row_sets: list[npt.NDArray[np.intp]], batches: list[MicroBatch]
) -> tuple[Timing, npt.NDArray[np.float32]]:
    """Runs micro-batches from as many threads as the backend takes.

    Returns:
        Seconds; float32 [num_texts, dim].
    """
    results: list[npt.NDArray[np.float32] | None] = [None] * len(batches)

    def work(place: int) -> None:
        results[place] = backend.run(batches[place]).embeddings

    # Engines compile a kernel at the first run of a length, and make a request for each thread.
    every_length = {_padded_length(one): one for one in batches}

    def warm_up() -> None:
        for batch in every_length.values():
            backend.run(batch)

    timing = run_all(len(batches), work, num_threads=backend.concurrency, warm_up=warm_up)
    first = results[0]
    assert first is not None
    embeddings = np.empty((sum(map(len, row_sets)), first.shape[1]), dtype=np.float32)
    for rows, result in zip(row_sets, results, strict=True):
        embeddings[rows] = result
    return timing, embeddings


def run_all(
    num_jobs: int, work: Callable[[int], None], *, num_threads: int, warm_up: Callable[[], None]
) -> Timing:
    """Runs jobs 0 to `num_jobs` - 1; each thread takes the next one.

    Args:
        num_jobs: Number of jobs.
        work: Runs one job.
        num_threads: Threads at the same time.
        warm_up: Called once in each thread; not timed.
    """
    taking = threading.Lock()
    places = iter(range(num_jobs))

    def take_and_work() -> None:
        while True:
            with taking:
                place = next(places, None)
            if place is None:
                return
            work(place)

    all_there = threading.Barrier(num_threads)

    def warm() -> None:
        all_there.wait()  # so that no thread warms up twice and another not at all
        warm_up()

    with ThreadPoolExecutor(num_threads) as pool:
        for step in (warm, take_and_work):
            started, cpu_started = time.perf_counter(), time.process_time()
            for one in [pool.submit(step) for _ in range(num_threads)]:
                one.result()
        return Timing(time.perf_counter() - started, time.process_time() - cpu_started)


def latencies(
    backend: Backend,
    input_ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    num_requests: int,
    pause_s: float,
) -> list[float]:
    """Milliseconds of runs of one text each, with a pause before each or one after the other."""
    batches = [
        MicroBatch(input_ids[first:last], np.array([last - first], dtype=np.int32))
        for first, last in itertools.pairwise(offsets.tolist())
    ]
    for batch in batches:  # every shape once
        backend.run(batch)
    times = []
    for batch in itertools.islice(itertools.cycle(batches), num_requests):
        if pause_s:
            time.sleep(pause_s)
        started = time.perf_counter()
        backend.run(batch)
        times.append((time.perf_counter() - started) * 1000)
    return times


def _padded_length(batch: MicroBatch) -> int:
    return -(-int(batch.lengths.max()) // LENGTH_GRID) * LENGTH_GRID


def _micro_batch(
    input_ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.intp]
) -> MicroBatch:
    parts = [input_ids[offsets[row] : offsets[row + 1]] for row in rows]
    lengths = (offsets[rows + 1] - offsets[rows]).astype(np.int32)
    return MicroBatch(np.concatenate(parts), lengths)


if __name__ == "__main__":
    main()
