"""A second graph beside that for whole rows, and batches whose rows have spans."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from fletcher.core.batches import InferenceResult, MicroBatch, Spans
from fletcher.inference.backend import BackendConfig
from fletcher.inference.budget import BudgetedBackend, load
from fletcher.inference.late import LateBackend
from fletcher.inference.null import NullBackend, null_embeddings
from fletcher.models.bundle.bundle import ModelBundle


def batch(lengths: list[int], bounds: list[list[tuple[int, int]]]) -> MicroBatch:
    counts = np.array([len(one) for one in bounds], np.int32)
    flat = np.array([pair for one in bounds for pair in one], np.int32)
    ids = np.arange(sum(lengths), dtype=np.int32)
    return MicroBatch(ids, np.array(lengths, np.int32), spans=Spans(counts, flat))


THREE = batch([4, 2, 5], [[(0, 1), (1, 4)], [(0, 2)], [(0, 5), (2, 3), (3, 5)]])
PARTS = [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [8], [9, 10]]


def expected(dim: int) -> np.ndarray:
    ids = np.array([one for part in PARTS for one in part], np.int32)
    return null_embeddings(ids, np.array([len(part) for part in PARTS], np.int32), dim)


def test_the_null_backend_gives_each_span_a_vector() -> None:
    result = NullBackend(8).run(THREE)
    assert np.array_equal(result.embeddings, expected(8))
    assert result.norms is not None
    assert len(result.norms) == len(PARTS)


def test_the_second_graph_is_loaded_once_on_first_use() -> None:
    loads: list[int] = []
    together = threading.Barrier(4, timeout=30)

    def load_late() -> NullBackend:
        loads.append(1)
        return NullBackend(8)

    class NoSegments(NullBackend):
        def run(self, batch: MicroBatch) -> InferenceResult:
            assert batch.spans is None
            return super().run(batch)

    backend = LateBackend(NoSegments(8), load_late)
    assert (backend.concurrency, backend.urgent_concurrency) == (2, 1)
    assert len(backend.run(replace(THREE, spans=None)).embeddings) == 3
    assert not loads

    def run(_: int) -> np.ndarray:
        together.wait()
        return backend.run(THREE).embeddings

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, range(4)))
    assert loads == [1]
    assert all(np.array_equal(one, expected(8)) for one in found)


def test_split_runs_keep_each_rows_spans() -> None:
    sizes = []

    class Counting(NullBackend):
        def run(self, batch: MicroBatch) -> InferenceResult:
            sizes.append(len(batch.lengths))
            return super().run(batch)

    result = BudgetedBackend(Counting(8), 8).run(THREE)
    assert sizes == [2, 1]
    assert np.array_equal(result.embeddings, expected(8))
    assert result.norms is not None
    assert len(result.norms) == len(PARTS)


def test_a_replica_runs_both(tiny_bundle: ModelBundle) -> None:
    config = BackendConfig(
        "onnxruntime", "cpu", str(tiny_bundle.folder), threads=1, version=tiny_bundle.hash
    )
    replica = load(config)
    rows = batch([4, 2, 5], [[(0, 4)], [(0, 2)], [(0, 5)]])
    whole, late = replica.run(replace(rows, spans=None)), replica.run(rows)
    assert whole.norms is not None
    assert late.norms is None
    np.testing.assert_allclose(
        late.embeddings, whole.embeddings * whole.norms[:, None], rtol=1e-5, atol=1e-6
    )
