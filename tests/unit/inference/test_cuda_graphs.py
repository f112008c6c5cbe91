"""Single short texts by captured graphs, where a session that replays like CUDA stands in."""

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fletcher.core.batches import MicroBatch
from fletcher.errors import BackendError
from fletcher.inference import onnxruntime as backend_module
from fletcher.inference.backend import BackendConfig
from fletcher.inference.packed_io import PackedIO
from tests.doubles.cuda import PretendedCuda, PretendedSession


def micro_batch(*lengths, seed=3):
    ids = np.random.default_rng(seed).integers(5, 100, sum(lengths)).astype(np.int32)
    return MicroBatch(ids, np.array(lengths, np.int32))


@pytest.fixture
def load(tiny_bundle, monkeypatch):
    """Loads the tiny model as if on CUDA: two sessions, the one without graphs first."""
    write = backend_module.write_packed

    def write_twin(bundle, folder, *, precision, attention):
        return write(bundle, folder, precision="float32", attention="standard")

    monkeypatch.setattr(backend_module, "write_packed", write_twin)
    monkeypatch.setitem(sys.modules, "onnxruntime", PretendedCuda())

    def load(**options):
        options = {"max_batch_tokens": 64, "cuda_graphs": True, **options}
        config = BackendConfig(
            "onnxruntime", "cuda:1", str(tiny_bundle.folder), precision="float16", **options
        )
        return backend_module.load(config)

    return load


def test_short_texts_are_replayed_and_have_the_models_vectors(load):
    backend = load()
    plain, graphs = PretendedSession.all
    assert "enable_cuda_graph" not in plain.options
    assert graphs.options == plain.options | {"enable_cuda_graph": "1"}
    assert list(graphs.graphs) == ["16", "32"]  # the model takes 32 tokens at most
    assert backend.describe()["cuda_graphs"] == "single texts of up to 31 tokens"
    reference = load(cuda_graphs=False)
    assert "cuda_graphs" not in reference.describe()
    graphs.replayed.clear()
    lengths = [1, 31, 15, 16, 2]
    for length in lengths:
        batch = micro_batch(length, seed=length)
        actual, expected = backend.run(batch), reference.run(batch)
        assert actual.embeddings.shape == expected.embeddings.shape
        assert np.abs(actual.embeddings - expected.embeddings).max() < 1e-6
        assert np.allclose(actual.norms, expected.norms, rtol=1e-6)
    assert graphs.replayed == ["16", "32", "16", "32", "16"]


def test_longer_texts_and_batches_run_without_cuda_graphs(load):
    backend, reference = load(), load(cuda_graphs=False)
    graphs = PretendedSession.all[1]
    graphs.replayed.clear()
    for batch in (micro_batch(32), micro_batch(3, 4)):
        assert np.array_equal(backend.run(batch).embeddings, reference.run(batch).embeddings)
    assert graphs.replayed == []


def test_a_text_that_arrives_while_a_graph_runs_does_not_wait(load):
    backend = load()
    graphs = PretendedSession.all[1]
    began, may_end = threading.Event(), threading.Event()
    replay = graphs.replay

    def slow(binding):
        began.set()
        assert may_end.wait(30)
        replay(binding)

    graphs.replay = slow
    one, other = micro_batch(9, seed=1), micro_batch(9, seed=2)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(backend.run, one)
        assert began.wait(30)
        graphs.replayed.clear()
        besides = backend.run(other)
        may_end.set()
        replayed = running.result(30)
    assert graphs.replayed == []
    reference = load(cuda_graphs=False)
    for batch, result in ((one, replayed), (other, besides)):
        assert np.abs(result.embeddings - reference.run(batch).embeddings).max() < 1e-6


def test_results_outlive_the_next_replay(load):
    backend = load()
    kept = backend.run(micro_batch(9, seed=1))
    copy = kept.embeddings.copy(), kept.norms.copy()
    backend.run(micro_batch(9, seed=2))
    assert np.array_equal(kept.embeddings, copy[0])
    assert np.array_equal(kept.norms, copy[1])


def stale(session, binding):
    """A graph that reads from where its inputs were, not from where they are."""


def broken(session, binding):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("replay", "reason"), [(stale, "a cosine of"), (broken, "not permitted when stream")]
)
def test_wrong_cuda_graphs_are_not_used_and_the_log_says_why(
    load, monkeypatch, caplog, replay, reason
):
    monkeypatch.setattr(PretendedSession, "replay", replay)
    with caplog.at_level(logging.WARNING):
        backend = load()
    assert reason in caplog.text
    assert backend.describe()["cuda_graphs"].startswith("none: ")
    assert reason in backend.describe()["cuda_graphs"]
    batch = micro_batch(9)
    expected = load(cuda_graphs=False).run(batch).embeddings
    assert np.array_equal(backend.run(batch).embeddings, expected)


def test_without_memory_for_another_session_there_are_no_graphs(load, monkeypatch):
    class OneSession(PretendedSession):
        def __init__(self, path, session_options, providers):
            if PretendedSession.all:
                raise RuntimeError("Failed to allocate memory for requested buffer of size 9")
            super().__init__(path, session_options, providers)

    monkeypatch.setattr(PretendedCuda, "InferenceSession", OneSession)
    backend = load()
    assert "does not fit into the device's memory" in backend.describe()["cuda_graphs"]
    assert backend.run(micro_batch(9)).embeddings.shape[0] == 1


def test_a_replay_that_fails_later_is_an_engines_error(load, monkeypatch):
    backend = load()
    monkeypatch.setattr(PretendedSession, "replay", broken)
    for _ in range(2):  # and the graph is free again
        with pytest.raises(BackendError, match="a CUDA graph failed: operation not permitted"):
            backend.run(micro_batch(9))


def test_the_twin_on_a_cpu_runs_the_same_code(tiny_bundle):
    config = BackendConfig("onnxruntime", "cpu", str(tiny_bundle.folder), threads=1)
    twin = backend_module.load_twin(config)
    graphs = backend_module.load_twin(
        BackendConfig("onnxruntime", "cpu", str(tiny_bundle.folder), threads=1, cuda_graphs=True)
    )
    assert graphs.describe()["cuda_graphs"] == "single texts of up to 31 tokens"
    for length in range(1, 33):
        batch = micro_batch(length, seed=length)
        difference = graphs.run(batch).embeddings - twin.run(batch).embeddings
        assert np.abs(difference).max() < 1e-6


@pytest.mark.parametrize("length", [1, 7, 15])
def test_inputs_of_a_graph_have_one_shape_whatever_the_text(tiny_bundle, length):
    ids = np.arange(1, length + 1, dtype=np.int32)
    feeds = PackedIO.packed(tiny_bundle).filled(ids, 16)
    shapes = {name: array.shape for name, array in feeds.items()}
    assert shapes == {
        "input_ids": (16,),
        "position_ids": (16,),
        "token_offset": (2, 16),
        "cumulative_sequence_length": (3,),
    }
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.int32)}
    assert feeds["cumulative_sequence_length"].tolist() == [0, length, 16]
    padding = [tiny_bundle.pad_token_id] * (16 - length)
    assert feeds["input_ids"].tolist() == [*ids.tolist(), *padding]
    assert sorted(feeds["token_offset"].reshape(-1).tolist()) == list(range(32))
