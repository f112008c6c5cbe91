"""Starts of sentences and paragraphs, found by punctuation and white space."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import Int64Array

Levels = npt.NDArray[np.int8]

SENTENCE, PARAGRAPH = 1, 2
# Number of characters before a text part that are used to tell whether a sentence starts with it.
CONTEXT = 64

# No pattern tries a position twice, so the search time is linear in the length of the text.
_PARAGRAPH = re.compile(r"\n[^\S\n]*+\n\s*+(?=\S)")
# End of a sentence, including closing quotation marks and brackets. Western punctuation ends a
# sentence only before white space. Chinese and Japanese punctuation always ends one.
_SENTENCE = re.compile(
    r"""(?:(?<![.!?\u2026])[.!?\u2026]++["'\u201d\u2019\u00bb)\]]*+\s++"""
    r"""|(?<![\u3002\uff01\uff1f\uff61])[\u3002\uff01\uff1f\uff61]++[\u300d\u300f\uff09\u201d\u2019]*+\s*+)(?=\S)"""
)
# Abbreviations and single letters. A full stop after one of them ends no sentence.
_ABBREVIATIONS = re.compile(
    r"mrs?|ms|dr|prof|st|vs|etc|e\.g|i\.e|cf|al|vol|figs?|eq|sec|pp|approx|ca|bzw|z\.b|d\.h|[^\W\d_]",
    re.IGNORECASE,
)
_WORD = re.compile(r"[\w.]+$")


def levels(before: str, text: str, ends: Int64Array) -> Levels:
    """Returns int8 [n], whether a sentence or a paragraph starts with each token.

    The values are SENTENCE, PARAGRAPH, or 0 if neither starts there.

    Args:
        before: At least the last CONTEXT characters of the text before this part, or all of it.
        text: The part.
        ends: int64 [n], index in `text` of the first character after each token, ascending.
    """
    found: Levels = np.zeros(len(ends), np.int8)
    whole = before + text
    sentences = [match.end() for match in _SENTENCE.finditer(whole) if _ends(whole, match)]
    # White space at the end of the text starts no paragraph. It is left out because the pattern
    # would read all of it again from each of its lines.
    text_end = len(whole.rstrip())
    paragraphs = [match.end() for match in _PARAGRAPH.finditer(whole, 0, text_end)]
    for level, places in ((SENTENCE, sentences), (PARAGRAPH, paragraphs)):
        own = np.array(places, np.int64) - len(before)
        tokens = np.searchsorted(ends, own[own >= 0], side="right")
        found[tokens[tokens < len(ends)]] = level
    return found


def _ends(text: str, match: re.Match[str]) -> bool:
    """Whether the matched punctuation ends a sentence."""
    if text[match.end()].islower():
        return False
    if text[match.start()] != ".":
        return True
    word = _WORD.search(text, max(0, match.start() - CONTEXT), match.start())
    return word is None or not _ABBREVIATIONS.fullmatch(word[0])
