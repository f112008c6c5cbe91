"""What a checkpoint's text becomes: a dense vector, sparse weights, or a vector a token."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.errors import ModelError
from fletcher.models.bundle import Output, Skipped
from fletcher.models.files import read_json

# What the first ColBERT's own library writes beside a model.
COLBERT = "artifact.metadata"


@dataclass(frozen=True, slots=True)
class Kind:
    """What is special of a model that does not give dense vectors; every default is a dense one's.

    Attributes:
        output: As in ModelSpec.
        prompts: Markers of queries and documents, as prompts; documents get theirs by default.
        skipped: Tokens that documents leave out.
        max_length: Tokens of a document; None: the checkpoint's own rule.
        markers: Words that the tokenizer must take for one token.
        linear: Width of a product in the model's own weights after the last layer; 0: there is
            none.
    """

    output: Output = "dense"
    prompts: Mapping[str, str] | None = None
    skipped: Skipped | None = None
    max_length: int | None = None
    markers: tuple[str, ...] = ()
    linear: int = 0


def read_kind(
    folder: Path, modules: Mapping[str, Sequence[str]], settings: Mapping[str, Any], tokenizer: Path
) -> Kind:
    """What a checkpoint says of its output.

    Args:
        folder: The checkpoint's.
        modules: Folders of sentence-transformers' modules by their class names.
        settings: config_sentence_transformers.json.
        tokenizer: Its tokenizer.json.

    Raises:
        ModelError: It says something that is not supported.
    """
    if "SpladePooling" in modules:
        return _splade(folder / modules["SpladePooling"][0] / "config.json")
    if (folder / COLBERT).is_file():
        return _colbert(read_json(folder / COLBERT), tokenizer)
    if "Dense" in modules and "Pooling" not in modules:
        return _pylate(settings, tokenizer)
    return Kind()


def with_markers(tokenizer: Path, markers: Sequence[str]) -> str:
    """A tokenizer.json that takes words of its vocabulary for one token wherever they stand."""
    content = read_json(tokenizer)
    vocabulary = _vocabulary(content, tokenizer.name)
    known = {one["content"] for one in content.get("added_tokens", [])}
    added = [
        {
            "id": vocabulary[marker],
            "content": marker,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for marker in markers
        if marker not in known
    ]
    content["added_tokens"] = sorted(
        [*content.get("added_tokens", []), *added], key=lambda one: int(one["id"])
    )
    return json.dumps(content, ensure_ascii=False)


def _splade(path: Path) -> Kind:
    config = read_json(path)
    for key, wanted in (("pooling_strategy", "max"), ("activation_function", "relu")):
        if config.get(key, wanted) != wanted:
            raise ModelError(
                f"{path.parent.name}/config.json: `{key}` is {config[key]!r}, expected {wanted}",
                field=key,
                allowed=[wanted],
            )
    return Kind("sparse")


def _colbert(config: Mapping[str, Any], tokenizer: Path) -> Kind:
    width, query, document = (config.get(key) for key in ("dim", "query_token_id", "doc_token_id"))
    vocabulary = _vocabulary(read_json(tokenizer), tokenizer.name)
    if type(width) is not int or width < 1 or not {query, document} <= vocabulary.keys():
        raise ModelError(
            f"{COLBERT}: `dim` is {width!r}, `query_token_id` {query!r} and `doc_token_id` "
            f"{document!r}, expected a width and two tokens of {tokenizer.name}"
        )
    skipped = string.punctuation if config.get("mask_punctuation") else ""
    return Kind(
        "multi",
        prompts={"query": f"{query} ", "document": f"{document} "},
        skipped=_skipped(str(document), list(skipped), vocabulary),
        max_length=config.get("doc_maxlen"),
        markers=(str(query), str(document)),
        linear=width,
    )


def _pylate(settings: Mapping[str, Any], tokenizer: Path) -> Kind:
    query, document = settings.get("query_prefix"), settings.get("document_prefix")
    vocabulary = _vocabulary(read_json(tokenizer), tokenizer.name)
    if not {query, document} <= vocabulary.keys():
        raise ModelError(
            "modules.json lists a Dense layer and no Pooling, as token-vector models have it, but "
            f"config_sentence_transformers.json has `query_prefix` {query!r} and "
            f"`document_prefix` {document!r}, expected two tokens of {tokenizer.name}",
            field="query_prefix",
        )
    words = [str(one) for one in settings.get("skiplist_words") or []]
    return Kind(
        "multi",
        prompts={"query": str(query), "document": str(document)},
        skipped=_skipped(str(document), words, vocabulary),
        max_length=settings.get("document_length"),
    )


def _skipped(marker: str, words: Sequence[str], vocabulary: Mapping[str, int]) -> Skipped | None:
    tokens = sorted({vocabulary[word] for word in words if word in vocabulary})
    return Skipped(vocabulary[marker], tuple(tokens)) if tokens else None


def _vocabulary(tokenizer: Mapping[str, Any], name: str) -> dict[str, int]:
    model = tokenizer.get("model", {})
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        raise ModelError(f"{name} has no table of words, which markers of queries are looked up in")
    added = {str(one["content"]): int(one["id"]) for one in tokenizer.get("added_tokens", [])}
    return {**vocabulary, **added}
