"""Both engines on real graphs: the tiny bundle, and foreign graphs that end at token embeddings."""

import dataclasses
import importlib
import os
import queue
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fletcher.core.batches import MicroBatch
from fletcher.errors import BackendError, ModelError
from fletcher.inference import openvino
from fletcher.inference.backend import BackendConfig
from fletcher.inference.graph_io import GraphIO
from fletcher.inference.openvino import OpenVinoBackend
from fletcher.models.bundle.bundle import write_manifest
from fletcher.models.bundle.spec import ModelSpec

ENGINES = ["onnxruntime", "openvino"]
VOCABULARY, DIM = 50, 4


def load(engine, folder, **options):
    module = importlib.import_module(f"fletcher.inference.{engine}")
    options = {"threads": 2, "max_batch_tokens": 64, "device": "cpu", **options}
    return module.load(BackendConfig(backend=engine, bundle=str(folder), **options))


def micro_batch(rows):
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    return MicroBatch(ids, np.array([len(row) for row in rows], dtype=np.int32))


def random_rows(lengths, vocabulary=VOCABULARY):
    rng = np.random.default_rng(11)
    return [rng.integers(1, vocabulary, length).tolist() for length in lengths]


@pytest.fixture(scope="module", params=ENGINES)
def backend(request, tiny_bundle):
    return load(request.param, tiny_bundle.folder)


def test_embeddings_have_length_one_and_norms_are_given(backend, tiny_bundle):
    result = backend.run(micro_batch(random_rows([5, 17, 32, 1], 20)))
    assert result.embeddings.shape == (4, tiny_bundle.dim)
    assert result.embeddings.dtype == np.float32
    assert np.allclose(np.linalg.norm(result.embeddings, axis=1), 1, atol=1e-5)
    assert result.norms.shape == (4,)
    assert (result.norms > 0).all()
    assert result.compute_s > 0


def test_a_row_has_the_same_vector_in_any_batch(backend):
    rows = random_rows([3, 32, 9, 20, 1, 16], 20)
    together = backend.run(micro_batch(rows)).embeddings
    alone = np.concatenate([backend.run(micro_batch([row])).embeddings for row in rows])
    assert np.abs(together - alone).max() <= 1e-5
    assert np.abs(together[0] - together[1]).max() > 1e-3  # they are not all the same


def test_engines_agree(tiny_bundle):
    batch = micro_batch(random_rows([4, 30, 12], 20))
    one, other = (load(engine, tiny_bundle.folder).run(batch) for engine in ENGINES)
    assert (one.embeddings * other.embeddings).sum(axis=1).min() >= 0.99999
    assert np.allclose(one.norms, other.norms, rtol=1e-4)


def test_several_threads_do_not_mix_up_their_rows(backend):
    batches = [micro_batch([row]) for row in random_rows([3 + n % 30 for n in range(64)], 20)]
    expected = [backend.run(batch).embeddings for batch in batches]
    with ThreadPoolExecutor(backend.concurrency + backend.urgent_concurrency) as threads:
        results = [result.embeddings for result in threads.map(backend.run, batches)]
    assert (backend.concurrency, backend.urgent_concurrency) == (2, 1)
    assert np.array_equal(np.concatenate(results), np.concatenate(expected))


class Stream:
    """A request of a copy of the model: says that it runs, and ends when it may."""

    def __init__(self, name, began):
        self.name, self._began = name, began
        self.may_end = threading.Semaphore(0)

    def set_tensor(self, name, tensor):
        pass

    def start_async(self):
        self._began.put(self.name)

    def wait(self):
        assert self.may_end.acquire(timeout=30)

    def get_tensor(self, _name):
        return types.SimpleNamespace(data=np.ones((1, DIM), np.float32))


def test_a_run_that_finds_all_streams_busy_gets_the_second_copy(tiny_bundle):
    began = queue.SimpleQueue()
    streams = {name: Stream(name, began) for name in ("one", "two", "priority")}
    one, two, priority = ([stream] for stream in streams.values())
    io = GraphIO.for_graph(
        tiny_bundle, dict.fromkeys(tiny_bundle.inputs, np.int64), tiny_bundle.outputs
    )
    io = dataclasses.replace(io, dim=DIM, has_norms=False)
    engine = OpenVinoBackend([one, two], [priority], io, lambda array, shared_memory: array, {})
    runs = {}

    def begin(threads):
        run = threads.submit(engine.run, micro_batch([[1, 2, 3]]))
        name = began.get(timeout=30)
        runs[name] = run
        return name

    def end(name):
        streams[name].may_end.release()
        runs[name].result(timeout=30)

    with ThreadPoolExecutor(4) as threads:
        for _ in range(2):
            assert {begin(threads), begin(threads)} == {"one", "two"}
            assert begin(threads) == "priority"
            for name in ("one", "two", "priority"):
                end(name)


