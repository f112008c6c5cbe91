"""Cutting a long text into parts that are tokenized one after the other.

A part ends where tokenizers end a word anyway: before a space between two letters or digits, of
any script. Of BERT's that is proved in `fletcher.tokenization.shorten`; SentencePiece and
byte-level BPE give a space to the word behind it, so there, too, the tokens of the parts are those
of the whole. Where a part would have no such place it ends before other white space, and without
that at a character: the word there may then have other tokens than it has whole.
"""

from __future__ import annotations

import re

import numpy as np

# Greedy: the last one. There may be any number of other spaces behind it.
_BETWEEN_WORDS = re.compile(r".* (?<=[^\W_] )(?=[^\W_])", re.DOTALL)
_SPACE = np.zeros(256, np.bool_)
_SPACE[list(b" \t\n\r")] = True


def part_ends(text: bytes | memoryview, max_bytes: int) -> list[int]:
    """Where the parts of a text end, the last at its end.

    Args:
        text: UTF-8.
        max_bytes: Bytes of a part at most, 4 or more.
    """
    ends = []
    first = 0
    while len(text) - first > max_bytes:
        first = _end(text, first, max_bytes)
        ends.append(first)
    return [*ends, len(text)]


def last_end(text: bytes | memoryview, max_bytes: int) -> int:
    """How much of a text can be a part, whatever comes behind it.

    Args:
        text: UTF-8, what there is of it.
        max_bytes: Beyond so many bytes, 4 or more, it ends where it would for want of a better
            place.

    Returns:
        0 where nothing of it can be one yet.
    """
    held = bytes(text)
    end = _between_words(held)
    return end if len(held) - end <= max_bytes else end + part_ends(held[end:], max_bytes)[-2]


def _end(text: bytes | memoryview, first: int, max_bytes: int) -> int:
    """The last good end of a part that begins at `first`, where the text is longer than a part."""
    # As a part may end at its limit, the space there and the character behind it are looked at.
    end = _between_words(bytes(text[first : first + max_bytes + 1 + 4]), max_bytes)
    if end:
        return first + end
    window = np.frombuffer(text, np.uint8, min(max_bytes + 1, len(text) - first), first)
    places = np.flatnonzero(_SPACE[window[1:]])
    if len(places):
        return first + int(places[-1]) + 1
    return first + int(np.flatnonzero((window & 0xC0) != 0x80)[-1])  # where a character begins


def _between_words(text: bytes, limit: int | None = None) -> int:
    """The last space between two letters or digits, at `limit` bytes or before; 0: there is none.

    The text may end within a character.
    """
    words = text.decode(errors="ignore")
    # Up to the limit, the space behind it, and one character more.
    end = len(words) if limit is None else len(text[:limit].decode(errors="ignore")) + 2
    found = _BETWEEN_WORDS.match(words, 0, end)
    return 0 if found is None else len(found[0].encode()) - 1
