"""Kinds of vectors that models give: dense, sparse, or one vector for each token."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.errors import ModelError
from fletcher.models.bundle.files import damage_named, invalid_value, read_json
from fletcher.models.bundle.spec import Output
from fletcher.models.checkpoint.markers import Queries, Skipped
from fletcher.models.checkpoint.modules import check_known
from fletcher.models.checkpoint.tokenizer_files import TokenizerFiles

# File that the library of the original ColBERT writes beside a model.
COLBERT = "artifact.metadata"
# Settings that PyLate adds to config_sentence_transformers.json.
MULTI_SETTINGS = (
    *("query_prefix", "document_prefix", "query_length", "document_length"),
    *("attend_to_expansion_tokens", "do_query_expansion", "skiplist_words"),
)


@dataclass(frozen=True, slots=True)
class OutputKind:
    """Kind of a model's vectors; the defaults are those of dense vectors.

    Attributes:
        output: As in ModelSpec.
        prompts: Prompts that put a marker in front of queries and documents. The prompt for
            documents is the default. None if the model has no markers.
        skipped: Document tokens without a vector.
        queries: Special treatment of queries; None if queries are read like documents.
        max_length: Largest number of tokens of a document; None if the checkpoint's other files
            decide.
        markers: Words that the tokenizer must keep as one token each.
        linear: Output width of the linear layer that the model's weights have after the last
            transformer layer; 0 if there is no such layer.
    """

    output: Output = "dense"
    prompts: Mapping[str, str] | None = None
    skipped: Skipped | None = None
    queries: Queries | None = None
    max_length: int | None = None
    markers: tuple[str, ...] = ()
    linear: int = 0


def read_kind(
    folder: Path,
    modules: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    tokenizer: TokenizerFiles,
) -> OutputKind:
    """Find out which kind of vectors a checkpoint gives.

    `modules` maps class names of sentence-transformers' modules to the modules' folders. `settings`
    is the content of config_sentence_transformers.json.

    Raises:
        ModelError: A setting is not supported.
    """
    if "SpladePooling" in modules:
        return _splade(folder / modules["SpladePooling"][0] / "config.json")
    if (folder / COLBERT).is_file():
        with damage_named(COLBERT):
            return _colbert(read_json(folder / COLBERT), tokenizer)
    if "Dense" in modules and not {"Pooling", "StaticEmbedding"} & modules.keys():
        with damage_named("config_sentence_transformers.json"):
            return _pylate(settings, tokenizer)
    return OutputKind()


def _splade(path: Path) -> OutputKind:
    config = read_json(path)
    widths = ("embedding_dimension", "word_embedding_dimension", "chunk_size")
    known = ("pooling_strategy", "activation_function", *widths)
    check_known(f"{path.parent.name}/config.json", config, known)
    for key, wanted in (("pooling_strategy", "max"), ("activation_function", "relu")):
        if config.get(key, wanted) != wanted:
            place = f"{path.parent.name}/config.json"
            raise invalid_value(place, key, config[key], wanted, [wanted])
    return OutputKind("sparse")


def _colbert(config: Mapping[str, Any], tokenizer: TokenizerFiles) -> OutputKind:
    width, query, document = (config.get(key) for key in ("dim", "query_token_id", "doc_token_id"))
    vocabulary = tokenizer.vocabulary
    if type(width) is not int or width < 1 or not {query, document} <= vocabulary.keys():
        raise ModelError(
            f"{COLBERT}: `dim` is {width!r}, `query_token_id` {query!r} and `doc_token_id` "
            f"{document!r}, expected a width and two tokens of {tokenizer.name}"
        )
    skipped = string.punctuation if config.get("mask_punctuation") else ""
    return OutputKind(
        "multi",
        prompts={"query": f"{query} ", "document": f"{document} "},
        skipped=_skipped(str(document), list(skipped), vocabulary),
        queries=Queries(
            vocabulary[str(query)],
            _length(config, "query_maxlen", 32),
            _filler(tokenizer, vocabulary),
            bool(config.get("attend_to_mask_tokens")),
        ),
        max_length=_length(config, "doc_maxlen", 220),
        markers=(str(query), str(document)),
        linear=width,
    )


def _pylate(settings: Mapping[str, Any], tokenizer: TokenizerFiles) -> OutputKind:
    query, document = settings.get("query_prefix"), settings.get("document_prefix")
    vocabulary = tokenizer.vocabulary
    if not {query, document} <= vocabulary.keys():
        raise ModelError(
            "modules.json lists a Dense layer and no Pooling, as token-vector models have it, but "
            f"config_sentence_transformers.json has `query_prefix` {query!r} and "
            f"`document_prefix` {document!r}, expected two tokens of {tokenizer.name}",
            field="query_prefix",
        )
    words = settings.get("skiplist_words")
    words = list(string.punctuation) if words is None else [str(one) for one in words]
    filled = settings.get("do_query_expansion") is not False
    return OutputKind(
        "multi",
        prompts={"query": str(query), "document": str(document)},
        skipped=_skipped(str(document), words, vocabulary),
        queries=Queries(
            vocabulary[str(query)],
            _length(settings, "query_length", 32),
            _filler(tokenizer, vocabulary) if filled else None,
            filled and bool(settings.get("attend_to_expansion_tokens")),
        ),
        max_length=_length(settings, "document_length", 180),
    )


def _skipped(marker: str, words: Sequence[str], vocabulary: Mapping[str, int]) -> Skipped | None:
    tokens = sorted({vocabulary[word] for word in words if word in vocabulary})
    return Skipped(vocabulary[marker], tuple(tokens)) if tokens else None


def _length(config: Mapping[str, Any], key: str, default: int) -> int:
    """Read a number of tokens under `key`; if missing or null, return `default`."""
    length = default if config.get(key) is None else config[key]
    if type(length) is not int or length < 4:
        raise ModelError(f"`{key}` is {length!r}, expected at least 4 tokens", field=key)
    return length


def _filler(tokenizer: TokenizerFiles, vocabulary: Mapping[str, int]) -> int:
    """Find the id of the mask token, which fills short queries."""
    named = tokenizer.settings.get("mask_token")
    word = named.get("content") if isinstance(named, dict) else named
    for known in (str(word), "[MASK]", "<mask>"):
        if known in vocabulary:
            return vocabulary[known]
    raise ModelError(
        f"{tokenizer.name} has no mask token, which fills short queries; name it in "
        "tokenizer_config.json as `mask_token`",
        field="mask_token",
    )
