"""Checkpoint folders by sentence-transformers or plain Hugging Face transformers."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import TOKENIZER
from fletcher.models.bundle.files import (
    invalid_choice,
    invalid_value,
    is_inside,
    read_json,
    read_optional_json,
)
from fletcher.models.bundle.spec import SIMILARITIES, Pooling, Similarity
from fletcher.models.checkpoint.output_kind import OutputKind, read_kind

_NO_LIMIT = 10**9  # transformers writes 1e30 for tokenizers without a limit
_SETTINGS = "config_sentence_transformers.json"
_ORDER = re.compile(
    r"Transformer( Pooling( Dense)*( Normalize)?|( Dense)+)?|(MLM)?Transformer SpladePooling"
)
# Our names of activation functions, by the name of the torch class.
_DENSE_ACTIVATIONS = {
    "Identity": "",
    "Tanh": "tanh",
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}
_POOLING_NAMES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last_token"}
_OLD_POOLING_NAMES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last_token",
}


@dataclass(frozen=True, slots=True)
class DenseModule:
    """A linear layer after pooling: the module Dense of sentence-transformers.

    Attributes:
        folder: Folder of the layer's weights, `linear.weight` [to, from] and `linear.bias` [to].
        shape: Shape (to, from) of the weight.
        bias: Whether the layer has a bias.
        activation: Activation function, one of `encoder.ACTIVATIONS`; empty for none.
    """

    folder: Path
    shape: tuple[int, int]
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything about a model in its checkpoint folder, except its weights.

    Attributes:
        folder: Folder of config.json and the weights.
        tokenizer: Path of tokenizer.json.
        config: Content of config.json.
        max_length, pooling, normalize, prompts, default_prompt, similarity, dims: As in ModelSpec.
            A plain Hugging Face folder gets the defaults of sentence-transformers: mean pooling and
            no normalization.
        dense: Linear layers between pooling and normalization.
        kind: Kind of the model's vectors.
        licence: Licence in the model card's front matter; empty if no licence is stated.
    """

    folder: Path
    tokenizer: Path
    config: dict[str, Any]
    max_length: int
    pooling: Pooling
    normalize: bool
    prompts: dict[str, str]
    default_prompt: str | None
    similarity: Similarity
    dense: tuple[DenseModule, ...]
    dims: tuple[int, ...]
    kind: OutputKind
    licence: str

    @classmethod
    def from_folder(cls, folder: Path, *, tokenizer: Path | None = None) -> Checkpoint:
        """Read a checkpoint folder.

        `tokenizer` is the path of another tokenizer.json to use instead of the folder's.

        Raises:
            ModelError: A file is missing or invalid, or a bundle cannot describe such a model.
        """
        modules = _modules(folder)
        inner = folder / modules.get("MLMTransformer", modules.get("Transformer", [""]))[0]
        config = read_json(inner / "config.json")
        tokenizer = tokenizer or inner / TOKENIZER
        if not tokenizer.is_file():
            raise ModelError(
                f"{tokenizer.name} is missing; write it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
            )
        pooling: Pooling = "mean"
        if "Pooling" in modules:
            pooling = _pooling(read_json(folder / modules["Pooling"][0] / "config.json"))
        _check_lowercase(inner, tokenizer)
        settings = read_optional_json(folder / _SETTINGS)
        kind = read_kind(folder, modules, settings, tokenizer)
        prompts, default_prompt = _prompts(settings, config)
        if kind.prompts is not None:
            prompts, default_prompt = {**prompts, **kind.prompts}, "document"
        hidden = config.get("hidden_size", config.get("dim", config.get("n_embd")))
        if not isinstance(hidden, int) or hidden < 1:
            raise invalid_value("config.json", "hidden_size", hidden, "at least 1")
        dense = _dense([folder / place for place in modules.get("Dense", [])], hidden)
        if kind.linear:
            dense = (DenseModule(inner, (kind.linear, hidden), bias=False, activation=""),)
        dim = dense[-1].shape[0] if dense else hidden
        dims = _dims(config, settings, dim)
        if kind.output != "dense":
            dims = (int(config["vocab_size"]) if kind.output == "sparse" else dim,)
        return cls(
            folder=inner,
            tokenizer=tokenizer,
            config=config,
            max_length=min(_max_length(inner, config), kind.max_length or _NO_LIMIT),
            pooling=pooling,
            normalize="Normalize" in modules or kind.output == "multi",
            prompts=prompts,
            default_prompt=default_prompt,
            similarity=_similarity(settings),
            dense=dense,
            dims=dims,
            kind=kind,
            licence=_read_licence(folder / "README.md"),
        )


