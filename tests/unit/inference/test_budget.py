"""A device with too little memory: smaller runs, the same vectors, larger runs later."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fletcher.core.batches import InferenceResult, MicroBatch, Spans
from fletcher.errors import BackendError, ModelError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.budget import BudgetedBackend, is_out_of_memory, load
from fletcher.inference.null import NullBackend
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.checkpoint.markers import Queries
from fletcher.tokenization.worker import TokenizerConfig
from tests.doubles.bundles import another


class SmallDevice(NullBackend):
    """The null backend with room for so many padded tokens."""

    def __init__(self, room: int) -> None:
        super().__init__(dim=16)
        self.room = room
        self.runs: list[int] = []

    def run(self, batch: MicroBatch) -> InferenceResult:
        padded = int(batch.lengths.max()) * len(batch.lengths)
        if padded > self.room:
            raise BackendError("CUDA failure 2: out of memory ; GPU=0")
        self.runs.append(padded)
        return super().run(batch)


def batch_of(*lengths: int) -> MicroBatch:
    return MicroBatch(np.arange(sum(lengths), dtype=np.int32), np.array(lengths, dtype=np.int32))


def test_a_batch_that_does_not_fit_is_run_in_halves_with_the_same_vectors() -> None:
    device = SmallDevice(100)
    backend = BudgetedBackend(device, 1000)
    batch = batch_of(*[20] * 30, *[7] * 31)
    result = backend.run(batch)
    expected = NullBackend(dim=16).run(batch)
    assert np.array_equal(result.embeddings, expected.embeddings)
    assert result.norms is not None
    assert len(result.norms) == 61
    assert 50 <= result.budget_tokens <= 100
    assert max(device.runs) <= 100


def test_queries_count_with_what_fills_them() -> None:
    # A run of many short ones took as much memory as one of their full length, over the budget.
    device = SmallDevice(1000)
    ids = np.array([[0, 7, 5, 2]] * 6 + [[0, 8, 5, 2]] * 2, np.int32).ravel()
    batch = MicroBatch(ids, np.full(8, 4, np.int32))
    result = BudgetedBackend(device, 64, Queries(marker=7, length=32, filler=9)).run(batch)
    assert device.runs == [8, 8, 8, 8]
    assert np.array_equal(result.embeddings, NullBackend(dim=16).run(batch).embeddings)
    device.runs.clear()
    BudgetedBackend(device, 64, Queries(marker=7, length=32)).run(batch)
    assert device.runs == [32]


def test_vectors_wanted_in_float16_are_the_same_rounded_once() -> None:
    batch = dataclasses.replace(batch_of(*[20] * 30, *[7] * 31), half=True)
    result = BudgetedBackend(SmallDevice(100), 1000).run(batch)
    expected = NullBackend(dim=16).run(batch).embeddings
    assert result.embeddings.dtype == np.float16
    assert np.array_equal(result.embeddings, expected.astype(np.float16))


def test_the_budget_stays_small_and_grows_slowly_to_what_it_was() -> None:
    device = SmallDevice(100)
    backend = BudgetedBackend(device, 400)
    small = backend.run(batch_of(*[10] * 40)).budget_tokens
    device.room = 10_000
    assert backend.run(batch_of(*[10] * 40)).budget_tokens == small
    budgets = [backend.run(batch_of(*[10] * 40)).budget_tokens for _ in range(600)]
    assert budgets == sorted(budgets)
    assert budgets[-1] == 400


def test_small_runs_are_no_reason_to_grow() -> None:
    device = SmallDevice(100)
    backend = BudgetedBackend(device, 400)
    small = backend.run(batch_of(*[10] * 40)).budget_tokens
    assert {backend.run(batch_of(3)).budget_tokens for _ in range(300)} == {small}


def test_a_row_that_does_not_fit_alone_fails_and_others_go_on() -> None:
    backend = BudgetedBackend(SmallDevice(50), 400)
    with pytest.raises(BackendError, match="too little memory for a text of 60 tokens"):
        backend.run(batch_of(60))
    assert backend.run(batch_of(20, 20)).embeddings.shape == (2, 16)


def test_other_failures_are_not_tried_again() -> None:
    class Broken(NullBackend):
        def run(self, batch: MicroBatch) -> InferenceResult:
            raise BackendError("an illegal memory access was encountered")

    with pytest.raises(BackendError, match="illegal"):
        BudgetedBackend(Broken(), 400).run(batch_of(3, 3))


@pytest.mark.parametrize(
    "said",
    [
        "Failed to allocate memory for requested buffer of size 805306368",
        "AllocateRawInternal Available memory of 5 is smaller than requested bytes of 9",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
        "std::bad_alloc",
    ],
)
def test_out_of_memory_messages_of_engines_are_recognized(said: str) -> None:
    assert is_out_of_memory(BackendError(f"ONNX Runtime failed on (4, 8) tokens: {said}"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(BackendError("invalid argument"))


def test_a_replica_loads_the_version_of_its_configuration(
    tiny_bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A restart after the version was replaced would else give the new version's vectors.
    folder = tmp_path / "m"
    first = another(tiny_bundle, folder, "m", "one")
    kept = folder.rename(tmp_path / first.qualified_name)
    second = another(tiny_bundle, folder, "m", "two")
    loaded: list[str] = []

    def load_null(config: BackendConfig) -> NullBackend:
        loaded.append(config.bundle)
        return NullBackend(4)

    monkeypatch.setattr("fletcher.inference.null.load", load_null)
    for version in (first.hash, second.hash, ""):
        load(BackendConfig("null", "cpu", str(folder), version=version))
    assert loaded == [str(kept), str(folder), str(folder)]
    assert TokenizerConfig(str(folder), first.hash).folder == kept
    with pytest.raises(ModelError, match="is missing: it was removed"):
        load(BackendConfig("null", "cpu", str(folder), version="0" * 12))


class Choosy(NullBackend):
    """The null backend that fails at runs with some token ids."""

    def __init__(self, refused: set[int]) -> None:
        super().__init__(dim=16)
        self.refused = refused
        self.num_runs = 0

    def run(self, batch: MicroBatch) -> InferenceResult:
        self.num_runs += 1
        if self.refused.intersection(batch.input_ids.tolist()):
            raise BackendError("indices element out of data bounds, in /home/x/node.cc")
        return super().run(batch)


@pytest.mark.parametrize("refused", [{0}, {63}, {5, 40}, {2, 3, 60}])
def test_a_row_that_the_engine_fails_at_fails_alone(refused: set[int]) -> None:
    batch = batch_of(*[1] * 64)
    device = Choosy(refused)
    result = BudgetedBackend(device, 1000).run(batch)
    expected = NullBackend(dim=16).run(batch).embeddings
    assert set(result.errors) == refused
    for row, error in result.errors.items():
        assert error.code == "internal"
        assert "/home" not in error.message
        assert not result.embeddings[row].any()
    good = [row for row in range(64) if row not in refused]
    assert np.array_equal(result.embeddings[good], expected[good])
    assert device.num_runs <= 1 + 14 * len(refused)


def test_a_row_with_spans_fails_with_all_of_them() -> None:
    spans = Spans(np.array([2, 1, 3], np.int32), np.array([[0, 1]] * 6, np.int32))
    batch = dataclasses.replace(batch_of(1, 1, 1), spans=spans)
    result = BudgetedBackend(Choosy({2}), 1000).run(batch)
    assert list(result.errors) == [2]
    assert result.embeddings.shape == (6, 16)


def test_an_engine_that_fails_at_everything_fails_the_run_soon() -> None:
    device = Choosy(set(range(1000)))
    with pytest.raises(BackendError, match="out of data bounds"):
        BudgetedBackend(device, 1_000_000).run(batch_of(*[1] * 1000))
    assert device.num_runs <= 32
    with pytest.raises(BackendError, match="out of data bounds"):
        BudgetedBackend(device, 1000).run(batch_of(4))
