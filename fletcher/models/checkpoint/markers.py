"""ColBERT's markers of documents and queries, and its tokens that have a vector.

A marker is a token that tells documents and queries apart. It is a text's second token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fletcher.core.batches import BoolArray, Int32Array


@dataclass(frozen=True, slots=True)
class Skipped:
    """Tokens that have no vector in documents, such as punctuation.

    Attributes:
        marker: Id of the token that marks documents.
        tokens: Ids of the tokens without a vector.
    """

    marker: int
    tokens: tuple[int, ...]

    def places(self, input_ids: Int32Array, lengths: Int32Array) -> BoolArray:
        """Bool [total_tokens], True for tokens without a vector; rows follow each other."""
        skipped: BoolArray = np.isin(input_ids, self.tokens)
        found: BoolArray = skipped & np.repeat(_marked(self.marker, input_ids, lengths), lengths)
        return found


@dataclass(frozen=True, slots=True)
class Queries:
    """Treatment of queries by ColBERT (https://arxiv.org/abs/2004.12832, section 3.2).

    Attributes:
        marker: Id of the token that marks queries.
        length: Largest number of tokens of a query, including special tokens.
        filler: Id of the token that fills shorter queries up to `length`. Each filler gets its own
            vector. None leaves shorter queries as they are.
        attended: Whether tokens attend to fillers.
    """

    marker: int
    length: int
    filler: int | None = None
    attended: bool = False

    def filled(self, input_ids: Int32Array, lengths: Int32Array) -> Int32Array:
        """int32 [num_rows], number of tokens of each row, including its fillers."""
        if self.filler is None:
            return lengths
        queries = _marked(self.marker, input_ids, lengths)
        filled: Int32Array = np.where(queries, np.maximum(lengths, self.length), lengths)
        return filled


def _marked(marker: int, input_ids: Int32Array, lengths: Int32Array) -> BoolArray:
    """Bool [num_rows], True for rows whose second token is `marker`."""
    seconds = np.minimum(np.cumsum(lengths) - lengths + 1, len(input_ids) - 1)
    marked: BoolArray = (input_ids[seconds] == marker) & (lengths > 1)
    return marked
