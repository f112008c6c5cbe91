"""An engine alone on ready tokens, measured: a process of its own.

    python -m benchmarks.bare JOB

The job (JSON) has `config` (the fields of BackendConfig), `loader` (the backend's function to load
it with; `load` where absent), `tokens` (a .npz file of `input_ids` and `offsets`), `result`, and
either `embeddings` (a .npy file to write: measures throughput) or `requests` (measures so many runs
of one text each).
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.batches import MicroBatch
from fletcher.errors import BackendError
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.inference.graph_io import LENGTH_GRID
from fletcher.planning.planner import plan

# As the server plans, but for all texts at once.
MAX_BATCH_ROWS = 1024


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
            answer = {"ms": latencies(backend, input_ids, offsets, job["requests"])}
        else:
            seconds, embeddings = embed_all(
                backend, input_ids, offsets, max_batch_tokens=config.max_batch_tokens
            )
            np.save(job["embeddings"], embeddings)
            answer = {"seconds": seconds}
        answer["engine"] = backend.describe()
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


def embed_all(
    backend: Backend,
    input_ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    *,
    max_batch_tokens: int,
) -> tuple[float, npt.NDArray[np.float32]]:
    """Runs planned micro-batches from as many threads as the backend takes.

    Returns:
        Seconds, without planning; float32 [num_texts, dim].
    """
    lengths = np.diff(offsets).astype(np.int32)
    row_sets = plan(
        lengths,
        max_batch_tokens=max_batch_tokens,
        max_batch_rows=MAX_BATCH_ROWS,
        num_runners=backend.concurrency,
    )
    batches = [_micro_batch(input_ids, offsets, rows) for rows in row_sets]
    results: list[npt.NDArray[np.float32] | None] = [None] * len(batches)
    taking = threading.Lock()
    places = iter(range(len(batches)))

    def work() -> None:
        while True:
            with taking:
                place = next(places, None)
            if place is None:
                return
            results[place] = backend.run(batches[place]).embeddings

    # Engines compile a kernel at the first run of a length, and make a request for each thread.
    every_length = {-(-int(one.lengths.max()) // LENGTH_GRID): one for one in batches}
    with ThreadPoolExecutor(backend.concurrency) as pool:
        all_there = threading.Barrier(backend.concurrency)

        def warm_up() -> None:
            all_there.wait()  # so that no thread warms up twice and another not at all
            for batch in every_length.values():
                backend.run(batch)

        for one in [pool.submit(warm_up) for _ in range(backend.concurrency)]:
            one.result()
        started = time.perf_counter()
        for one in [pool.submit(work) for _ in range(backend.concurrency)]:
            one.result()
        seconds = time.perf_counter() - started
    first = results[0]
    assert first is not None
    embeddings = np.empty((len(lengths), first.shape[1]), dtype=np.float32)
    for rows, result in zip(row_sets, results, strict=True):
        embeddings[rows] = result
    return seconds, embeddings


def latencies(
    backend: Backend,
    input_ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    num_requests: int,
) -> list[float]:
    """Milliseconds of runs of one text each, one after the other."""
    batches = [
        MicroBatch(input_ids[first:last], np.array([last - first], dtype=np.int32))
        for first, last in itertools.pairwise(offsets.tolist())
    ]
    for batch in batches:  # every shape once
        backend.run(batch)
    times = []
    for batch in itertools.islice(itertools.cycle(batches), num_requests):
        started = time.perf_counter()
        backend.run(batch)
        times.append((time.perf_counter() - started) * 1000)
    return times


def _micro_batch(
    input_ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.intp]
) -> MicroBatch:
    parts = [input_ids[offsets[row] : offsets[row + 1]] for row in rows]
    lengths = (offsets[rows + 1] - offsets[rows]).astype(np.int32)
    return MicroBatch(np.concatenate(parts), lengths)


if __name__ == "__main__":
    main()
