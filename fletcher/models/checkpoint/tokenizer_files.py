"""Files of a checkpoint that define its tokens, joined as one tokenizer.json.

transformers changes a tokenizer by the settings beside it: tokenizer_config.json,
special_tokens_map.json and added_tokens.json. This module makes the same changes, as transformers
4 and 5 make them, or refuses a setting by name. Settings that change no token are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fletcher.errors import ModelError
from fletcher.models.bundle.files import (
    damage_named,
    invalid_value,
    read_json,
    read_optional_json,
)
from fletcher.models.checkpoint.config_json import Config

SETTINGS = "tokenizer_config.json"
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"

MAX_STATIC_LENGTH = 32_768
_WORD_PIECES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MPNetTokenizer")
_BYTE_PAIRS = ("RobertaTokenizer", "GPT2Tokenizer", "BartTokenizer", "LongformerTokenizer")
# Class of a tokenizer whose files do not name its class.
_CLASSES = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "mpnet": "MPNetTokenizer",
    "nomic_bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
}
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# Settings of BertNormalizer: the key in tokenizer_config.json, and its default.
_NORMALIZER = {
    "lowercase": ("do_lower_case", True),
    "strip_accents": ("strip_accents", None),
    "handle_chinese_chars": ("tokenize_chinese_chars", True),
}


class TokenizerFiles:
    """tokenizer.json of a checkpoint with the changes that other files ask for.

    Args:
        path: Path of tokenizer.json. The other files are in the same folder.
        config: Content of config.json.
        arguments: Settings that replace those of tokenizer_config.json.
        lowercase: Whether sentence-transformers asks for lower-casing, too.
        alone: Whether only tokenizer.json counts, as for StaticEmbedding.

    Raises:
        ModelError: A file is missing or damaged, or a setting is not supported.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        arguments: Mapping[str, Any] | None = None,
        *,
        lowercase: bool = False,
        alone: bool = False,
    ) -> None:
        self.name = path.name
        self._path = path
        self._content = read_json(path)
        self._is_changed = False
        self.settings: Mapping[str, Any] = {}
        if alone:
            return
        with damage_named(f"{path.name}, {SETTINGS}, {_MAP} or {_ADDED}"):
            self._apply(config, arguments or {}, lowercase=lowercase)

    def _apply(self, config: Config, arguments: Mapping[str, Any], *, lowercase: bool) -> None:
        path = self._path
        settings = read_optional_json(path.with_name(SETTINGS))
        others = read_optional_json(path.with_name(_MAP))
        self.settings = {**others, **settings, **arguments}
        self._check_settings()
        kind = self.settings.get("tokenizer_class") or config.get("tokenizer_class")
        kind = kind or _CLASSES.get(str(config.get("model_type")), "")
        kind = str(kind).removesuffix("Fast")
        if kind in _WORD_PIECES:
            self._apply_to_word_pieces(kind)
        elif kind in _BYTE_PAIRS:
            self._apply_to_byte_pairs(kind)
        elif self.settings.get("add_prefix_space") is not None:
            self._check_prefix_space()
        if lowercase:
            self._lowercase()
        self._apply_added_tokens(read_optional_json(path.with_name(_ADDED)))
        self._check_ends()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, added ones included. Raises ModelError for a damaged file."""
        model = self._part("model")
        words = model.get("vocab")
        if isinstance(words, list):  # Unigram: pieces with their scores
            with damage_named(self.name):
                words = {one[0]: index for index, one in enumerate(words) if isinstance(one, list)}
        if not isinstance(words, dict) or not all(type(one) is int for one in words.values()):
            raise ModelError(f"{self.name}: `model.vocab` has no ids of words; get the file again")
        return {**words, **{one["content"]: one["id"] for one in self._added()}}

    def check_ids(self, num_embeddings: int) -> None:
        """Check that the table of embeddings has a row for every token.

        Raises:
            ModelError: A token's id is not below `num_embeddings`.
        """
        outside = {
            word: number for word, number in self.vocabulary.items() if number >= num_embeddings
        }
        with damage_named(self.name):
            for part in self._part("post_processor").get("special_tokens", {}).values():
                outside |= {str(part["id"]): one for one in part["ids"] if one >= num_embeddings}
        if outside:
            word, number = min(outside.items(), key=lambda one: one[1])
            raise ModelError(
                f"{self.name}: token {word[:100]!r} has id {number}, but the model has "
                f"embeddings for ids below {num_embeddings} (`vocab_size` in config.json); take "
                "the tokenizer of this checkpoint, or remove the token",
                field="vocab_size",
            )

    def add_markers(self, markers: tuple[str, ...]) -> None:
        """Make each of `markers`, words of the vocabulary, a token that is never split."""
        known = {one["content"] for one in self._added()}
        vocabulary = self.vocabulary
        for marker in markers:
            if marker not in known:
                self._add(marker, vocabulary[marker], {})

    def set_static(self) -> int:
        """Leave special tokens out; return the most tokens of a text.

        StaticEmbedding truncates only as tokenizer.json says. A model without such a limit reads
        texts up to MAX_STATIC_LENGTH.
        """
        if self._content.get("post_processor") is not None:
            self._content["post_processor"] = None
            self._is_changed = True
        truncation = self._part("truncation")
        if truncation.get("direction", "Right") != "Right":
            raise invalid_value(self.name, "direction", truncation["direction"], "Right")
        length = truncation.get("max_length", MAX_STATIC_LENGTH)
        if type(length) is not int or length < 1:
            raise invalid_value(self.name, "max_length", length, "at least 1")
        return min(length, MAX_STATIC_LENGTH)

    def write(self, path: Path) -> None:
        """Write the tokenizer. An unchanged one keeps its bytes, and so its hash.

        Raises:
            ModelError: A word is not Unicode text.
        """
        if self._is_changed:
            with damage_named(self.name):  # half a surrogate pair
                path.write_text(json.dumps(self._content, ensure_ascii=False), encoding="utf-8")
        else:
            path.write_bytes(self._path.read_bytes())

    def _check_settings(self) -> None:
        for key, wanted, expected in (
            ("auto_map", None, "absent: other code than transformers' is not run"),
            ("split_special_tokens", False, "false"),
            ("truncation_side", "right", "right; ask for `truncate: start` instead"),
        ):
            if self.settings.get(key) not in (None, wanted):
                raise invalid_value(SETTINGS, key, self.settings[key], expected)

    def _part(self, name: str) -> dict[str, Any]:
        part = self._content.get(name) or {}
        if not isinstance(part, dict):
            raise ModelError(f"{self.name}: `{name}` is no object; get the file again", field=name)
        return part

    def _added(self) -> list[dict[str, Any]]:
        added = self._content.get("added_tokens") or []
        if not isinstance(added, list) or not all(map(_is_token, added)):
            raise ModelError(f"{self.name}: `added_tokens` is damaged; get the file again")
        return added

    def _apply_to_word_pieces(self, kind: str) -> None:
        """Set the normalizer as BERT's tokenizers do, whatever tokenizer.json says."""
        normalizer = self._part("normalizer")
        self._check_kind(kind, "normalizer", "BertNormalizer")
        self._check_kind(kind, "pre_tokenizer", "BertPreTokenizer")
        self._check_kind(kind, "model", "WordPiece")
        for ours, (theirs, default) in _NORMALIZER.items():
            value = self.settings.get(theirs)
            value = default if value is None else value
            if type(value) is not bool and value is not None:
                raise invalid_value(SETTINGS, theirs, value, "true or false")
            self._set(normalizer, ours, value)
        unknown = _content(self.settings.get("unk_token"))
        if unknown and unknown != self._part("model").get("unk_token"):
            raise invalid_value(
                SETTINGS, "unk_token", unknown, f"{self._part('model').get('unk_token')!r}"
            )

    def _apply_to_byte_pairs(self, kind: str) -> None:
        value = bool(self.settings.get("add_prefix_space"))
        self._check_kind(kind, "pre_tokenizer", "ByteLevel")
        self._set(self._part("pre_tokenizer"), "add_prefix_space", value)

    def _check_prefix_space(self) -> None:
        """Check that tokenizer.json agrees with `add_prefix_space`."""
        wanted = bool(self.settings["add_prefix_space"])
        for one in _nested(self._part("pre_tokenizer")):
            kind = one.get("type")
            has = {
                "ByteLevel": one.get("add_prefix_space", True),
                "Metaspace": one.get("prepend_scheme", "always") != "never",
            }.get(str(kind), wanted)
            if has != wanted:
                expected = f"{str(has).lower()}, as in `pre_tokenizer` of {self.name}"
                raise invalid_value(SETTINGS, "add_prefix_space", wanted, expected)

    def _check_kind(self, kind: str, part: str, wanted: str) -> None:
        found = self._part(part).get("type", wanted if part == "model" else None)
        if found != wanted:
            raise ModelError(
                f"{self.name}: `{part}` is of type {found!r}, expected {wanted}, which the "
                f"tokenizer class {kind} has; if {self.name} is right as it is, set "
                f"`tokenizer_class` in {SETTINGS} to PreTrainedTokenizerFast",
                field=part,
            )

    def _set(self, part: dict[str, Any], key: str, value: object) -> None:
        if part.get(key) != value:
            part[key] = value
            self._is_changed = True

    def _lowercase(self) -> None:
        """Lower-case texts first, unless the normalizer does so."""
        present = self._part("normalizer")
        if any(_lowers(one) for one in _nested(present)):
            return
        every = present["normalizers"] if present.get("type") == "Sequence" else [present]
        kept = [one for one in every if one]
        lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *kept]}
        self._content["normalizer"] = lower
        self._is_changed = True

    def _apply_added_tokens(self, listed: Mapping[str, Any]) -> None:
        """Make added tokens of all that the files name as such."""
        vocabulary = self.vocabulary
        described = self.settings.get("added_tokens_decoder") or {}
        for number, one in described.items() if isinstance(described, dict) else ():
            word = _content(one)
            if vocabulary.get(word) != _number(number):
                raise self._unknown(SETTINGS, "added_tokens_decoder", word, number)
            self._add(word, vocabulary[word], one if isinstance(one, dict) else {})
        for word, number in listed.items():
            if vocabulary.get(word) != number:
                raise self._unknown(_ADDED, word, word, number)
            if word not in {one["content"] for one in self._added()}:
                self._add(word, number, {})
        known = {one["content"] for one in self._added()}
        for key, word, one in self._named():
            if word not in known:
                if word not in vocabulary:
                    raise self._unknown(SETTINGS, key, word, "a new one")
                self._add(word, vocabulary[word], one if isinstance(one, dict) else {})

    def _named(self) -> Iterator[tuple[str, str, Any]]:
        """Key, content and description of each special token that the settings name."""
        values = [(key, self.settings.get(key)) for key in _NAMES]
        for key in _LISTS:
            more = self.settings.get(key) or []
            values += [(key, one) for one in (more.values() if isinstance(more, dict) else more)]
        for key, one in values:
            if word := _content(one):
                yield key, word, one

    def _unknown(self, place: str, key: str, word: str, number: object) -> ModelError:
        return ModelError(
            f"{place}: `{key}` names the token {word[:100]!r} with id {number}, which "
            f"{self.name} does not have; save the tokenizer again with transformers",
            field=key,
        )

    def _add(self, word: str, number: int, described: Mapping[str, Any]) -> None:
        """Add or replace an added token. Missing flags are false."""
        added = self._added()
        old = next((one for one in added if one["content"] == word), None)
        flags = {flag: bool(described.get(flag, False)) for flag in _FLAGS}
        if old is not None and all(old.get(flag, False) == one for flag, one in flags.items()):
            return
        special = old.get("special", True) if old else described.get("special", True)
        new = {"id": number, "content": word, **flags, "special": special}
        kept = [one for one in added if one is not old]
        self._content["added_tokens"] = sorted([*kept, new], key=lambda one: int(one["id"]))
        self._is_changed = True

    def _check_ends(self) -> None:
        """Check the special tokens at both ends of a text against their names."""
        before, after = self._ends()
        for key, tokens in (("bos", before), ("eos", after)):
            name = _content(self.settings.get(f"{key}_token"))
            if self.settings.get(f"add_{key}_token") is True and name and name not in tokens:
                raise invalid_value(
                    SETTINGS,
                    f"add_{key}_token",
                    True,
                    f"false, because {self.name} does not add {name}; write it into its "
                    "`post_processor`",
                )
        kind = str(self.settings.get("tokenizer_class") or "").removesuffix("Fast")
        if kind not in (*_WORD_PIECES, *_BYTE_PAIRS):
            return
        for key, tokens in (("cls", before), ("sep", after)):
            name = _content(self.settings.get(f"{key}_token"))
            if name and tokens != [name]:
                have = " ".join(tokens) or "nothing"
                expected = f"{have}, which {self.name} puts there"
                raise invalid_value(SETTINGS, f"{key}_token", name, expected)

    def _ends(self) -> tuple[list[str], list[str]]:
        """Special tokens that `post_processor` puts before and after a text."""
        before: list[str] = []
        after: list[str] = []
        for one in _nested(self._part("post_processor")):
            if one.get("type") == "TemplateProcessing":
                ends = before
                for part in one.get("single", []):
                    if "Sequence" in part:
                        ends = after
                    else:
                        ends.append(str(part.get("SpecialToken", {}).get("id")))
            elif one.get("type") in ("BertProcessing", "RobertaProcessing"):
                before.append(str(one["cls"][0]))
                after.append(str(one["sep"][0]))
        return before, after


def _is_token(one: object) -> bool:
    return isinstance(one, dict) and type(one.get("id")) is int and type(one.get("content")) is str


def _content(value: object) -> str:
    """Text of a token, which is a string or an object; empty if there is none."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _number(text: object) -> int | None:
    try:
        return int(str(text))
    except ValueError:
        return None


def _nested(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A part of tokenizer.json, or the parts that a Sequence joins."""
    joined = part.get("normalizers") or part.get("pretokenizers") or part.get("processors")
    for one in joined if isinstance(joined, list) else [part]:
        if isinstance(one, dict):
            yield one


def _lowers(normalizer: Mapping[str, Any]) -> bool:
    return normalizer.get("type") == "Lowercase" or normalizer.get("lowercase") is True
