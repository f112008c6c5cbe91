from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.models.checkpoint.checkpoint import _prompts
from fletcher.models.checkpoint.weights import SafetensorsFile
from tests.unit.models.conftest import EditCheckpoint


def add(folder: Path, models: Path) -> ModelBundle:
    return Registry(models).add_model(str(folder), progress=print)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"config": {"model_type": "gpt2"}}, "`model_type` is 'gpt2'"),
        ({"config": {"position_embedding_type": "relative_key"}}, "`position_embedding_type`"),
        ({"config": {"is_decoder": True}}, "`is_decoder`"),
        ({"config": {"hidden_act": "quick_gelu"}}, "`hidden_act` is 'quick_gelu'"),
        ({"config": {"num_hidden_layers": 3}}, "no tensor `encoder.layer.2"),
        ({"config": {"hidden_size": 64}}, "`word_embedding_dimension` is 32, expected 64"),
        ({"config": {"intermediate_size": 65}}, r"shape \[\d+, 32\]"),
        ({"config": {"hidden_size": "32"}}, "`hidden_size`"),
        ({"config": {"num_attention_heads": 5}}, "no multiple"),
        ({"config": {"vocab_size": None}}, "`vocab_size`"),
        ({"1_Pooling__config": {"pooling_mode": "median"}}, "`pooling_mode` is median"),
        ({"1_Pooling__config": {"pooling_mode": ["mean", "x"]}}, "`pooling_mode` is mean, x"),
        ({"1_Pooling__config": {"pooling_mode": [["mean"]]}}, r"1_Pooling/config.json is damaged"),
        ({"1_Pooling__config": {"weights": [1]}}, "`weights` is"),
        ({"1_Pooling__config": {"include_prompt": False}}, "`include_prompt`"),
        ({"sentence_bert_config": {"max_seq_length": "many"}}, "`max_seq_length`"),
        ({"config_sentence_transformers": {"prompts": {"query": 1}}}, "`prompts`"),
        ({"config_sentence_transformers": {"default_prompt_name": "x"}}, "`default_prompt_name`"),
    ],
)
def test_what_a_bundle_cannot_express_is_refused(
    checkpoint: EditCheckpoint, tmp_path: Path, edits: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        add(checkpoint(**edits), tmp_path / "models")
    assert Registry(tmp_path / "models").names() == []


@pytest.mark.parametrize(
    "names",
    [
        ["Transformer", "Normalize"],
        ["Transformer", "Pooling", "Normalize", "Dense"],
        ["Transformer", "Pooling", "LayerNorm"],
        ["StaticEmbedding", "Pooling"],
    ],
)
def test_other_modules_and_orders_are_refused(
    checkpoint: EditCheckpoint, tmp_path: Path, names: list[str]
) -> None:
    folder = checkpoint()
    listed = [{"path": "", "type": f"sentence_transformers.models.{name}"} for name in names]
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ModelError, match=f"lists {', '.join(names)}: expected Transformer"):
        add(folder, tmp_path / "models")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_missing_file_is_named(checkpoint: EditCheckpoint, tmp_path: Path, name: str) -> None:
    folder = checkpoint()
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        add(folder, tmp_path / "models")


def test_a_plain_folder_is_taken_as_sentence_transformers_takes_it(
    checkpoint: EditCheckpoint, tmp_path: Path
) -> None:
    folder = checkpoint(tokenizer_config={"model_max_length": 24})
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    bundle = add(folder, tmp_path / "models")
    assert (bundle.pooling, bundle.normalize, bundle.max_length) == ("mean", False, 24)
    assert bundle.outputs == ("embedding",)


