"""Checkpoint folders by sentence-transformers or plain Hugging Face transformers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import TOKENIZER
from fletcher.models.bundle.files import (
    invalid_choice,
    invalid_value,
    read_json,
    read_optional_json,
)
from fletcher.models.bundle.spec import SIMILARITIES, Similarity
from fletcher.models.checkpoint.modules import (
    DenseModule,
    check_known,
    read_dense,
    read_modules,
    read_pooling,
)
from fletcher.models.checkpoint.output_kind import MULTI_SETTINGS, OutputKind, read_kind
from fletcher.models.checkpoint.sentence_config import SentenceConfig
from fletcher.models.checkpoint.static import read_static_config
from fletcher.models.checkpoint.tokenizer_files import SETTINGS, TokenizerFiles

_NO_LIMIT = 10**9  # transformers writes 1e30 for tokenizers without a limit
_SETTINGS = "config_sentence_transformers.json"
_KNOWN_SETTINGS = (
    *("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"),
    *("truncate_dim", "matryoshka_dimensions"),
)
_MODEL_TYPES = ("SentenceTransformer", "SparseEncoder", "ColBERT")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything about a model in its checkpoint folder, except its weights.

    Attributes:
        folder: Folder of config.json and the weights.
        tokenizer: The checkpoint's tokenizer.
        config: Content of config.json.
        max_length, pooling, normalize, prompts, default_prompt, similarity, dims, default_dims: As
            in ModelSpec. A plain Hugging Face folder gets the defaults of sentence-transformers:
            mean pooling and no normalization.
        dense: Linear layers between pooling and normalization.
        kind: Kind of the model's vectors.
        licence: Licence in the model card's front matter; empty if no licence is stated.
    """

    folder: Path
    tokenizer: TokenizerFiles
    config: Mapping[str, Any]
    max_length: int
    pooling: str
    normalize: bool
    prompts: dict[str, str]
    default_prompt: str | None
    similarity: Similarity
    dense: tuple[DenseModule, ...]
    dims: tuple[int, ...]
    default_dims: int
    kind: OutputKind
    licence: str

    @classmethod
    def from_folder(cls, folder: Path, *, tokenizer: Path | None = None) -> Checkpoint:
        """Read a checkpoint folder.

        `tokenizer` is the path of another tokenizer.json to use instead of the folder's.

        Raises:
            ModelError: A file is missing or invalid, or a bundle cannot describe such a model.
        """
        modules = read_modules(folder)
        is_static = "StaticEmbedding" in modules
        first = next(modules[name] for name in _FIRST if name in modules)
        inner = folder / first[0]
        for name in _ADAPTERS:
            if (inner / name).is_file() or (folder / name).is_file():
                raise ModelError(
                    f"{name} is an adapter beside the model's weights, and would be left out; "
                    "merge it into the weights first, with `merge_and_unload()` of the library peft"
                )
        sentence = SentenceConfig() if is_static else SentenceConfig.from_folder(inner)
        config = read_static_config(inner) if is_static else read_json(inner / "config.json")
        config = {**config, **sentence.config}
        settings = read_optional_json(folder / _SETTINGS)
        _check_is_embedding_model(config, settings, listed=(folder / "modules.json").is_file())
        path = tokenizer or inner / TOKENIZER
        if not path.is_file():
            raise ModelError(
                f"{path.name} is missing; write it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
            )
        files = TokenizerFiles(
            path,
            config,
            sentence.tokenizer,
            lowercase=sentence.lowercase,
            alone=is_static,
        )
        kind = read_kind(folder, modules, settings, files)
        check_known(
            _SETTINGS, settings, (*_KNOWN_SETTINGS, *(MULTI_SETTINGS * (kind.output == "multi")))
        )
        hidden = _hidden(config)
        pooling = "mean"
        if "Pooling" in modules:
            pooling = read_pooling(folder / modules["Pooling"][0], hidden)
        prompts, default_prompt = _prompts(settings, config)
        if kind.prompts is not None:
            prompts, default_prompt = {**prompts, **kind.prompts}, "document"
        dense = read_dense(
            [folder / place for place in modules.get("Dense", [])],
            hidden * (1 + pooling.count("+")),
            tokens=kind.output == "multi",
        )
        if kind.linear:
            dense = (DenseModule(inner, (kind.linear, hidden), bias=False, activation=""),)
        dim = dense[-1].shape[0] if dense else hidden * (1 + pooling.count("+"))
        dims, default_dims = _dims(config, settings, dim)
        if kind.output != "dense":
            dims, default_dims = (int(config["vocab_size"]) if kind.output == "sparse" else dim,), 0
        if isinstance(rows := config.get("vocab_size"), int):
            files.check_ids(rows)
        return cls(
            folder=inner,
            tokenizer=files,
            config=config,
            max_length=files.set_static()
            if is_static
            else _max_length(config, sentence, files, kind),
            pooling=pooling,
            normalize="Normalize" in modules or kind.output == "multi",
            prompts=prompts,
            default_prompt=default_prompt,
            similarity=_similarity(settings, kind),
            dense=dense,
            dims=dims,
            default_dims=default_dims,
            kind=kind,
            licence=_read_licence(folder / "README.md"),
        )


