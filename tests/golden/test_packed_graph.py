"""The graph without padding computes what the padded one does; on a CPU by its twin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
import tokenizers

from fletcher.core.batches import MicroBatch
from fletcher.errors import ModelError
from fletcher.inference.packed_io import PackedIO
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.models.onnx.packed import INPUTS, Attention, Precision, write_packed

from .onnx_session import cosines, run_graph

GOLDEN = Path(__file__).parent
LENGTHS = [17, 1, 256, 2, 128, 1, 256, 31]
Vectors = npt.NDArray[np.float32]


def add_tiny(folder: Path, pooling: str, *, normalize: bool = True) -> ModelBundle:
    checkpoint = folder / "tiny"
    shutil.copytree(GOLDEN / "tiny", checkpoint)
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    if not normalize:
        modules = checkpoint / "modules.json"
        modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    return Registry(folder / "models").add_model(str(checkpoint), progress=print)


class Twin:
    """The graph with standard operators for attention, on the CPU."""

    def __init__(
        self, bundle: ModelBundle, folder: Path, precision: Precision, output: Precision = "float32"
    ) -> None:
        folder.mkdir(parents=True)
        graph = write_packed(
            bundle, folder, precision=precision, attention="standard", output=output
        )
        self.session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.io = PackedIO.packed(bundle)

    def run(self, rows: list[list[int]]) -> dict[str, Vectors]:
        ids = np.concatenate(rows).astype(np.int32)
        feeds, _ = self.io.feeds(MicroBatch(ids, np.array([len(row) for row in rows], np.int32)))
        names = [one.name for one in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def random_rows(lengths: list[int], vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(5, vocabulary, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def twin(default_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return Twin(default_bundle, tmp_path_factory.mktemp("packed") / "float32", "float32")


def test_the_twin_equals_the_padded_graph_at_mixed_lengths_in_any_order(
    default_bundle: ModelBundle, twin: Twin
) -> None:
    rows = random_rows(LENGTHS, 20_000)
    expected = run_graph(default_bundle.graph, rows)
    for order in (range(len(rows)), reversed(range(len(rows))), [2, 0, 5], [1], [6]):
        places = list(order)
        actual = twin.run([rows[place] for place in places])
        assert cosines(actual["embedding"], expected["embedding"][places]).min() >= 0.99999
        assert np.abs(actual["embedding"] - expected["embedding"][places]).max() < 1e-5
        assert np.allclose(actual["norm"], expected["norm"][places], rtol=1e-5)


def test_the_twin_equals_sentence_transformers(default_bundle: ModelBundle, twin: Twin) -> None:
    table = pq.read_table(GOLDEN / "minilm.parquet")
    tokenizer = tokenizers.Tokenizer.from_file(str(default_bundle.tokenizer))
    tokenizer.no_padding()
    tokenizer.enable_truncation(default_bundle.max_length)
    rows = [one.ids for one in tokenizer.encode_batch(table["text"].to_pylist())]
    expected = np.array(table["embedding"].to_pylist(), np.float32)
    assert cosines(twin.run(rows)["embedding"], expected).min() >= 0.99999


def test_weights_in_float16_stay_within_what_float16_may_lose(
    default_bundle: ModelBundle, tmp_path: Path
) -> None:
    rows = random_rows(LENGTHS, 20_000)
    expected = run_graph(default_bundle.graph, rows)["embedding"]
    actual = Twin(default_bundle, tmp_path / "float16", "float16", "float16").run(rows)
    assert actual["embedding"].dtype == np.float16
    assert actual["norm"].dtype == np.float32
    assert cosines(actual["embedding"], expected).min() >= 0.999
    assert cosines(actual["embedding"], expected).mean() >= 0.9999


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_pooling_equals_transformers(tmp_path: Path, pooling: str, normalize: bool) -> None:
    bundle = add_tiny(tmp_path, pooling, normalize=normalize)
    table = pq.read_table(GOLDEN / "tiny.parquet")
    expected = np.array(table[f"{pooling}_gelu"].to_pylist(), np.float32)
    outputs = Twin(bundle, tmp_path / "twin", "float32").run(table["input_ids"].to_pylist())
    assert list(outputs) == (["embedding", "norm"] if normalize else ["embedding"])
    raw = outputs["embedding"] * outputs.get("norm", np.float32(1))
    assert np.abs(raw - expected).max() < 2e-5


def write(bundle: ModelBundle, folder: Path, attention: Attention) -> onnx.ModelProto:
    folder.mkdir()
    path = write_packed(bundle, folder, attention=attention)
    # With weights for inference of shapes; ONNX knows ONNX Runtime's operators by name only.
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(str(path), load_external_data=False)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_packed_graph_is_the_twin_but_for_attention(tmp_path: Path, pooling: str) -> None:
    bundle = add_tiny(tmp_path, pooling)
    packed = write(bundle, tmp_path / "packed", "packed")
    twin = write(bundle, tmp_path / "twin", "standard")
    attention = [node for node in packed.graph.node if node.op_type == "PackedMultiHeadAttention"]
    assert [node.output[0] for node in attention] == ["layer.0.attended", "layer.1.attended"]
    for layer, node in enumerate(attention):
        assert node.domain == "com.microsoft"
        parts = [f"layer.{layer}.{part}" for part in "qkv"]
        assert list(node.input) == [*parts, "", "token_offset", "cumulative_sequence_length"]
        assert {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute} == {
            "num_heads": 4,
            "scale": 1.0,
        }
    names = {node.output[0] for node in attention}

    def outside(model: onnx.ModelProto) -> list[bytes]:
        inner = [f"{name}." for name in names if name.endswith(".attended")]
        ends = (".flat", ".padded", ".heads")
        return [
            node.SerializeToString()
            for node in model.graph.node
            if node.output[0] not in names
            and not node.output[0].startswith("twin.")
            and not (
                any(node.output[0].startswith(name) for name in inner)
                and not node.output[0].endswith(".attended.one")
            )
            and not (node.output[0].startswith("layer.") and node.output[0].endswith(ends))
        ]

    assert outside(packed) == outside(twin)
    assert len(outside(packed)) == len(packed.graph.node) - 2
    kept = [one for one in twin.graph.initializer if not one.name.startswith("twin.")]
    assert [one.name for one in kept] == [one.name for one in packed.graph.initializer]
    assert [one.name for one in packed.graph.input] == list(INPUTS)
    assert list(packed.graph.output) == list(twin.graph.output)


def test_products_are_over_tokens_and_their_weights_in_float16(tmp_path: Path) -> None:
    model = write(add_tiny(tmp_path, "mean"), tmp_path / "packed", "packed")
    weights = {one.name: one for one in model.graph.initializer if one.name.startswith("layer.")}
    assert {one.data_type for one in weights.values()} == {onnx.TensorProto.FLOAT16}
    # The operator that ONNX does not know leaves values after it without a shape.
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {
        one.name: [size.dim_param or size.dim_value for size in one.type.tensor_type.shape.dim]
        for one in inferred.graph.value_info
    }
    assert {tuple(shapes[f"layer.0.{part}"]) for part in "qkv"} == {("tokens", 32)}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_onnx_runtime_lacks_nothing_of_the_packed_graph_but_the_kernel(
    tmp_path: Path, pooling: str, precision: Precision
) -> None:
    # It checks operators, types and shapes first, and knows PackedMultiHeadAttention there.
    path = write_packed(add_tiny(tmp_path, pooling), tmp_path, precision=precision)
    with pytest.raises(Exception, match=r"for (com\.microsoft\.)?PackedMultiHeadAttention"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # On CUDA, with ONNX Runtime 1.31, these operators need cuDNN, which may be missing.
    operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert not operators & {"ReduceL2", "ReduceMax", "ReduceMin", "ReduceProd", "Conv"}


def test_for_cls_the_last_layer_goes_on_with_one_token_a_text(tmp_path: Path) -> None:
    model = write(add_tiny(tmp_path, "cls"), tmp_path / "packed", "packed")
    inputs = {node.output[0]: list(node.input) for node in model.graph.node}
    assert inputs["layer.1.projected.product"][0] == "layer.1.attended.one"
    assert inputs["layer.0.projected.product"][0] == "layer.0.attended"
    assert inputs["layer.1.attended.one"] == ["layer.1.attended", "starts"]


def test_other_families_and_damaged_graphs_are_refused(tmp_path: Path) -> None:
    bundle = add_tiny(tmp_path, "mean")
    bundle.graph.write_bytes(b"\x0a\x02no")
    with pytest.raises(ModelError, match="is no BERT graph that this Fletcher wrote"):
        write_packed(bundle, tmp_path)