def test_inline_a_model_gives_the_same_bits_and_takes_one_run(tiny_bundle):
    config = BackendConfig("openvino", "cpu", str(tiny_bundle.folder), threads=2)
    inline = openvino.load_inline(config)
    assert (inline.concurrency, inline.urgent_concurrency) == (1, 0)
    replica = openvino.load(config)
    for row in random_rows([1, 9, 16, 17, 32], 20):
        one, other = inline.run(micro_batch([row])), replica.run(micro_batch([row]))
        assert np.array_equal(one.embeddings, other.embeddings)
    assert openvino.load_inline(dataclasses.replace(config, threads=1)) is None


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16")],
)
def test_the_same_batches_give_the_same_bits_in_every_run_and_process(
    tiny_bundle, engine, precision
):
    rows = random_rows([32, 5, 17, 1, 30, 30, 2, 11], 20)
    batches = [micro_batch(rows), micro_batch(rows[:3]), micro_batch(rows[3:])]
    found = []
    for _ in range(2):  # loaded anew, as after a restart
        try:
            loaded = load(engine, tiny_bundle.folder, precision=precision)
        except BackendError as error:
            pytest.skip(error.message)
        with ThreadPoolExecutor(loaded.concurrency) as threads:
            found += [list(threads.map(loaded.run, batches)) for _ in range(3)]
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            assert np.array_equal(one.embeddings, other.embeddings)
            assert np.array_equal(one.norms, other.norms)


def test_results_outlive_the_next_run(backend):
    first, second = (micro_batch([row]) for row in random_rows([6, 7], 20))
    kept = backend.run(first).embeddings
    copy = kept.copy()
    backend.run(second)
    assert np.array_equal(kept, copy)


def test_what_runs_is_described(backend):
    description = backend.describe()
    assert description["precision"] == "float32"
    assert description["provider"] in ("CPU", "CPUExecutionProvider")
    assert description["version"]


SPEC = ModelSpec(
    family="onnx",
    dim=DIM,
    max_length=20,
    pooling="mean",
    normalize=True,
    num_layers=0,
    layers=(0,),
    dims=(DIM,),
    prompts={},
    default_prompt=None,
    pad_token_id=7,
    graph_file="model.onnx",
    graph_output="token_embeddings",
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    outputs=("token_embeddings",),
    licence="",
    source="test",
    weights_sha256="0" * 64,
)
TABLE = np.random.default_rng(5).normal(size=(VOCABULARY, DIM)).astype(np.float32)


