"""Settings of a checkpoint that change vectors are honoured or refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from tests.unit.models.conftest import GOLDEN


def change(tmp_path: Path, base: str, edits: dict[str, Any]) -> Path:
    """A checkpoint with changed JSON files; None deletes a file, a list replaces it."""
    folder = tmp_path / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / base, folder)
    for name, fields in edits.items():
        path = folder / name
        if fields is None:
            path.unlink()
            continue
        merged = path.exists() and isinstance(fields, dict)
        present = json.loads(path.read_text()) if merged else {}
        path.write_text(json.dumps({**present, **fields} if merged else fields))
    return folder


def add(tmp_path: Path, base: str, edits: dict[str, Any]) -> ModelBundle:
    folder = change(tmp_path, base, edits)
    return Registry(tmp_path / "models").add_model(str(folder), progress=print, replace=True)


def module(kind: str, path: str) -> dict[str, str]:
    return {"type": kind, "path": path}


OURS = "sentence_transformers.models."
CLASSIFIER = "BertForSequenceClassification"
BERT = {"tokenizer_class": "BertTokenizer"}


@pytest.mark.parametrize(
    ("base", "edits", "message"),
    [
        # Keys that a family does not know.
        ("families/qwen3", {"config.json": {"use_bidirectional_attention": True}}, "use_bidir"),
        ("families/qwen3", {"config.json": {"is_causal": "no"}}, "`is_causal` is 'no'"),
        ("families/roberta", {"config.json": {"is_causal": True}}, "`is_causal` is True"),
        ("families/modernbert", {"config.json": {"attention_scale": 2}}, "`attention_scale` is 2"),
        ("families/distilbert", {"config.json": {"pruned_heads": {"0": [1]}}}, "`pruned_heads`"),
        ("families/mpnet", {"config.json": {"embedding_size": 8}}, "`embedding_size` is 8"),
        ("families/nomic_bert", {"config.json": {"head_dim": 4}}, "`head_dim` is 4, expected 8"),
        # Numbers of which lists are made before a weight is read.
        (
            "families/modernbert",
            {"config.json": {"num_hidden_layers": 2**31 - 1}},
            "`num_hidden_layers` is 2147483647, expected 1 to 10,000",
        ),
        (
            "families/distilbert",
            {"config.json": {"n_heads": 2**17}},
            "`n_heads` is 131072, expected 1 to 65,536",
        ),
        ("families/qwen3", {"config.json": {"head_dim": 2**30}}, "`head_dim` is 1073741824"),
        # Rotary positions of which no angle can be computed.
        (
            "families/modernbert",
            {"config.json": {"rope_parameters": {"full_attention": 5}}},
            "`rope_parameters` is of type 5",
        ),
        *(
            (
                "families/qwen3",
                {"config.json": {"rope_theta": theta, "rope_parameters": None}},
                "`rope_theta` is",
            )
            for theta in (1, 0.5, float("nan"), float("inf"), 10**400)
        ),
        (
            "families/distilbert",
            {"config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": [1]}},
            "expected texts by name as `prompts`",
        ),
        ("families/jina_bert", {"config.json": {"use_qk_norm": True}}, "`use_qk_norm` is True"),
        ("tiny", {"config.json": {"auto_map": {"AutoModel": "x.Y"}}}, "`auto_map`.*other code"),
        ("tiny", {"config.json": {"quantization_config": {"bits": 4}}}, "changes the weights"),
        ("tiny", {"config.json": {"vocab_size": 2**40}}, "`vocab_size`"),
        ("families/roberta", {"config.json": {"pad_token_id": 5000}}, "`pad_token_id`|`max_pos"),
        # Somebody's own code.
        (
            "tiny",
            {"modules.json": [module("mine.Transformer", "")]},
            "mine.Transformer.*other code",
        ),
        (
            "tiny",
            {"modules.json": [module("sentence_transformersx.models.Transformer", "")]},
            "other code",
        ),
        (
            "families/distilbert",
            {"2_Dense/config.json": {"activation_function": "torchx.nn.Tanh"}},
            "`activation_function` is 'torchx.nn.Tanh'",
        ),
        ("families/distilbert", {"2_Dense/config.json": {"scale": 2}}, "`scale` is 2"),
        (
            "tiny",
            {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a", "b"]}}},
            "auto_map",
        ),
        # What is no embedding model, or not all of one.
        ("tiny", {"adapter_config.json": {"r": 8}}, "adapter_config.json is an adapter"),
        (
            "tiny",
            {
                "modules.json": None,
                "config.json": {"architectures": ["BertForSequenceClassification"]},
            },
            "cross-encoder",
        ),
        (
            "tiny",
            {"config_sentence_transformers.json": {"model_type": "CrossEncoder"}},
            "`model_type` is 'CrossEncoder'",
        ),
        # Settings of sentence-transformers.
        ("tiny", {"config_sentence_transformers.json": {"max_active_dims": 8}}, "max_active_dims"),
        ("tiny", {"config_sentence_transformers.json": {"truncate_dim": "8"}}, "`truncate_dim`"),
        ("tiny", {"config_sentence_transformers.json": {"similarity_fn_name": "MaxSim"}}, "MaxSim"),
        ("tiny", {"sentence_bert_config.json": {"transformer_task": "any-to-any"}}, "any-to-any"),
        (
            "tiny",
            {"sentence_bert_config.json": {"processing_kwargs": {"text": 1}}},
            "processing_kw",
        ),
        ("tiny", {"sentence_bert_config.json": {"model_args": {"num_labels": 2}}}, "`num_labels`"),
        ("tiny", {"sentence_bert_config.json": {"tokenizer_args": [1]}}, "`tokenizer_args`"),
        (
            "tiny",
            {"sentence_bert_config.json": {"tokenizer_args": {"truncation_side": "left"}}},
            "`truncation_side` is 'left', expected right",
        ),
        ("tiny", {"sentence_bert_config.json": {"max_seq_length": -3}}, "at least 2"),
        # Settings of the tokenizer.
        ("tiny", {"tokenizer_config.json": {"truncation_side": "left"}}, "`truncation_side`"),
        ("tiny", {"tokenizer_config.json": {"split_special_tokens": True}}, "split_special_tokens"),
        ("tiny", {"tokenizer_config.json": {**BERT, "sep_token": "[MASK]"}}, "`sep_token`"),
        ("tiny", {"tokenizer_config.json": {**BERT, "unk_token": "[MASK]"}}, "`unk_token`"),
        ("tiny", {"tokenizer_config.json": {"pad_token": "[NEW]"}}, r"`pad_token` names.*\[NEW\]"),
        ("tiny", {"special_tokens_map.json": {"mask_token": {"content": "<m>"}}}, "'<m>'"),
        ("tiny", {"added_tokens.json": {"<product>": 102}}, "added_tokens.json: `<product>`"),
        ("tiny", {"added_tokens.json": {"[MASK]": 3}}, "names the token '.MASK.' with id 3"),
        (
            "tiny",
            {"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "[MASK]"}}}},
            "`added_tokens_decoder`",
        ),
        (
            "tiny",
            {"tokenizer_config.json": {"add_eos_token": True, "eos_token": "[MASK]"}},
            "`add_eos_token` is True",
        ),
        (
            "families/xlm_roberta",
            {"tokenizer_config.json": {"add_prefix_space": False}},
            "`add_prefix_space` is False, expected true",
        ),
        (
            "families/xlm_roberta",
            {"tokenizer_config.json": BERT},
            "`normalizer` is of type 'Sequence', expected BertNormalizer",
        ),
    ],
)
def test_a_setting_is_refused_by_name(
    tmp_path: Path, base: str, edits: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        add(tmp_path, base, edits)
    assert Registry(tmp_path / "models").names() == []


@pytest.mark.parametrize(
    "edits",
    [
        {"config.json": {"gradient_checkpointing": True, "id2label": {"0": "x"}, "mystery": None}},
        {"config.json": {"position_embedding_type": "absolute", "pruned_heads": {}}},
        {"sentence_bert_config.json": {"model_args": {"torch_dtype": "float16"}}},
        {"sentence_bert_config.json": {"modality_config": {"text": {"method": "forward"}}}},
        {"tokenizer_config.json": {**BERT, "do_lower_case": True, "clean_up_tokenization": True}},
        {"special_tokens_map.json": {"mask_token": "[MASK]", "cls_token": {"content": "[CLS]"}}},
        {"added_tokens.json": {"[MASK]": 4}},
        {"config_sentence_transformers.json": {"__version__": {"pytorch": "2"}}},
    ],
)
def test_settings_without_effect_change_no_hash(
    tmp_path: Path, tiny_bundle: ModelBundle, edits: dict[str, Any]
) -> None:
    assert add(tmp_path, "tiny", edits).hash == tiny_bundle.hash


def test_pylate_is_read_as_pylate_writes_it(tmp_path: Path) -> None:
    settings = {
        "similarity_fn_name": "MaxSim",
        "model_type": "ColBERT",
        "document_length": 24,
        "query_length": 12,
    }
    edits = {
        "config_sentence_transformers.json": settings,
        # The length that PyLate tokenized last.
        "sentence_bert_config.json": {"max_seq_length": 7, "do_lower_case": False},
        "1_Dense/config.json": {"module_input_name": "sentence_embedding", "use_residual": False},
    }
    bundle = add(tmp_path, "outputs/pylate", edits)
    assert (bundle.output, bundle.similarity) == ("multi", "cosine")
    assert (bundle.max_length, bundle.query_length) == (24, 12)
    with pytest.raises(ModelError, match="`similarity_fn_name` is 'sum'"):
        add(
            tmp_path,
            "outputs/pylate",
            {"config_sentence_transformers.json": {"similarity_fn_name": "sum"}},
        )


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    folder = change(tmp_path, "families/distilbert", {})
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 300, "content": "<product>"})
    path.write_text(json.dumps(spec))
    with pytest.raises(ModelError, match=r"'<product>' has id 300.*below 300"):
        Registry(tmp_path / "models").add_model(str(folder), progress=print)


def test_a_token_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    folder = change(tmp_path, "families/distilbert", {})
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"][0]["content"] = "\ud800"
    path.write_text(json.dumps(spec))
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        Registry(tmp_path / "models").add_model(str(folder), progress=print)


FUZZED = [
    *("config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"),
    *("1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json"),
    "config_sentence_transformers.json",
]
ODD = [
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [None],
    {},
    {"x": []},
]


def fuzz(value: Any, generator: np.random.Generator) -> Any:
    """The value with one of its parts replaced by an odd one."""
    if isinstance(value, dict) and value and generator.random() < 0.8:
        key = str(generator.choice(list(value)))
        return {**value, key: fuzz(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        index = int(generator.integers(len(value)))
        return [*value[:index], fuzz(value[index], generator), *value[index + 1 :]]
    return ODD[int(generator.integers(len(ODD)))]


@pytest.mark.parametrize("name", FUZZED)
def test_odd_values_are_added_or_refused(tmp_path: Path, name: str) -> None:
    """Errors of the tree alone: no TypeError, OverflowError or RecursionError."""
    generator = np.random.default_rng(len(name))
    folder = change(tmp_path, "families/distilbert", {})
    original = json.loads((folder / name).read_text())
    if name == "tokenizer.json":  # nearly all of it is the vocabulary
        original["model"]["vocab"] = dict(list(original["model"]["vocab"].items())[:8])
    for _ in range(40):
        (folder / name).write_text(json.dumps(fuzz(original, generator)))
        with contextlib.suppress(ModelError):
            Registry(tmp_path / "models").add_model(str(folder), progress=print, replace=True)


def test_deep_files_give_errors_of_the_tree(tmp_path: Path) -> None:
    for name in FUZZED:
        folder = change(tmp_path, "families/distilbert", {})
        for depth in (990, 100_000):
            (folder / name).write_text('{"architectures": ' + "[" * depth + "]" * depth + "}")
            with contextlib.suppress(ModelError):
                Registry(tmp_path / "models").add_model(str(folder), progress=print, replace=True)
