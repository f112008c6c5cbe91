"""Places where texts can be divided before tokenization, other than for BERT.

A *gap* lies after an ASCII letter or digit or a Chinese character, and before an ASCII character of
a set that depends on the tokenizer. The tokens of a text are the tokens before the gap and the
tokens from the gap on, because of four properties, which `Gaps.from_json` checks:

1. Normalizers treat the two parts separately. No composition (NFC, NFKC) and no grapheme, which
   SentencePiece's character map works on, spans a gap: an ASCII character that follows a letter
   neither joins it nor extends it, and none of the characters in front joins what follows.
2. The pre-tokenizer ends a word at each gap, and where it ends does not depend on later text. For
   Metaspace and the splitters at whitespace, the next character is whitespace. For the patterns of
   GPT-2, Llama 3 and Qwen, no word has a letter followed by anything but a letter, and no word has
   a digit followed by anything but a digit. Their only look-ahead is in runs of whitespace, which
   do not end at a gap.
3. No added token spans a gap or takes characters on both of its sides. So the next character occurs
   in no added token, and is whitespace if a token must be a single word.
4. BPE, Unigram, WordPiece and WordLevel see one word at a time.

tests/unit/tokenization compares all of this with the library on generated texts.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import BoolArray, Int64Array

_LETTERS, _DIGITS = string.ascii_letters.encode(), string.digits.encode()
_SPACES = b" \t\n\r"
_OTHERS = bytes(byte for byte in range(1, 128) if byte not in _LETTERS + _DIGITS)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    *(f"{_SUFFIXES}{_WORDS}|{digits}{_REST}" for digits in (r"\p{N}", r"\p{N}{1,3}")),
}
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Precompiled", "Nmt"}
_MODELS = {"BPE", "Unigram", "WordPiece", "WordLevel"}


@dataclass(frozen=True, slots=True, eq=False)
class Gaps:
    """Rule for gaps of one tokenizer.

    Attributes:
        after_letter: bool [256], bytes that can follow a letter at a gap.
        after_digit: bool [256], bytes that can follow a digit at a gap.
    """

    after_letter: BoolArray
    after_digit: BoolArray

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> Gaps | None:
        """Read the rule from tokenizer.json; None if the argument does not hold."""
        after = _next_bytes(spec)
        added = spec.get("added_tokens") or []
        if after is None or (spec.get("model") or {}).get("type") not in _MODELS:
            return None
        if not all(_is_plain(one) for one in _nested(spec.get("normalizer"))):
            return None
        content = "".join(one["content"] for one in added)
        takes = any(one["rstrip"] and one["content"][-1:].isalnum() for one in added)
        if takes or any(character.isspace() for character in content):
            return None
        if any(one["single_word"] for one in added):
            after = bytes(byte for byte in after if byte in _SPACES)
        rest = set(after) - set(content.encode())
        letter, digit = np.zeros((2, 256), np.bool_)
        letter[sorted(rest)] = True
        digit[sorted(rest - set(_DIGITS))] = True
        return cls(letter, digit)

    def places(self, text: npt.NDArray[np.uint8]) -> Int64Array:
        """Indexes of the first byte after each gap in `text`, uint8 [n]; all are above 0."""
        if len(text) < 2:
            return np.zeros(0, np.int64)
        before, after = text[:-1], text[1:]
        is_letter = _IS_LETTER[before]
        # The last byte of a Chinese character from U+5000 to U+8FFF, whose first byte is E5 to E8.
        if len(text) > 3:
            is_letter[2:] |= (text[:-3] >= 0xE5) & (text[:-3] <= 0xE8)
        found = is_letter & self.after_letter[after] | _IS_DIGIT[before] & self.after_digit[after]
        return np.flatnonzero(found) + 1


_IS_LETTER, _IS_DIGIT = np.zeros((2, 256), np.bool_)
_IS_LETTER[list(_LETTERS)] = True
_IS_DIGIT[list(_DIGITS)] = True


def _next_bytes(spec: Mapping[str, Any]) -> bytes | None:
    """Bytes before which the pre-tokenizer ends a word; None if it may not do so."""
    found: bytes | None = None
    for one in _nested(spec.get("pre_tokenizer")):
        kind, after = one.get("type"), None
        if kind == "ByteLevel":
            after = _OTHERS + _DIGITS if one.get("use_regex", True) else b""
            if one.get("add_prefix_space", True):  # a part gets a space unless it begins with one
                after = b" " if after else b""
                found = None if found is None else bytes(set(found) & set(b" "))
        elif kind == "Split":
            pattern = (one.get("pattern") or {}).get("Regex")
            isolated = one.get("behavior") == "Isolated" and not one.get("invert")
            after = _OTHERS + _DIGITS if pattern in _PATTERNS and isolated else None
        elif kind == "Metaspace":
            after = b" " if one.get("split", True) and one.get("replacement") == "▁" else None
        elif kind in ("WhitespaceSplit", "Whitespace", "BertPreTokenizer"):
            after = _SPACES
        elif kind in ("Digits", "Punctuation"):
            after = b""
        if after is None:
            return None
        # Parts of a Sequence split one after the other: the first that splits decides.
        found = found or after
    return found or None


def _is_plain(normalizer: Mapping[str, Any]) -> bool:
    kind = normalizer.get("type")
    if kind == "Replace":  # runs of spaces become one: they begin at a gap
        return normalizer.get("pattern") in ({"Regex": " {2,}"}, {"Regex": "▁{2,}"})
    if kind == "Strip":
        return not normalizer.get("strip_left", True)
    if kind == "BertNormalizer":
        return True
    return kind in _NORMALIZERS


def _nested(part: Any) -> Iterator[Mapping[str, Any]]:
    """A part of tokenizer.json, or all parts that a Sequence joins."""
    if not isinstance(part, dict):
        return
    if part.get("type") != "Sequence":
        yield part
    for one in part.get("normalizers") or part.get("pretokenizers") or ():
        yield from _nested(one)
