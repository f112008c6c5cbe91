"""Starts of sentences and paragraphs, from punctuation and white space alone."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import Int64Array

Levels = npt.NDArray[np.int8]

SENTENCE, PARAGRAPH = 1, 2
# Characters before a part that may tell whether the part starts with a sentence.
CONTEXT = 64

# No pattern tries a position twice, so the time is linear in the text.
_PARAGRAPH = re.compile(r"\n[^\S\n]*+\n\s*+(?=\S)")
# End of a sentence, with closing quotation marks and brackets. Western sentences end before white
# space, Chinese and Japanese ones anywhere.
_SENTENCE = re.compile(
    r"""(?:(?<![.!?\u2026])[.!?\u2026]++["'\u201d\u2019\u00bb)\]]*+\s++"""
    r"""|(?<![\u3002\uff01\uff1f\uff61])[\u3002\uff01\uff1f\uff61]++[\u300d\u300f\uff09\u201d\u2019]*+\s*+)(?=\S)"""
)
# Words, and single letters, whose full stop ends no sentence.
_ABBREVIATIONS = re.compile(
    r"mrs?|ms|dr|prof|st|vs|etc|e\.g|i\.e|cf|al|vol|figs?|eq|sec|pp|approx|ca|bzw|z\.b|d\.h|[^\W\d_]",
    re.IGNORECASE,
)
_WORD = re.compile(r"[\w.]+$")


def levels(before: str, text: str, ends: Int64Array) -> Levels:
    """Returns int8 [n], the level that starts with each token; 0: none.

    Args:
        before: Text before this part: at least its last CONTEXT characters, or all of it.
        text: The part.
        ends: int64 [n], first character after each token, ascending.
    """
    found: Levels = np.zeros(len(ends), np.int8)
    whole = before + text
    sentences = [match.end() for match in _SENTENCE.finditer(whole) if _ends(whole, match)]
    # White space at the end starts nothing. With it, each of its lines would be read to the end.
    text_end = len(whole.rstrip())
    paragraphs = [match.end() for match in _PARAGRAPH.finditer(whole, 0, text_end)]
    for level, places in ((SENTENCE, sentences), (PARAGRAPH, paragraphs)):
        own = np.array(places, np.int64) - len(before)
        tokens = np.searchsorted(ends, own[own >= 0], side="right")
        found[tokens[tokens < len(ends)]] = level
    return found


def _ends(text: str, match: re.Match[str]) -> bool:
    """Whether this punctuation ends a sentence."""
    if text[match.end()].islower():
        return False
    if text[match.start()] != ".":
        return True
    word = _WORD.search(text, max(0, match.start() - CONTEXT), match.start())
    return word is None or not _ABBREVIATIONS.fullmatch(word[0])
