"""Cutting a long text into parts that are tokenized one after the other.

A part ends where tokenizers end a word anyway: before a space between two ASCII letters or digits.
Of BERT's that is proved in `fletcher.tokenization.shorten`; SentencePiece and byte-level BPE give a
space to the word behind it, so there, too, the tokens of the parts are those of the whole. Where a
part would have no such place it ends before other white space, and without that at a character: the
word there may then have other tokens than it has whole.
"""

from __future__ import annotations

import numpy as np

_WORD = np.zeros(256, np.bool_)
_WORD[list(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")] = True
_SPACE = np.zeros(256, np.bool_)
_SPACE[list(b" \t\n\r")] = True


def part_ends(text: bytes, max_bytes: int) -> list[int]:
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


def _end(text: bytes, first: int, max_bytes: int) -> int:
    """The last good end of a part that begins at `first`, where the text is longer than a part."""
    # As a part may end at its limit, the two bytes behind are looked at, too.
    window = np.frombuffer(text, np.uint8, min(max_bytes + 2, len(text) - first), first)
    word, space = _WORD[window], _SPACE[window]
    between = word[:-2] & (window[1:-1] == ord(" ")) & word[2:]
    for places in (np.flatnonzero(between), np.flatnonzero(space[1 : max_bytes + 1])):
        if len(places):
            return first + int(places[-1]) + 1
    starts = np.flatnonzero((window[: max_bytes + 1] & 0xC0) != 0x80)  # of characters
    return first + int(starts[-1])
