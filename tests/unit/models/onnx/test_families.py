"""What families' config.json and sentence-transformers' files may say, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fletcher.cli import main
from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.models.onnx.positions import alibi_slopes

FAMILIES = Path(__file__).parents[3] / "golden" / "families"

Edit = Callable[..., Path]


@pytest.fixture
def family(tmp_path: Path) -> Edit:
    """A copy of a family's checkpoint, `edits` merged into its JSON files (`__` stands for `/`)."""

    def copy(name: str, **edits: dict[str, Any]) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(FAMILIES / name, folder)
        for file, fields in edits.items():
            path = folder / f"{file.replace('__', '/')}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return folder

    return copy


def add(folder: Path) -> ModelBundle:
    return Registry(folder.parent / "models").add_model(str(folder), progress=print)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("roberta", {"model_type": "xlm-mystery"}, "'xlm-mystery', expected one of bert"),
        ("roberta", {"hidden_act": "mish"}, "`hidden_act` is 'mish', expected one of gelu"),
        ("roberta", {"position_embedding_type": "relative_key"}, "expected 'absolute'"),
        ("distilbert", {"activation": "swish"}, "`activation` is 'swish'"),
        ("distilbert", {"n_heads": 5}, "no multiple of `n_heads` 5"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "`relative_attention_num_buckets` is 64"),
        ("nomic_bert", {"prenorm": True}, "`prenorm` is True, expected False"),
        ("nomic_bert", {"rotary_emb_fraction": 0.5}, "`rotary_emb_fraction` is 0.5"),
        ("nomic_bert", {"rotary_scaling_factor": 2}, "`rotary_scaling_factor` is 2"),
        ("nomic_bert", {"num_experts": 8}, "`num_experts` is 8"),
        (
            "nomic_bert",
            {"activation_function": "gelu_fast"},
            "`activation_function` is 'gelu_fast'",
        ),
        ("modernbert", {"layer_types": ["linear_attention"] * 4}, "`layer_types` is"),
        ("modernbert", {"hidden_activation": "x"}, "`hidden_activation` is 'x'"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn"}}, "`factor` is None"),
        ("nomic_bert", {"rope_scaling": {"rope_type": "yarn"}}, "`rope_scaling` is of type 'yarn'"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic"}}, "`rope_parameters` is of type"),
        ("qwen3", {"use_sliding_window": True}, "`use_sliding_window` is True"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "expected 3 of full_attention"),
        ("qwen3", {"layer_types": 3}, "`layer_types` is 3"),
        ("modernbert", {"layer_types": 4}, "`layer_types` is 4"),
        ("roberta", {"layer_norm_eps": "x"}, "`layer_norm_eps` is 'x'"),
        ("roberta", {"pad_token_id": "x"}, "`pad_token_id` is 'x'"),
        ("jina_bert", {"pad_token_id": "x"}, "`pad_token_id` is 'x'"),
        ("roberta", {"hidden_act": ["gelu"]}, r"`hidden_act` is \['gelu'\]"),
        ("qwen3", {"num_key_value_heads": 3}, "expected a multiple of `num_key_value_heads` 3"),
        ("qwen3", {"head_dim": 8}, r"`layers.0.self_attn.q_proj.weight` has shape \[64, 32\]"),
        ("jina_bert", {"feed_forward_type": "original"}, "`feed_forward_type` is 'original'"),
    ],
)
def test_what_a_family_cannot_compute_is_refused_by_name(
    family: Edit, name: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        add(family(name, config=config))


def test_an_epsilon_of_null_is_the_usual_one(family: Edit) -> None:
    usual, null = (add(family("roberta", config={"layer_norm_eps": one})) for one in (1e-12, None))
    assert usual.hash == null.hash


# What checkpoints on the hub say, in the words of their time.
PUBLISHED = {
    "nomic_bert": {
        "activation_function": "swiglu",
        "causal": False,
        "layer_norm_epsilon": 1e-12,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "n_embd": 32,
        "n_head": 4,
        "n_inner": 48,
        "n_layer": 2,
        "n_positions": 130,
        "parallel_block": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "type_vocab_size": 2,
        "use_rms_norm": False,
    },
    "modernbert": {
        "attention_bias": False,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "hidden_activation": "gelu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "local_attention": 16,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 130,
        "mlp_bias": False,
        "norm_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "position_embedding_type": "absolute",
    },
    "qwen3": {
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 130,
        "max_window_layers": 28,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "use_sliding_window": False,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_older_configs_mean_the_same(family: Edit, name: str) -> None:
    folder = family(name)
    plain = add(folder)
    config = folder / "config.json"
    new = json.loads(config.read_text())
    same = {key: new[key] for key in ("model_type", "vocab_size", "pad_token_id")}
    dims = {"matryoshka_dimensions": new.get("matryoshka_dimensions")}
    config.write_text(json.dumps({**same, **dims, **PUBLISHED[name]}))
    again = folder.rename(folder.with_name("published"))
    assert add(again).hash == plain.hash


def test_theta_is_read_wherever_it_stands(family: Edit) -> None:
    hashes = [
        add(family("qwen3", config=config)).hash
        for config in (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_parameters": None, "rope_theta": 500_000},
            {"rope_parameters": None, "rope_theta": 500_000, "rope_scaling": {"type": "default"}},
            {"rope_parameters": None},
        )
    ]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_both_layouts_of_nomic_checkpoints_give_the_same_graph(family: Edit) -> None:
    folder, other = family("nomic_bert"), family("nomic_bert")
    renamed = {}
    for published, tensor in safetensors.numpy.load_file(folder / "model.safetensors").items():
        name = published
        for old, new in (
            ("encoder.layers", "layers"),
            ("emb_ln", "embeddings.LayerNorm"),
            ("attn.out_proj", "self_attn.o_proj"),
            ("fc11", "up_proj"),
            ("fc12", "gate_proj"),
            ("fc2", "down_proj"),
            ("norm1", "post_attention_layernorm"),
            ("norm2", "post_mlp_layernorm"),
        ):
            name = name.replace(old, new)
        if "Wqkv" not in name:
            renamed[f"nomic_bert.{name}"] = tensor
            continue
        for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
            stored = name.replace("attn.Wqkv", f"self_attn.{part}_proj")
            renamed[f"nomic_bert.{stored}"] = np.ascontiguousarray(rows)
    safetensors.numpy.save_file(renamed, other / "model.safetensors")
    first, second = add(folder), add(other)
    assert first.graph.read_bytes() == second.graph.read_bytes()
    weights = [bundle.graph.with_name("model.weights") for bundle in (first, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("roberta", "encoder.layer.1.attention.self.layer_norm_q.weight"),
        ("jina_bert", "encoder.layer.0.attention.self.layer_norm_k.weight"),
        ("nomic_bert", "encoder.layers.0.attn.Wqkv.bias"),
        ("modernbert", "layers.0.attn_norm.weight"),
        ("qwen3", "layers.2.self_attn.q_proj.bias"),
    ],
)
def test_a_tensor_that_no_graph_is_made_of_is_refused(family: Edit, name: str, tensor: str) -> None:
    folder = family(name)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights[tensor] = np.zeros(32, np.float16)
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"has a tensor `{tensor}`"):
        add(folder)


def test_unused_heads_and_buffers_are_accepted(family: Edit) -> None:
    folder = family("roberta")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    plain = add(folder).hash
    for name in ("lm_head.bias", "pooler.dense.weight", "embeddings.position_ids"):
        weights[name] = np.zeros(32, np.float16)
    weights = {f"roberta.{name}": tensor for name, tensor in weights.items()}
    other = family("roberta")
    safetensors.numpy.save_file(weights, other / "model.safetensors")
    assert add(other).hash == plain


@pytest.mark.parametrize("tensor", ["linear.weight", "bert.custom_text_proj.weight"])
def test_a_colbert_without_its_metadata_is_refused(tmp_path: Path, tensor: str) -> None:
    folder = tmp_path / "colbert"
    shutil.copytree(FAMILIES.parent / "outputs" / "colbert", folder)
    (folder / "artifact.metadata").unlink()
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights[tensor] = weights.pop("linear.weight")
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    name = tensor.removeprefix("bert.")
    with pytest.raises(ModelError, match=f"`{name}`.*dense vectors would.*artifact.metadata"):
        add(folder)


def test_a_choice_invisible_in_the_weights_changes_the_hash(family: Edit) -> None:
    plain = add(family("modernbert")).hash
    assert add(family("modernbert", config={"local_attention": 32})).hash != plain


def test_what_sentence_transformers_says_is_in_the_bundle(family: Edit) -> None:
    bundle = add(family("xlm_roberta"))
    assert bundle.family == "roberta"
    assert bundle.prompts == {"query": "query: ", "passage": "passage: "}
    assert bundle.default_prompt == "passage"
    assert (bundle.similarity, bundle.dims) == ("cosine", (32,))
    bundle = add(family("distilbert"))
    assert (bundle.dim, bundle.similarity, bundle.normalize) == (24, "dot", False)
    assert add(family("nomic_bert")).dims == (8, 16, 32)
    assert add(family("qwen3")).pooling == "last_token"


def test_a_bundle_without_similarity_still_loads(family: Edit) -> None:
    bundle = add(family("roberta"))
    path = bundle.folder / "fletcher.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("similarity") == "cosine"
    path.write_text(json.dumps(manifest))
    assert ModelBundle.from_folder(bundle.folder).similarity == "cosine"
    path.write_text(json.dumps({**manifest, "similarity": "taxicab"}))
    with pytest.raises(ModelError, match="`similarity` is 'taxicab', expected one of cosine, dot"):
        ModelBundle.from_folder(bundle.folder)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Mish"}, "`activation_function` is"),
        ({"in_features": 64}, "`in_features` and `out_features` are 64 and 24, expected 32"),
        ({"use_residual": True}, "`use_residual`"),
        ({"module_input_name": "token_embeddings"}, "`module_input_name` is 'token_embeddings'"),
        ({"out_features": 12}, r"shape \[24, 32\]"),
    ],
)
def test_a_dense_layer_that_a_graph_cannot_have_is_refused(
    family: Edit, edits: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        add(family("distilbert", **{"2_Dense__config": edits}))


def test_dense_weights_are_part_of_the_hash(family: Edit) -> None:
    plain = add(family("distilbert"))
    other = family("distilbert")
    weights = safetensors.numpy.load_file(other / "2_Dense" / "model.safetensors")
    weights["linear.bias"] = weights["linear.bias"] + 1
    safetensors.numpy.save_file(weights, other / "2_Dense" / "model.safetensors")
    assert add(other).hash != plain.hash


def test_an_unknown_similarity_is_refused(family: Edit) -> None:
    settings = {"config_sentence_transformers": {"similarity_fn_name": "maxsim"}}
    with pytest.raises(ModelError, match="`similarity_fn_name` is 'maxsim', expected one of"):
        add(family("distilbert", **settings))


def test_slopes_are_those_of_the_paper() -> None:
    assert np.allclose(-alibi_slopes(8).ravel(), [2.0**-n for n in range(1, 9)])
    assert np.allclose(
        -alibi_slopes(6).ravel(), [2.0**-n for n in (2, 4, 6, 8)] + [2.0**-1, 2.0**-3]
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in FAMILIES.glob("*.parquet")))
def test_every_family_is_added_and_shown_by_the_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path))
    assert main(["model", "add", str(FAMILIES / name), "--json"]) == 0
    added = json.loads(capsys.readouterr().out)
    assert main(["model", "show", name, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == added
    assert (shown["name"], shown["max_length"]) == (name, 130)
