from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fletcher.errors import ModelError
from fletcher.models.bundle.registry import Registry

from .conftest import GOLDEN, EditCheckpoint

Change = Callable[[onnx.ModelProto], object]


def graph(
    *,
    output: str = "last_hidden_state",
    rank: int = 3,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids"),
    shape: tuple[str | int, ...] = ("batch", "length"),
) -> onnx.ModelProto:
    """A graph as an exporter writes one: a table of embeddings, one row a token."""
    table = numpy_helper.from_array(np.ones((102, 32), np.float32), "table")
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["tokens"])]
    if rank == 3:
        nodes.append(helper.make_node("Identity", ["tokens"], [output]))
        result = ["batch", "length", 32]
    else:
        nodes.append(helper.make_node("ReduceMean", ["tokens"], [output], axes=[1], keepdims=0))
        result = ["batch", 32]
    made = helper.make_graph(
        nodes,
        "exported",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, result)],
        [table],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])


def save(model: onnx.ModelProto, folder: Path, *, external: bool = False) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def test_token_embeddings_are_pooled_after_the_graph(
    checkpoint: EditCheckpoint, tmp_path: Path
) -> None:
    path = save(graph(), checkpoint(), external=True)
    bundle = Registry(tmp_path / "models").add_model(str(path), name="theirs", progress=print)
    assert (bundle.family, bundle.graph_output) == ("onnx", "token_embeddings")
    assert bundle.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert bundle.outputs == ("last_hidden_state",)
    assert (bundle.dim, bundle.pooling, bundle.normalize) == (32, "mean", True)
    assert not bundle.graph_normalizes
    assert (bundle.folder / "weights.bin").stat().st_size == 102 * 32 * 4
    Registry(tmp_path / "models").verify_model("theirs")


def test_pooled_outputs_are_preferred(checkpoint: EditCheckpoint, tmp_path: Path) -> None:
    model = graph()
    pooled = graph(output="sentence_embedding", rank=2).graph
    model.graph.node.append(pooled.node[-1])
    model.graph.output.append(pooled.output[0])
    path = save(model, checkpoint())
    bundle = Registry(tmp_path / "models").add_model(str(path), progress=print)
    assert bundle.name == "checkpoint"  # model.onnx says nothing: its folder's name
    assert (bundle.graph_output, bundle.outputs) == ("embedding", ("sentence_embedding",))


@pytest.mark.parametrize("name", ["logits", "pooler_output", "scores"])
@pytest.mark.parametrize("rank", [2, 3])
def test_an_output_that_may_be_anything_must_be_named(
    checkpoint: EditCheckpoint, tmp_path: Path, name: str, rank: int
) -> None:
    path = str(save(graph(output=name, rank=rank), checkpoint()))
    registry = Registry(tmp_path / "models")
    with pytest.raises(ModelError, match=f"has the outputs {name}, and none of .*--output"):
        registry.add_model(path, progress=print)
    with pytest.raises(ModelError, match=f"has the outputs {name}, and none called 'other'"):
        registry.add_model(path, output="other", progress=print)
    assert registry.add_model(path, output=name, progress=print).outputs == (name,)


def test_the_output_is_part_of_the_hash(checkpoint: EditCheckpoint, tmp_path: Path) -> None:
    model = graph()
    model.graph.node.append(helper.make_node("Identity", ["tokens"], ["other"]))
    model.graph.output.append(graph(output="other").graph.output[0])
    path = str(save(model, checkpoint()))
    registry = Registry(tmp_path / "models")
    one = registry.add_model(path, name="one", progress=print)
    other = registry.add_model(path, name="other", output="other", progress=print)
    assert one.hash != other.hash


def test_a_model_of_another_family_is_added_as_its_refusal_says(
    checkpoint: EditCheckpoint, tmp_path: Path
) -> None:
    """T5: no `hidden_size` and no number of positions in config.json."""
    folder = checkpoint(tokenizer_config={"model_max_length": 24})
    (folder / "sentence_bert_config.json").unlink()
    config = '{"model_type": "t5", "d_model": 32, "is_encoder_decoder": true, "vocab_size": 102}'
    (folder / "config.json").write_text(config)
    registry = Registry(tmp_path / "models")
    with pytest.raises(ModelError, match="export the model with its pooling to ONNX"):
        registry.add_model(str(folder), progress=print)
    inputs = ("input_ids", "attention_mask")
    path = save(graph(output="sentence_embedding", rank=2, inputs=inputs), folder)
    bundle = registry.add_model(str(path), progress=print)
    assert (bundle.graph_output, bundle.dim, bundle.max_length) == ("embedding", 32, 24)


