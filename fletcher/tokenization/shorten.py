"""Shortening of very long texts before tokenization, provably harmless.

The argument, for a BERT tokenizer (BertNormalizer, BertPreTokenizer, WordPiece):

1. Let a *boundary byte* be a space, tab, newline or carriage return, an ASCII punctuation character
   that occurs in no added token, or the lead byte of a Chinese character (E5 to E8: U+5000 to
   U+8FFF) where the normalizer puts spaces around those. No other UTF-8 character contains such a
   byte.
2. Normalization works on each character by itself, except for the canonical reordering of combining
   marks, which never moves a mark across a character of class 0. Boundary characters are of class 0
   and are never deleted. So the text before a boundary and the text from it on can be normalized
   separately.
3. The pre-tokenizer ends a word before each boundary character, and WordPiece sees one word at a
   time. Added tokens ([SEP] typed into a text) are found by plain search. By 1 none spans a
   boundary, and none depends on its neighbours (`single_word`), so none appears or vanishes.
4. Hence tokens(whole) = tokens(before the boundary) + tokens(from the boundary on). Once a part has
   more tokens than are kept, the kept ones are those of the whole text, and the text is truncated.

Texts of few tokens and many bytes are rare but expensive (16 MB take 8 s), so two kinds of long
runs are shortened within them. Whitespace gives no tokens, so by 4 a run of it may become its first
byte. A run of ASCII letters and digits is part of one word, and WordPiece gives one unknown token
for a word of more than `max_input_chars_per_word` characters. So the run may become its two ends,
each longer than that limit and the longest added token together. That is not done if an added
token consists of letters and digits alone.

tests/unit/tokenization compares all of this with the library on generated texts.

Ours: the library tokenizes a text in full before it truncates.
"""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from typing import Any

import numpy as np

from fletcher.core.batches import BoolArray

_WHITESPACE = b" \t\n\r"
_NO_BOUNDARIES = np.zeros(256, dtype=np.bool_)
_NO_BOUNDARIES.flags.writeable = False
# Below this size the library is faster than the search for runs.
MIN_BYTES_FOR_RUNS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Shortener:
    """Possible cuts of texts for one tokenizer.

    Attributes:
        boundaries: bool [256], True for boundary bytes; all False for tokenizers other than BERT's.
        run: Pattern of long runs, whose groups are kept; None: runs are not shortened.
    """

    boundaries: BoolArray
    run: re.Pattern[bytes] | None

    @classmethod
    def from_json(cls, tokenizer_json: str) -> Shortener:
        """Reads the conditions of the argument above from a tokenizer.json."""
        spec = json.loads(tokenizer_json)
        added = [token["content"] for token in spec.get("added_tokens") or []]
        if not _is_bert(spec) or not all(map(_is_plain, spec.get("added_tokens") or [])):
            return cls(_NO_BOUNDARIES, None)
        boundaries = _NO_BOUNDARIES.copy()
        boundaries[list(_WHITESPACE)] = True
        punctuation = set(string.punctuation).difference(*added)
        boundaries[list("".join(punctuation).encode())] = True
        if spec["normalizer"]["handle_chinese_chars"]:
            boundaries[0xE5:0xE9] = True
        # The rest of a run stays over the limit even if added tokens take both its edges.
        end = 1 + spec["model"]["max_input_chars_per_word"] + max(map(len, added), default=0)
        run = rb"([ \t\n\r])[ \t\n\r]{15,}"
        if not any(content.isalnum() for content in added):
            run += rb"|([A-Za-z0-9]{%d})[A-Za-z0-9]+([A-Za-z0-9]{%d})" % (end, end)
        return cls(boundaries, re.compile(run))

    def shorten(self, text: memoryview, size: int, from_end: bool) -> tuple[memoryview, bool]:
        """Returns a part of `text` whose tokens are the first ones of the whole text.

        Args:
            text: UTF-8.
            size: Most bytes of the part, at least 1. The part is empty if that many bytes have no
                boundary.
            from_end: The part has the last tokens, not the first.

        Returns:
            The part, and whether it may have fewer tokens than the whole text.
        """
        part, is_cut = text, len(text) > size
        if is_cut:
            window = text[-size:] if from_end else text[: size + 1]
            found = np.flatnonzero(self.boundaries[np.frombuffer(window, dtype=np.uint8)])
            if not found.size:
                part = text[:0]
            else:
                part = window[found[0] :] if from_end else window[: found[-1]]
        if self.run is not None and len(part) > MIN_BYTES_FOR_RUNS:
            part = memoryview(self.run.sub(_kept, bytes(part)))
        return part, is_cut


def _is_bert(spec: dict[str, Any]) -> bool:
    kinds = [(spec.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
    return kinds == ["BertNormalizer", "BertPreTokenizer"] and spec["model"]["type"] == "WordPiece"


def _is_plain(token: dict[str, Any]) -> bool:
    content = token["content"]
    return (
        content.isascii()
        and content.isprintable()
        and content.split() == [content]
        and not token["single_word"]
    )


def _kept(run: re.Match[bytes]) -> bytes:
    return b"".join(run.groups(b""))