def foreign_graph(folder, integers):
    """Looks its tokens up in TABLE; adds 100 times each token's type, which must be 0."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, integers, ["b", "l"]) for name in names]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Add", ["token_type_ids", "attention_mask"], ["both"]),
        helper.make_node("Sub", ["both", "attention_mask"], ["types"]),
        helper.make_node("Cast", ["types"], ["types.float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["types.float", "hundred"], ["shift"]),
        helper.make_node("Unsqueeze", ["shift", "last"], ["shift.wide"]),
        helper.make_node("Add", ["tokens", "shift.wide"], ["token_embeddings"]),
    ]
    output = helper.make_tensor_value_info("token_embeddings", TensorProto.FLOAT, ["b", "l", DIM])
    constants = {
        "table": TABLE,
        "hundred": np.array(100, dtype=np.float32),
        "last": np.array([-1], dtype=np.int64),
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "foreign", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")


@pytest.fixture
def foreign(tmp_path):
    def make(integers=TensorProto.INT64, **changes):
        foreign_graph(tmp_path, integers)
        (tmp_path / "tokenizer.json").write_text("{}")
        write_manifest(tmp_path, "foreign", msgspec.structs.replace(SPEC, **changes))
        return tmp_path

    return make


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("integers", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
def test_a_foreign_graph_is_pooled_and_normalised_here(engine, integers, pooling, foreign):
    rows = random_rows([2, 20, 9])
    result = load(engine, foreign(integers, pooling=pooling)).run(micro_batch(rows))
    pick = {"mean": lambda x: x.mean(axis=0), "cls": lambda x: x[0], "last_token": lambda x: x[-1]}
    raw = np.stack([pick[pooling](TABLE[row]) for row in rows])
    norms = np.linalg.norm(raw, axis=1)
    assert np.allclose(result.norms, norms, rtol=1e-5)
    assert np.allclose(result.embeddings, raw / norms[:, None], atol=1e-5)


def test_padding_is_on_the_grid_and_stops_at_the_models_length(foreign):
    io = load("onnxruntime", foreign())._io
    for lengths, padded in [([1], 16), ([16, 2], 16), ([17], 20), ([3, 20], 20)]:
        inputs, mask = io.feeds(micro_batch(random_rows(lengths)))
        assert mask.sum(axis=1).tolist() == lengths
        assert {array.shape for array in inputs.values()} == {(len(lengths), padded)}
        assert (inputs["input_ids"][~mask] == SPEC.pad_token_id).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_does_not_normalise_keeps_its_lengths(engine, foreign):
    rows = random_rows([3, 4])
    result = load(engine, foreign(normalize=False)).run(micro_batch(rows))
    assert result.norms is None
    raw = np.stack([TABLE[row].mean(axis=0) for row in rows])
    assert np.allclose(result.embeddings, raw, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ("input_ids", "attention_mask")}, "the graph has inputs"),
        ({"outputs": ("nothing",)}, "has no output `nothing`"),
        ({"dim": 8, "dims": (8,)}, "output has shape"),
    ],
)
def test_a_bundle_that_describes_another_graph_is_refused(engine, foreign, changes, message):
    with pytest.raises(ModelError, match=message):
        load(engine, foreign(**changes))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keep", [0, 200, 3000])
def test_a_truncated_graph_is_a_clear_error_without_paths(engine, keep, tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_bundle.folder, tmp_path / "damaged")
    graph = folder / tiny_bundle.graph.name
    whole = graph.stat().st_size
    assert keep < whole
    # Of the right size, so that the bundle's own check of sizes does not catch it.
    graph.write_bytes(graph.read_bytes()[:keep] + b"\xff" * (whole - keep))
    with pytest.raises(ModelError) as caught:
        load(engine, folder)
    assert "`fletcher model verify" in caught.value.message
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_not_installed_says_what_to_install(engine, tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(BackendError, match=r"pip install 'longbow-fletcher\[cpu\]'"):
        load(engine, tiny_bundle.folder)


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("onnxruntime", {"precision": "bfloat16"}, "onnxruntime on cpu has only float32"),
        ("onnxruntime", {"precision": "float16"}, "onnxruntime on cpu has only float32"),
        ("onnxruntime", {"precision": "bfloat16", "device": "cuda:0"}, "only float32 and float16"),
        ("onnxruntime", {"device": "cuda:0"}, r"lacks: .*\[gpu\]"),
        ("onnxruntime", {"precision": "float16", "device": "cuda:0"}, r"lacks: .*\[gpu\]"),
        ("openvino", {"precision": "float16"}, "not float16 on cpu"),
        ("openvino", {"device": "cuda:0"}, "on the CPU, not float32 on cuda:0"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(engine, options, message, tiny_bundle):
    with pytest.raises(BackendError, match=message):
        load(engine, tiny_bundle.folder, **options)


class SilentFallback:
    """An ONNX Runtime that lists CUDA and then loads the CPU, as it does without a driver."""

    __version__ = "0"

    class SessionOptions:
        pass

    class InferenceSession:
        def __init__(self, *args, **options):
            pass

        def get_providers(self):
            return ["CPUExecutionProvider"]

    @staticmethod
    def get_available_providers():
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    @staticmethod
    def preload_dlls():
        pass


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_provider_that_silently_did_not_load_is_an_error(tiny_bundle, monkeypatch, precision):
    monkeypatch.setitem(sys.modules, "onnxruntime", SilentFallback())
    with pytest.raises(BackendError, match="loaded only CPUExecutionProvider"):
        load("onnxruntime", tiny_bundle.folder, device="cuda:0", precision=precision)


def test_a_row_over_the_models_length_is_refused(backend, tiny_bundle):
    batch = micro_batch(random_rows([tiny_bundle.max_length + 1], 20))
    with pytest.raises(ValueError, match="the model takes 32"):
        backend.run(batch)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_report_nothing_over_the_network(engine):
    code = (
        "import os, sys\n"
        f"from fletcher.inference.{engine} import _import\n"
        f"assert _import().__name__ == {engine!r}\n"
        "assert sys.modules.get('openvino_telemetry') is None\n"
        f"assert {engine!r} == 'openvino' or os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
    )
    environ = {name: text for name, text in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=60)
