"""Every family in every precision: heads 64 wide, beyond 256 tokens, padded and in company.

Checkpoints and references: tests/golden/wide.py, scripts/make_golden_wide. bfloat16 runs emulated
everywhere (tests/golden/bfloat16.py), and by OpenVINO where the processor lets it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

from fletcher.core.batches import MicroBatch
from fletcher.core.quantization import quantize_rows
from fletcher.errors import BackendError
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.inference.packed_io import PackedIO
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.models.onnx.packed import can_pack, write_packed

from . import wide
from .bfloat16 import rounded
from .onnx_session import Array, cosines, run_graph

ABOUT = json.loads((wide.GOLDEN / "wide.json").read_text())
# Mean cosines of the emulation where the mean of engines, 0.9999, is out of reach: every operator
# rounds there, those of gated activations and of rotary positions too.
EMULATED_MEANS = {"modernbert": 0.9996, "nomic_bert": 0.9998, "qwen3": 0.9998}
Rows = list[list[int]]
Run = Callable[[Rows], Array]


@pytest.fixture(scope="module", params=sorted(ABOUT))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    folder = tmp_path_factory.mktemp("wide")
    made = wide.write_checkpoint(request.param, ABOUT[request.param], folder / request.param)
    return Registry(folder / "models").add_model(str(made), progress=print)


def rows_and_reference(bundle: ModelBundle) -> tuple[Rows, Array]:
    table = pq.read_table(wide.GOLDEN / "wide.parquet").to_pylist()
    expected = [row["vector"] for row in table if row["family"] == bundle.name]
    rows = wide.rows(ABOUT[bundle.name]["config"]["vocab_size"])
    return rows, np.array(expected, np.float32)


def load(bundle: ModelBundle, engine: str, precision: str = "float32") -> Backend:
    module = importlib.import_module(f"fletcher.inference.{engine}")
    config = BackendConfig(
        backend=engine,
        device="cpu",
        bundle=str(bundle.folder),
        precision=precision,
        threads=1,
        max_batch_tokens=16,
    )
    loaded: Backend = module.load(config)
    return loaded


def by(backend: Backend) -> Run:
    def run(rows: Rows) -> Array:
        ids = np.concatenate([np.array(row, np.int32) for row in rows])
        lengths = np.array([len(row) for row in rows], np.int32)
        return np.asarray(backend.run(MicroBatch(ids, lengths)).embeddings, np.float32)

    return run


def check(run: Run, bundle: ModelBundle, *, least: float, mean: float) -> None:
    """Compares with the reference: all rows together, then two of them alone."""
    rows, expected = rows_and_reference(bundle)
    found = cosines(run(rows), expected)
    assert found.min() >= least, found
    assert found.mean() >= mean, found
    for place in (0, 5):  # 300 and 511 tokens
        (alone,) = cosines(run([rows[place]]), expected[place : place + 1])
        assert alone >= least


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_float32(engine: str, bundle: ModelBundle) -> None:
    run = by(load(bundle, engine))
    check(run, bundle, least=0.99999, mean=0.99999)
    rows, expected = rows_and_reference(bundle)
    assert np.abs(run(rows) - expected).max() <= 1e-4


def test_bfloat16_emulated(bundle: ModelBundle, tmp_path: Path) -> None:
    graph = rounded(bundle.graph, tmp_path)
    mean = EMULATED_MEANS.get(bundle.name, 0.9999)
    check(lambda rows: run_graph(graph, rows)["embedding"], bundle, least=0.999, mean=mean)


def test_bfloat16_by_openvino(bundle: ModelBundle) -> None:
    refusal = None
    try:
        backend = load(bundle, "openvino", "bfloat16")
    except BackendError as error:
        refusal = error.message
    if refusal is not None:  # the emulation above is the test here
        assert "which this CPU lacks" in refusal
        return
    check(by(backend), bundle, least=0.999, mean=0.9999)


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_without_padding(precision: str, bundle: ModelBundle, tmp_path: Path) -> None:
    if not can_pack(bundle):
        with pytest.raises(Exception, match="graphs without padding"):
            write_packed(bundle, tmp_path)
        return
    path = write_packed(bundle, tmp_path, precision=precision, attention="standard")  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    io = PackedIO.packed(bundle)

    def run(rows: Rows) -> Array:
        ids = np.concatenate(rows).astype(np.int32)
        lengths = np.array([len(row) for row in rows], np.int32)
        feeds, _ = io.feeds(MicroBatch(ids, lengths))
        found: Array = session.run(["embedding"], feeds)[0]
        return found

    exact = precision == "float32"
    check(run, bundle, least=0.99999 if exact else 0.999, mean=0.99999 if exact else 0.9999)


def test_int8_of_each_row(bundle: ModelBundle) -> None:
    _, expected = rows_and_reference(bundle)
    values, scale = quantize_rows(expected)
    assert cosines(values * scale[:, None], expected).min() >= 0.999


def test_the_emulation_shows_what_a_float_index_does(tmp_path: Path) -> None:
    """The fault that MPNet's graph had: 511 to 519 were one row of the table of distances."""
    made = wide.write_checkpoint("mpnet", ABOUT["mpnet"], tmp_path / "mpnet")
    bundle = Registry(tmp_path / "models").add_model(str(made), progress=print)
    model = onnx.load(str(bundle.graph))
    (index,) = (one for one in model.graph.node if one.name == "bias.buckets.index")
    place = list(model.graph.node).index(index)
    casts = [
        helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT)
        for name in index.input
    ]
    add = helper.make_node("Add", [f"{name}.float" for name in index.input], ["index.float"])
    back = helper.make_node("Cast", ["index.float"], ["index.wide"], to=TensorProto.INT64)
    last = helper.make_tensor("last", TensorProto.INT64, [1], [2 * wide.MAX_LENGTH - 2])
    model.graph.initializer.append(last)
    least = helper.make_node("Min", ["index.wide", "last"], list(index.output))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *casts, add, back, least, *nodes[place + 1 :]])
    faulty = tmp_path / "faulty.onnx"
    onnx.save(model, str(faulty), save_as_external_data=True, location="faulty.weights")
    rows, expected = rows_and_reference(bundle)
    exact = run_graph(faulty, rows)["embedding"]
    assert cosines(exact, expected).min() >= 0.99999
    wrong = run_graph(rounded(faulty, tmp_path / "models"), rows)["embedding"]
    assert cosines(wrong, expected).min() < 0.999