@pytest.mark.parametrize("name", ["splade", "colbert", "pylate"])
def test_a_graph_of_a_model_without_dense_vectors_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(GOLDEN / "outputs" / name, folder)
    path = save(graph(), folder)
    with pytest.raises(ModelError, match=r"gives (sparse|multi) vectors"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)


def test_the_hubs_layout_and_a_given_tokenizer(checkpoint: EditCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    (folder / "onnx").mkdir()
    path = save(graph(), folder / "onnx")
    tokenizer = (folder / "tokenizer.json").rename(tmp_path / "mine.json")
    registry = Registry(tmp_path / "models")
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        registry.add_model(str(path), name="x", progress=print)
    bundle = registry.add_model(str(path), name="x", tokenizer=str(tokenizer), progress=print)
    digest = hashlib.sha256(bundle.tokenizer.read_bytes()).hexdigest()
    assert digest == hashlib.sha256(tokenizer.read_bytes()).hexdigest()


def test_a_graph_without_its_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = save(graph(), tmp_path / "a" / "b")
    with pytest.raises(ModelError, match=r"config\.json"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (graph(inputs=("input_ids", "pixel_values")), "inputs input_ids, pixel_values"),
        (graph(shape=("batch", 128)), "fixed shape"),
        (graph(shape=("batch", "length", "x")), "not int64"),
    ],
)
def test_what_cannot_be_fed_is_refused(
    checkpoint: EditCheckpoint, tmp_path: Path, model: onnx.ModelProto, message: str
) -> None:
    path = save(model, checkpoint())
    with pytest.raises(ModelError, match=message):
        Registry(tmp_path / "models").add_model(str(path), progress=print)


def test_no_float_output_is_refused(checkpoint: EditCheckpoint, tmp_path: Path) -> None:
    model = graph()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    path = save(model, checkpoint())
    with pytest.raises(ModelError, match="no output that is float32"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)


def test_an_output_width_unlike_the_config_is_refused(
    checkpoint: EditCheckpoint, tmp_path: Path
) -> None:
    path = save(
        graph(),
        checkpoint(
            config={"hidden_size": 64}, **{"1_Pooling__config": {"word_embedding_dimension": 64}}
        ),
    )
    with pytest.raises(ModelError, match="32 wide"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
def test_a_truncated_file_is_refused(checkpoint: EditCheckpoint, tmp_path: Path, keep: int) -> None:
    path = save(graph(), checkpoint())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="no complete ONNX model"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)
    assert Registry(tmp_path / "models").names() == []


@pytest.mark.parametrize(
    "location", ["../weights.bin", "/etc/hostname", "tokenizer.json", "model.onnx", "", "link"]
)
def test_external_data_stays_inside(
    checkpoint: EditCheckpoint, tmp_path: Path, location: str
) -> None:
    folder = checkpoint()
    path = save(graph(), folder, external=True)
    (tmp_path / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
    (folder / "link").symlink_to(tmp_path / "weights.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="external data"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)


def test_external_data_hidden_in_a_constant_is_seen(
    checkpoint: EditCheckpoint, tmp_path: Path
) -> None:
    model = graph()
    hidden = helper.make_tensor("hidden", TensorProto.FLOAT, [1], [0.0])
    hidden.ClearField("float_data")
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="../../secret")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=hidden))
    folder = checkpoint()
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="external data"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)


def test_short_or_missing_external_data_is_refused(
    checkpoint: EditCheckpoint, tmp_path: Path
) -> None:
    folder = checkpoint()
    path = save(graph(), folder, external=True)
    weights = folder / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"weights\.bin is cut off"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)
    weights.unlink()
    with pytest.raises(ModelError, match=r"weights\.bin, the file of model\.onnx"):
        Registry(tmp_path / "models").add_model(str(path), progress=print)
