"""How the graph without padding is fed and run, by its twin where a GPU is needed otherwise."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fletcher.core.batches import MicroBatch
from fletcher.errors import BackendError
from fletcher.inference import binding as binding_module
from fletcher.inference import onnxruntime as backend_module
from fletcher.inference.backend import BackendConfig
from fletcher.inference.binding import Buffer, cuda_pin
from fletcher.inference.packed_io import PackedIO
from fletcher.models.bundle.registry import Registry
from fletcher.models.onnx.packed import INPUTS
from tests.doubles.cuda import PretendedCuda, PretendedSession

TINY = Path(__file__).parents[2] / "golden" / "tiny"


def micro_batch(lengths, seed=3):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 100, sum(lengths)).astype(np.int32)
    return MicroBatch(ids, np.array(lengths, dtype=np.int32))


def config(bundle, **options):
    options = {"threads": 2, "max_batch_tokens": 64, "device": "cpu", **options}
    return BackendConfig(backend="onnxruntime", bundle=str(bundle.folder), **options)


def test_inputs_are_those_that_onnx_runtime_documents(tiny_bundle):
    # The example of the operator's documentation: three sequences of 1, 2 and 4 tokens.
    feeds, mask = PackedIO.packed(tiny_bundle).feeds(micro_batch([1, 2, 4]))
    assert list(feeds) == list(INPUTS)
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.int32)}
    assert feeds["position_ids"].tolist() == [0, 0, 1, 0, 1, 2, 3]
    assert feeds["token_offset"].reshape(-1).tolist() == [0, 4, 5, 8, 9, 10, 11, 1, 2, 3, 6, 7]
    assert feeds["token_offset"].shape == (3, 4)
    assert feeds["cumulative_sequence_length"].tolist() == [0, 1, 3, 7]
    assert mask.sum(axis=1).tolist() == [1, 2, 4]


@pytest.mark.parametrize("lengths", [[1], [5], [3, 3, 3], [32, 1, 7, 32], [1] * 40])
def test_every_token_has_its_place_and_every_place_is_named_once(tiny_bundle, lengths):
    batch = micro_batch(lengths)
    feeds, _ = PackedIO.packed(tiny_bundle).feeds(batch)
    assert feeds["input_ids"] is batch.input_ids  # not copied
    offsets, longest = feeds["token_offset"], max(lengths)
    assert sorted(offsets.reshape(-1).tolist()) == list(range(len(lengths) * longest))
    expected = [
        row * longest + place for row, length in enumerate(lengths) for place in range(length)
    ]
    assert offsets.reshape(-1)[: sum(lengths)].tolist() == expected
    assert feeds["position_ids"].tolist() == [place % longest for place in expected]


def test_a_row_over_the_models_length_is_refused(tiny_bundle):
    with pytest.raises(ValueError, match="the model takes 32"):
        PackedIO.packed(tiny_bundle).feeds(micro_batch([33]))


@pytest.fixture(scope="module", params=["mean", "cls"])
def pair(request, tmp_path_factory):
    """The padded graph and the twin of the one without padding."""
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = shutil.copytree(TINY, folder / "tiny")
    (checkpoint / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode": request.param})
    )
    bundle = Registry(folder / "models").add_model(str(checkpoint), progress=print)
    return backend_module.load(config(bundle)), backend_module.load_twin(config(bundle))


def test_bound_buffers_give_what_the_padded_graph_gives(pair):
    padded, twin = pair
    # Growing, shrinking and growing again: what a longer run left must not be read.
    for lengths in ([3], [32, 1, 7], [2, 2], [1] * 30, [5, 31]):
        batch = micro_batch(lengths)
        expected, actual = padded.run(batch), twin.run(batch)
        assert np.abs(actual.embeddings - expected.embeddings).max() < 1e-5
        assert np.allclose(actual.norms, expected.norms, rtol=1e-5)
        assert actual.embeddings.shape == expected.embeddings.shape
    assert twin.describe()["graph"] == "without padding"
    assert twin.describe()["precision"] == "float32"


def test_results_outlive_the_next_run_and_threads_do_not_mix(pair):
    _, twin = pair
    batches = [micro_batch([1 + n % 32, 3], seed=n) for n in range(40)]
    kept = [twin.run(batch).embeddings for batch in batches]
    copies = [one.copy() for one in kept]
    with ThreadPoolExecutor(twin.concurrency) as threads:
        results = [one.embeddings for one in threads.map(twin.run, batches)]
    assert twin.concurrency == 2
    for one, copy, result in zip(kept, copies, results, strict=True):
        assert np.array_equal(one, copy)
        assert np.array_equal(one, result)


def test_a_full_temporary_folder_is_named(tiny_bundle, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backend_module, "write_packed", full)
    with pytest.raises(BackendError, match=r"No space left on device\); free space .* TMPDIR"):
        backend_module.load_twin(config(tiny_bundle))


def test_memory_is_locked_once_for_a_size_and_unlocked_after_its_last_view(monkeypatch):
    locked = {}

    def pin(address, size):
        locked[address] = size
        return lambda: locked.pop(address)

    buffer = Buffer(pin)
    first = buffer.view((100, 4), np.float32)
    assert buffer.view((10,), np.int32).ctypes.data == first.ctypes.data
    assert list(locked.values()) == [4096]
    assert first.ctypes.data in locked
    second = buffer.view((2000,), np.int64)
    assert set(locked.values()) == {4096, 16384}
    del first
    assert list(locked.values()) == [16384]
    del buffer, second
    assert locked == {}


def test_without_cuda_memory_stays_as_it_is():
    assert cuda_pin(0)(0, 4096) is None


class Runtime:
    """Stands in for libcudart: notes what is called, and begins devices as that does."""

    def __init__(self, answer):
        self.answer, self.device, self.calls = answer, 0, []

    def cudaSetDevice(self, device):
        self.device = device.value

    def cudaHostRegister(self, address, size, flags):
        self.calls.append(("register", self.device, address.value, size.value, flags))
        return self.answer

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address.value))


def test_memory_is_locked_for_the_replicas_own_device(monkeypatch):
    runtime = Runtime(answer=0)
    monkeypatch.setattr(binding_module, "_cuda_runtime", lambda: runtime)
    cuda_pin(3)(8192, 4096)()
    assert runtime.calls == [("register", 3, 8192, 4096, 0), ("unregister", 8192)]
    monkeypatch.setattr(binding_module, "_cuda_runtime", lambda: Runtime(answer=2))
    assert cuda_pin(3)(8192, 4096) is None


def test_float16_on_cuda_takes_the_graph_without_padding(tiny_bundle, monkeypatch):
    written = {}
    write = backend_module.write_packed

    def write_twin(bundle, folder, *, precision, attention):
        written.update(precision=precision, attention=attention)
        return write(bundle, folder, precision=precision, attention="standard")

    monkeypatch.setattr(backend_module, "write_packed", write_twin)
    cuda = PretendedCuda()
    monkeypatch.setitem(sys.modules, "onnxruntime", cuda)
    asked = config(tiny_bundle, device="cuda:1", precision="float16", gpu_memory=1 << 30)
    backend = backend_module.load(asked)
    assert written == {"precision": "float16", "attention": "packed"}
    assert cuda.preloaded
    (session,) = PretendedSession.all
    assert session.options == {
        "device_id": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        "gpu_mem_limit": str(1 << 30),
    }
    assert backend.describe() == {
        "backend": "onnxruntime",
        "version": onnxruntime.__version__,
        "device": "cuda:1",
        "precision": "float16",
        "provider": "CUDAExecutionProvider",
        "graph": "without padding",
    }
    batch = micro_batch([4, 30, 1])
    expected = backend_module.load_twin(config(tiny_bundle)).run(batch).embeddings
    assert (backend.run(batch).embeddings * expected).sum(axis=1).min() >= 0.999


def test_a_model_too_large_for_the_device_is_not_called_damaged(tiny_bundle, monkeypatch):
    class Full(PretendedCuda):
        @staticmethod
        def InferenceSession(*args, **options):
            # ONNX Runtime 1.31 under `gpu_mem_limit`.
            raise RuntimeError(
                "Exception during initialization: /onnxruntime_src/bfc_arena.cc:360 "
                "Available memory of 19496192 is smaller than requested bytes of 23440896"
            )

    monkeypatch.setitem(sys.modules, "onnxruntime", Full())
    for precision in ("float16", "float32"):
        asked = config(tiny_bundle, device="cuda:0", precision=precision, gpu_memory=20 << 20)
        with pytest.raises(BackendError, match=r"raise `gpu_memory` .*requested bytes of 23440896"):
            backend_module.load(asked)
