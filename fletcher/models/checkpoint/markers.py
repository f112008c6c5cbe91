"""What ColBERT's markers change: which tokens of documents and of queries have vectors.

A text's second token marks it as the one or the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fletcher.core.batches import BoolArray, Int32Array


@dataclass(frozen=True, slots=True)
class Skipped:
    """Tokens whose vectors a token-vector model leaves out of documents, such as punctuation.

    Attributes:
        marker: The token that stands second in a document.
        tokens: Those left out there.
    """

    marker: int
    tokens: tuple[int, ...]

    def places(self, input_ids: Int32Array, lengths: Int32Array) -> BoolArray:
        """Bool [total_tokens], True where a token's vector is left out.

        Args:
            input_ids: int32 [total_tokens], row after row.
            lengths: int32 [num_rows].
        """
        skipped: BoolArray = np.isin(input_ids, self.tokens)
        found: BoolArray = skipped & np.repeat(_marked(self.marker, input_ids, lengths), lengths)
        return found


@dataclass(frozen=True, slots=True)
class Queries:
    """How a token-vector model reads queries (https://arxiv.org/abs/2004.12832, section 3.2).

    Attributes:
        marker: The token that stands second in a query.
        length: Tokens of a query at most, special ones included.
        filler: The token that fills shorter queries up to `length`, each time with a vector of its
            own; None: they are left as they are.
        attended: The other tokens see fillers; else fillers see them alone.
    """

    marker: int
    length: int
    filler: int | None = None
    attended: bool = False

    def filled(self, input_ids: Int32Array, lengths: Int32Array) -> Int32Array:
        """int32 [num_rows], the row's tokens with its fillers.

        Args:
            input_ids: int32 [total_tokens], row after row.
            lengths: int32 [num_rows].
        """
        if self.filler is None:
            return lengths
        queries = _marked(self.marker, input_ids, lengths)
        filled: Int32Array = np.where(queries, np.maximum(lengths, self.length), lengths)
        return filled


def _marked(marker: int, input_ids: Int32Array, lengths: Int32Array) -> BoolArray:
    """Bool [num_rows], True where a marker stands second."""
    seconds = np.minimum(np.cumsum(lengths) - lengths + 1, len(input_ids) - 1)
    marked: BoolArray = (input_ids[seconds] == marker) & (lengths > 1)
    return marked