_FIRST = ("StaticEmbedding", "MLMTransformer", "Transformer")


def _check_is_embedding_model(
    config: Mapping[str, Any], settings: Mapping[str, Any], *, listed: bool
) -> None:
    """Refuse cross-encoders. `listed` says whether the checkpoint has a modules.json."""
    kind = settings.get("model_type")
    if kind not in (None, *_MODEL_TYPES):
        raise invalid_choice(_SETTINGS, "model_type", kind, _MODEL_TYPES)
    names = config.get("architectures") or []
    names = [str(one) for one in names] if isinstance(names, list) else [str(names)]
    scores = [one for one in names if one.endswith("ForSequenceClassification")]
    if not listed and (scores or config.get("sentence_transformers")):
        raise ModelError(
            f"config.json: `architectures` is {', '.join(names)[:200]}, a classifier or "
            "cross-encoder, which scores texts and gives no vectors; if its hidden states are "
            "meant as embeddings, save it with sentence-transformers, which adds a modules.json",
            field="architectures",
        )


def _hidden(config: Mapping[str, Any]) -> int:
    """Width of hidden states."""
    keys = ("hidden_size", "dim", "n_embd", "d_model")
    key = next((one for one in keys if config.get(one) is not None), keys[0])
    hidden = config.get(key)
    if type(hidden) is not int or not 1 <= hidden < 2**31:
        raise invalid_value("config.json", key, hidden, "at least 1")
    return hidden


def _read_licence(card: Path) -> str:
    """Licence in a model card's front matter; empty if no licence is stated."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    first, *lines = text.splitlines() or [""]
    if first == "---":
        for line in itertools.takewhile(lambda line: line != "---", lines):
            if line.startswith("license:"):
                return line.removeprefix("license:").strip().strip("'\"")[:100]
    return ""


def _max_length(
    config: Mapping[str, Any], sentence: SentenceConfig, tokenizer: TokenizerFiles, kind: OutputKind
) -> int:
    """Largest number of tokens that a text can have.

    It is the setting of the kind of vectors, of sentence-transformers or else of the tokenizer, but
    not more than the model's number of positions.
    """
    key = "n_positions" if config.get("max_position_embeddings") is None else ""
    key = key or "max_position_embeddings"
    found: list[int] = []
    places = [("config.json", key, config.get(key))]
    if kind.max_length is None:
        length = tokenizer.settings.get("model_max_length")
        own = (sentence.name, "max_seq_length", sentence.max_length)
        places.append((SETTINGS, "model_max_length", length) if own[2] is None else own)
    else:
        found.append(kind.max_length)
    for place, name, value in places:
        if type(value) not in (int, float, type(None)):
            raise invalid_value(place, name, value, "an integer")
        if value is not None and value < _NO_LIMIT:
            if value < 2:
                raise invalid_value(place, name, value, "at least 2")
            found.append(int(value))
    if not found:
        raise ModelError(
            "config.json: `max_position_embeddings` is missing or below 2",
            field="max_position_embeddings",
        )
    return min(found)


# Prompts that Nomic's models were trained with. Only the model cards of these models have them
# (https://huggingface.co/nomic-ai/nomic-embed-text-v1.5, Task instruction prefixes).
_NOMIC_TASKS = ("search_document", "search_query", "clustering", "classification")


def _prompts(
    settings: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, str], str | None]:
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    valid = isinstance(prompts, dict) and all(isinstance(one, str) for one in prompts.values())
    if not valid or not (default is None or (isinstance(default, str) and default in prompts)):
        raise ModelError(
            f"{_SETTINGS}: expected texts by name as `prompts`, and one of the names or null as "
            "`default_prompt_name`",
            field="prompts",
        )
    if not any(prompts.values()) and config.get("model_type") == "nomic_bert":
        prompts = {task: f"{task}: " for task in _NOMIC_TASKS}
    return dict(prompts), default


def _similarity(settings: Mapping[str, Any], kind: OutputKind) -> Similarity:
    name = settings.get("similarity_fn_name") or "cosine"
    if kind.output == "multi" and name == "MaxSim":
        return "cosine"  # MaxSim compares single vectors by cosine: they have norm 1
    if name not in SIMILARITIES:
        raise invalid_choice(_SETTINGS, "similarity_fn_name", name, SIMILARITIES)
    return cast("Similarity", name)


def _dims(
    config: Mapping[str, Any], settings: Mapping[str, Any], dim: int
) -> tuple[tuple[int, ...], int]:
    """Declared dims, ascending, up to `dim`; and the default if it is smaller."""
    places = [("config.json", config), (_SETTINGS, settings)]
    found = [dim]
    for place, content in places:
        key = "matryoshka_dimensions"
        listed = content.get(key) or []
        if not isinstance(listed, list) or not all(type(one) is int and one > 0 for one in listed):
            raise invalid_value(place, key, listed, "a list of widths")
        found += listed
    default = settings.get("truncate_dim")
    if default is not None and (type(default) is not int or default < 1):
        raise invalid_value(_SETTINGS, "truncate_dim", default, "at least 1")
    default = min(default or dim, dim)
    dims = tuple(sorted({one for one in (*found, default) if one <= dim}))
    return dims, 0 if default == dim else default
