"""Cutting a very long text before it is tokenized, where that provably cannot change the result.

The argument, for a BERT tokenizer (BertNormalizer, BertPreTokenizer, WordPiece):

1. Let a *boundary byte* be a space, tab, newline or carriage return, an ASCII punctuation character
   that occurs in no added token, or the lead byte of a Chinese character (E5 to E8: U+5000 to
   U+8FFF) where the normalizer puts spaces around those. No other UTF-8 character contains such a
   byte.
2. Normalization works on each character by itself, but for the canonical reordering of combining
   marks, which never moves a mark across a character of class 0; boundary characters are of class 0
   and are never deleted. So normalizing what stands before a boundary and what stands from it on,
   and joining the two, is normalizing the whole.
3. The pre-tokenizer ends a word before each boundary character, and WordPiece sees one word at a
   time. Added tokens ([SEP] typed into a text) are found by plain search; by 1 none spans a
   boundary, and none asks what stands beside it (`single_word`), so none appears or vanishes.
4. Hence tokens(whole) = tokens(before the boundary) + tokens(from the boundary on), and once the
   part at hand has more tokens than are kept, the tokens that are kept are those of the whole, and
   the whole is truncated.

A text of few tokens and many bytes is rare but expensive (16 MB take 8 s), so two kinds of long
runs are shortened within it. Whitespace gives no tokens, so by 4 a run of it may become its first
byte. A run of ASCII letters and digits is part of one word; WordPiece answers a single unknown
token to a word of more than `max_input_chars_per_word` characters, however many. So the run may
become its two ends, each longer than that limit and the longest added token together (unless an
added token consists of letters and digits alone; then nothing of the kind is done).

tests/unit/tokenization holds all this against the library on generated texts.
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
# Below this the library is quicker than the search.
MIN_BYTES_FOR_RUNS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Shortener:
    """What may be cut where, for one tokenizer.

    Attributes:
        boundaries: bool [256], True for boundary bytes; none for tokenizers of another kind.
        run: Finds long runs, its groups are what is kept of them; None: keep all.
    """

    boundaries: BoolArray
    run: re.Pattern[bytes] | None

    @classmethod
    def from_json(cls, tokenizer_json: str) -> Shortener:
        """Reads from a tokenizer.json what the argument above needs to hold."""
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
        # What is left of a run stays over the limit even if added tokens take both its edges.
        end = 1 + spec["model"]["max_input_chars_per_word"] + max(map(len, added), default=0)
        run = rb"([ \t\n\r])[ \t\n\r]{15,}"
        if not any(content.isalnum() for content in added):
            run += rb"|([A-Za-z0-9]{%d})[A-Za-z0-9]+([A-Za-z0-9]{%d})" % (end, end)
        return cls(boundaries, re.compile(run))

    def shorten(self, text: memoryview, size: int, from_end: bool) -> tuple[memoryview, bool]:
        """A piece of `text` whose tokens are the first (last, `from_end`) of the whole text's.

        Args:
            text: UTF-8.
            size: Bytes that the piece has at most, 1 or more; none at all where there is no
                boundary among that many.
            from_end: Keep the end rather than the start.

        Returns:
            The piece, and whether it may have fewer tokens than the whole.
        """
        piece, is_cut = text, len(text) > size
        if is_cut:
            window = text[-size:] if from_end else text[: size + 1]
            found = np.flatnonzero(self.boundaries[np.frombuffer(window, dtype=np.uint8)])
            if not found.size:
                piece = text[:0]
            else:
                piece = window[found[0] :] if from_end else window[: found[-1]]
        if self.run is not None and len(piece) > MIN_BYTES_FOR_RUNS:
            piece = memoryview(self.run.sub(_kept, bytes(piece)))
        return piece, is_cut


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