def _read_licence(card: Path) -> str:
    """Licence in a model card's front matter; empty if no licence is stated."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    first, *lines = text.splitlines() or [""]
    if first == "---":
        for line in itertools.takewhile(lambda line: line != "---", lines):
            if line.startswith("license:"):
                return line.removeprefix("license:").strip().strip("'\"")[:100]
    return ""


def _modules(folder: Path) -> dict[str, list[str]]:
    """Folders of the modules that sentence-transformers lists, by class name."""
    path = folder / "modules.json"
    if not path.is_file():
        return {"Transformer": [""]}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in listed]
    except (ValueError, KeyError, TypeError):
        raise ModelError("modules.json is not a list of sentence-transformers modules") from None
    names = [name for name, _ in modules]
    if not _ORDER.fullmatch(" ".join(names)):
        raise ModelError(
            f"modules.json lists {', '.join(names)}: expected Transformer, Pooling, any number of "
            "Dense and perhaps Normalize; Transformer and Dense, for token vectors; or "
            "MLMTransformer and SpladePooling. Export another model to ONNX and add that file",
            allowed=["Transformer", "Pooling", "Dense", "Normalize"],
        )
    places: dict[str, list[str]] = {}
    for name, place in modules:
        if place and not is_inside(place):
            raise ModelError(
                f"modules.json: `path` of {name} is {place[:200]!r}, expected one inside the "
                "model's folder"
            )
        places.setdefault(name, []).append(place)
    return places


def _dense(folders: Iterable[Path], width: int) -> tuple[DenseModule, ...]:
    modules = []
    for folder in folders:
        config = read_json(folder / "config.json")
        name = f"{folder.name}/config.json"
        entering, leaving = config.get("in_features"), config.get("out_features")
        if entering != width or not isinstance(leaving, int) or leaving < 1:
            raise ModelError(
                f"{name}: `in_features` and `out_features` are {entering!r} and {leaving!r}, "
                f"expected {width} and at least 1",
                field="in_features",
            )
        for key in ("module_input_name", "module_output_name"):
            if config.get(key) not in (None, "sentence_embedding"):
                raise invalid_value(name, key, config[key], "sentence_embedding")
        if config.get("use_residual"):
            raise invalid_value(name, "use_residual", config["use_residual"], "false")
        function = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        activation = _DENSE_ACTIVATIONS.get(function.rpartition(".")[2])
        if activation is None:
            raise invalid_choice(name, "activation_function", function, _DENSE_ACTIVATIONS)
        bias = bool(config.get("bias", True))
        modules.append(DenseModule(folder, (leaving, width), bias, activation))
        width = leaving
    return tuple(modules)


def _pooling(config: Mapping[str, Any]) -> Pooling:
    if config.get("include_prompt", True) is False:
        raise invalid_value("1_Pooling/config.json", "include_prompt", False, "true")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        names = [_OLD_POOLING_NAMES.get(mode) for mode in modes]
    else:
        modes = [modes] if isinstance(modes, str) else list(modes)
        names = [_POOLING_NAMES.get(mode) for mode in modes]
    if len(names) != 1 or names[0] is None:
        raise ModelError(
            f"1_Pooling/config.json: pooling is {', '.join(map(str, modes)) or 'absent'}, "
            "expected one of mean, cls, lasttoken",
            field="pooling_mode",
            allowed=list(_POOLING_NAMES),
        )
    return names[0]


def _check_lowercase(folder: Path, tokenizer: Path) -> None:
    """Check that the tokenizer lower-cases texts if sentence-transformers does so."""
    if not read_optional_json(folder / "sentence_bert_config.json").get("do_lower_case"):
        return
    normalizer = json.dumps(read_json(tokenizer).get("normalizer"))
    if '"lowercase": true' not in normalizer and '"type": "Lowercase"' not in normalizer:
        raise ModelError(
            f"sentence_bert_config.json asks for `do_lower_case`, but {tokenizer.name} does not "
            "lower-case; add a Lowercase normalizer to it"
        )


def _max_length(folder: Path, config: Mapping[str, Any]) -> int:
    """Largest number of tokens that a text can have.

    It is the setting of sentence-transformers or else of the tokenizer, but not more than the
    model's number of positions.
    """
    candidates: list[Any] = [config.get("max_position_embeddings", config.get("n_positions"))]
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        value = read_optional_json(folder / name).get(key)
        if value is not None and not isinstance(value, (int, float)):
            raise invalid_value(name, key, value, "an integer")
        if value is not None and value < _NO_LIMIT:
            candidates.append(value)
            break
    known = [int(one) for one in candidates if one is not None]
    if not known or min(known) < 2:
        raise ModelError(
            "config.json: `max_position_embeddings` is missing or below 2",
            field="max_position_embeddings",
        )
    return min(known)


# Prompts that Nomic's models were trained with. Only the model cards of these models have them
# (https://huggingface.co/nomic-ai/nomic-embed-text-v1.5, Task instruction prefixes).
_NOMIC_TASKS = ("search_document", "search_query", "clustering", "classification")


def _prompts(
    settings: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, str], str | None]:
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    valid = isinstance(prompts, dict) and all(isinstance(one, str) for one in prompts.values())
    if not valid or not (default is None or default in prompts):
        raise ModelError(
            f"{_SETTINGS}: expected texts by name as `prompts`, and one of the names or null as "
            "`default_prompt_name`",
            field="prompts",
        )
    if not any(prompts.values()) and config.get("model_type") == "nomic_bert":
        prompts = {task: f"{task}: " for task in _NOMIC_TASKS}
    return dict(prompts), default


def _similarity(settings: Mapping[str, Any]) -> Similarity:
    name = settings.get("similarity_fn_name") or "cosine"
    if name not in SIMILARITIES:
        raise invalid_choice(_SETTINGS, "similarity_fn_name", name, SIMILARITIES)
    return cast("Similarity", name)


def _dims(config: Mapping[str, Any], settings: Mapping[str, Any], dim: int) -> tuple[int, ...]:
    """Ascending dims: the smaller dims that the checkpoint declares, and `dim`."""
    smaller = [
        *(config.get("matryoshka_dimensions") or []),
        *(settings.get("matryoshka_dimensions") or []),
        settings.get("truncate_dim") or dim,
    ]
    return tuple(sorted({int(one) for one in smaller if 0 < int(one) < dim} | {dim}))