def test_the_tokenizers_no_limit_is_ignored(checkpoint: EditCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint(tokenizer_config={"model_max_length": 1e30})
    (folder / "sentence_bert_config.json").unlink()
    assert add(folder, tmp_path / "models").max_length == 40  # max_position_embeddings


def test_hash_is_of_the_values_not_of_their_file(
    checkpoint: EditCheckpoint, tmp_path: Path, tiny_bundle: ModelBundle
) -> None:
    folder = checkpoint()
    weights = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    renamed = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor
        for name, tensor in tensors.items()
    }
    names = sorted(renamed, reverse=True)
    weights.unlink()
    half = len(names) // 2
    for shard, chosen in (("a.safetensors", names[:half]), ("b.safetensors", names[half:])):
        safetensors.numpy.save_file({name: renamed[name] for name in chosen}, folder / shard)
    index = {name: "a.safetensors" if name in names[:half] else "b.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert add(folder, tmp_path / "models").hash == tiny_bundle.hash

    tensors["embeddings.LayerNorm.bias"][0] += 1e-3
    safetensors.numpy.save_file(tensors, weights)
    assert add(folder, tmp_path / "others").hash != tiny_bundle.hash


@pytest.mark.parametrize(
    "edits",
    [
        {"config": {"layer_norm_eps": 1e-5}},
        {"config": {"hidden_act": "relu"}},
        {"config": {"num_attention_heads": 2}},
        {"1_Pooling__config": {"pooling_mode": "cls"}},
        {"sentence_bert_config": {"max_seq_length": 16}},
        {"config_sentence_transformers": {"default_prompt_name": "query"}},
        {
            "tokenizer": {"normalizer": None},
            "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
        },
        {"config_sentence_transformers": {"prompts": {"query": "ask: "}}},
        {"config_sentence_transformers": {"truncate_dim": 16}},
    ],
)
def test_what_changes_vectors_changes_the_hash(
    checkpoint: EditCheckpoint, tmp_path: Path, tiny_bundle: ModelBundle, edits: dict[str, Any]
) -> None:
    assert add(checkpoint(**edits), tmp_path / "models").hash != tiny_bundle.hash


def test_nomic_models_have_their_tasks_as_prompts() -> None:
    settings = {"prompts": {"query": ""}}
    nomic, _ = _prompts(settings, {"model_type": "nomic_bert"})
    assert nomic["search_query"] == "search_query: "
    assert set(nomic) == {"search_document", "search_query", "clustering", "classification"}
    assert _prompts(settings, {"model_type": "bert"}) == ({"query": ""}, None)


def test_a_shard_outside_the_folder_is_refused(checkpoint: EditCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"x": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names"):
        add(folder, tmp_path / "models")


def test_nan_in_the_weights_is_refused(checkpoint: EditCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.bias"][3] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="NaN"):
        add(folder, tmp_path / "models")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 50_000])
def test_a_cut_off_safetensors_file_is_refused(
    checkpoint: EditCheckpoint, tmp_path: Path, keep: int
) -> None:
    folder = checkpoint()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        add(folder, tmp_path / "models")


@pytest.mark.parametrize("shape", [[2**63, 0], [0], [], [2**40, 2**40], [1] * 200])
def test_a_tensor_of_an_impossible_shape_is_refused(
    checkpoint: EditCheckpoint, tmp_path: Path, shape: list[int]
) -> None:
    weights = checkpoint() / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header["embeddings.word_embeddings.weight"]
    header["embeddings.word_embeddings.weight"] = {**entry, "shape": shape, "data_offsets": [0, 0]}
    changed = json.dumps(header).encode()
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(ModelError, match=r"word_embeddings.weight` has shape \["):
        add(weights.parent, tmp_path / "models")


def test_element_types_are_widened_exactly(tmp_path: Path) -> None:
    half = np.array([1.5, -2.25, 65504.0], np.float16)
    bits = np.array([0x3FC0, 0xC010, 0x7F7F], np.uint16)  # the same numbers' bfloat16, and its max
    data = half.tobytes() + bits.tobytes()
    header = json.dumps(
        {
            "half": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
            "brain": {"dtype": "BF16", "shape": [3], "data_offsets": [6, 12]},
            "ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
            "outside": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "negative": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    file = SafetensorsFile(path)
    assert file.float32("half").tolist() == [1.5, -2.25, 65504.0]
    assert file.float32("brain").tolist() == [1.5, -2.25, float(np.float32(3.3895314e38))]
    with pytest.raises(ModelError, match="type I64"):
        file.float32("ids")
    for name in ("outside", "negative"):
        with pytest.raises(ModelError, match="does not lie inside"):
            file.float32(name)
