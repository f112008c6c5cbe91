"""Shortening of very long texts before tokenization, with a proof of safety.

The proof, for a BERT tokenizer (BertNormalizer, BertPreTokenizer, WordPiece):

1. A *boundary byte* is one of three kinds: a space, tab, newline or carriage return; an ASCII
   punctuation character that occurs in no added token; or, if the normalizer puts spaces around
   Chinese characters, the lead byte of such a character (E5 to E8: U+5000 to U+8FFF). A character
   with a boundary byte is a boundary character. No other UTF-8 character contains such a byte.
2. Normalization treats each character by itself, with one exception: the canonical reordering of
   combining marks. Reordering never moves a mark across a character of class 0. Boundary characters
   are of class 0 and are never deleted. So the text before a boundary, and the text from the
   boundary on, can be normalized separately.
3. The pre-tokenizer ends a word before each boundary character, and WordPiece sees one word at a
   time. Added tokens (such as [SEP] typed into a text) are found by plain search. By 1 no added
   token spans a boundary. No added token depends on its neighbours (`single_word`). So a split at a
   boundary adds and removes no added token.
4. Hence tokens(text) = tokens(before the boundary) + tokens(from the boundary on). If a part has
   more tokens than truncation keeps, the kept tokens are those of the full text, and the text
   counts as truncated.

Texts with few tokens and many bytes are rare but expensive (16 MB take 8 s). So two kinds of long
runs in a text are shortened. Whitespace gives no tokens, so by 4 a run of whitespace may be
replaced by its first byte. A run of ASCII letters and digits is part of one word. WordPiece gives
one unknown token for a word of more than `max_input_chars_per_word` characters. So such a run may
be replaced by its two ends, if each end is longer than this limit plus the longest added token.
Runs of letters and digits are not shortened if an added token consists only of such characters.

`fletcher.tokenization.gaps` divides texts for other tokenizers.

tests/unit/tokenization compares all of this with the library on generated texts.

Why no library: the `tokenizers` library tokenizes a text in full before it truncates.
"""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import BoolArray, Int64Array
from fletcher.tokenization.gaps import Gaps

_WHITESPACE = b" \t\n\r"
_NO_BOUNDARIES = np.zeros(256, dtype=np.bool_)
_NO_BOUNDARIES.flags.writeable = False
# Below this size the library is faster than the search for runs.
MIN_BYTES_FOR_RUNS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Shortener:
    """Shortens texts for one tokenizer.

    Attributes:
        boundaries: bool [256], True for boundary bytes. All False if the proof does not hold for
            the tokenizer.
        gaps: Rule for places to divide a text of a tokenizer without boundary bytes; None if there
            is no such rule.
        run: Pattern of long runs. A run is replaced by the pattern's groups. None: runs are not
            shortened.
    """

    boundaries: BoolArray
    run: re.Pattern[bytes] | None
    gaps: Gaps | None = None

    @classmethod
    def from_json(cls, tokenizer_json: str) -> Shortener:
        """Reads from a tokenizer.json whether and how the module's proof applies."""
        spec = json.loads(tokenizer_json)
        added = [token["content"] for token in spec.get("added_tokens") or []]
        if not _is_bert(spec) or not all(map(_is_plain, spec.get("added_tokens") or [])):
            return cls(_NO_BOUNDARIES, None, Gaps.from_json(spec))
        boundaries = _NO_BOUNDARIES.copy()
        boundaries[list(_WHITESPACE)] = True
        punctuation = set(string.punctuation).difference(*added)
        boundaries[list("".join(punctuation).encode())] = True
        if spec["normalizer"]["handle_chinese_chars"]:
            boundaries[0xE5:0xE9] = True
        # So long that a shortened run stays over the limit even if added tokens overlap its edges.
        end = 1 + spec["model"]["max_input_chars_per_word"] + max(map(len, added), default=0)
        run = rb"([ \t\n\r])[ \t\n\r]{15,}"
        if not any(content.isalnum() for content in added):
            run += rb"|([A-Za-z0-9]{%d})[A-Za-z0-9]+([A-Za-z0-9]{%d})" % (end, end)
        return cls(boundaries, re.compile(run))

    def shorten(self, text: memoryview, size: int, from_end: bool) -> tuple[memoryview, bool]:
        """Returns a part of `text` whose tokens are the first tokens of the full text.

        Args:
            text: UTF-8.
            size: Most bytes of the part, at least 1. If these bytes have no boundary, the part is
                empty.
            from_end: Whether to return a part with the last tokens instead of the first.

        Returns:
            The part, and whether it may have fewer tokens than the full text.
        """
        part, is_cut = text, len(text) > size
        if is_cut:
            window = text[-size:] if from_end else text[: size + 1]
            found = self._places(np.frombuffer(window, dtype=np.uint8))
            if not found.size:
                part = text[:0]
            else:
                part = window[found[0] :] if from_end else window[: found[-1]]
        if self.run is not None and len(part) > MIN_BYTES_FOR_RUNS:
            part = memoryview(self.run.sub(_kept, bytes(part)))
        return part, is_cut

    def _places(self, text: npt.NDArray[np.uint8]) -> Int64Array:
        """Indexes in `text` where it can be divided."""
        if self.gaps is not None:
            return self.gaps.places(text)
        return np.flatnonzero(self.boundaries[text])


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
