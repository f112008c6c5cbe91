"""Division of a long text into parts that are tokenized one after the other.

A part ends where every tokenizer ends a word: before a space between two letters or digits of any
script. There, the parts have the same tokens as the whole text. `fletcher.tokenization.shorten`
proves that for BERT's tokenizer. It also holds for SentencePiece and byte-level BPE, which attach a
space to the word after it. If a part has no such place, it ends before other white space, or else
at any character. The word at that place may get other tokens than in the whole text.
"""

from __future__ import annotations

import re

import numpy as np

# Matches up to the last space between two letters or digits, because it is greedy.
_BETWEEN_WORDS = re.compile(r".* (?<=[^\W_] )(?=[^\W_])", re.DOTALL)
_SPACE = np.zeros(256, np.bool_)
_SPACE[list(b" \t\n\r")] = True


def part_ends(text: bytes | memoryview, max_bytes: int) -> list[int]:
    """Returns the positions at which the parts of a UTF-8 text end.

    A part has at most `max_bytes` bytes; `max_bytes` is at least 4.
    """
    ends = []
    first = 0
    while len(text) - first > max_bytes:
        first = _end(text, first, max_bytes)
        ends.append(first)
    return [*ends, len(text)]


def last_end(text: bytes | memoryview, max_bytes: int) -> int:
    """Returns how many bytes of a text can be a part, whatever text follows.

    Args:
        text: UTF-8, the text so far.
        max_bytes: Most bytes that stay behind the returned position, at least 4. If more follow
            the last space between words, the text is cut at a worse place.

    Returns:
        Number of bytes; 0 if no part is complete yet.
    """
    held = bytes(text)
    end = _between_words(held)
    return end if len(held) - end <= max_bytes else end + part_ends(held[end:], max_bytes)[-2]


def _end(text: bytes | memoryview, first: int, max_bytes: int) -> int:
    """Returns the best end of a part that begins at `first`: the last good place."""
    # A part may end right at its limit. To see that, the search needs one byte for the space there
    # and up to four for the character after it.
    end = _between_words(bytes(text[first : first + max_bytes + 1 + 4]), max_bytes)
    if end:
        return first + end
    window = np.frombuffer(text, np.uint8, min(max_bytes + 1, len(text) - first), first)
    places = np.flatnonzero(_SPACE[window[1:]])
    if len(places):
        return first + int(places[-1]) + 1
    return first + int(np.flatnonzero((window & 0xC0) != 0x80)[-1])  # a character begins here


def _between_words(text: bytes, limit: int | None = None) -> int:
    """Returns the position of the last space between letters or digits, or 0.

    Args:
        text: UTF-8; may end within a character.
        limit: Largest position to return; None: no limit.
    """
    words = text.decode(errors="ignore")
    # Number of characters up to the limit, plus the space at the limit and the character after it.
    end = len(words) if limit is None else len(text[:limit].decode(errors="ignore")) + 2
    found = _BETWEEN_WORDS.match(words, 0, end)
    return 0 if found is None else len(found[0].encode()) - 1
