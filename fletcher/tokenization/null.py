"""Null tokenizer, without a vocabulary: every four bytes of text are a token.

Use it to measure the server without the cost of tokenization. English texts get about as many
tokens as from a real tokenizer. The tokens depend only on the text, and mean nothing to any model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fletcher.core.batches import Int32Array, TextBatch, TokenBatch
from fletcher.errors import InvalidCommandError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tokenization.flat import FlatTokens, prompted
from fletcher.tokenization.worker import TokenizerConfig, TokenizerWorker

_BYTES_PER_TOKEN = 4


class NullTokenizer:
    """Tokenizer that turns bytes into token ids."""

    def __init__(self, *, max_length: int) -> None:
        self.max_length = max_length

    @classmethod
    def from_bundle(cls, folder: Path) -> NullTokenizer:
        return cls(max_length=ModelBundle.from_folder(folder).max_length)

    def encode(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts of a batch; see `Tokenizer.encode` for truncation.

        The last token of a text has the remaining 0 to 3 bytes. So every text has at least one
        token.

        Raises:
            InvalidCommandError: The batch asks for chunks.
        """
        if batch.chunking is not None:
            raise InvalidCommandError(
                "`chunking` needs a tokenizer, and this server runs with --tokenizer null; leave "
                "it out, or start the server without --tokenizer null",
                field="chunking",
                allowed=["none"],
            )
        batch = prompted(batch)
        lengths = np.diff(batch.offsets)
        totals = lengths // _BYTES_PER_TOKEN + 1
        ends = np.cumsum(totals)
        starts = ends - totals
        padded = np.frombuffer(bytes(batch.data) + bytes(_BYTES_PER_TOKEN), np.uint8)
        at_each = np.ndarray(len(padded) - 3, "<u4", padded, strides=(1,))
        shift = np.repeat(batch.offsets[:-1] - _BYTES_PER_TOKEN * starts, totals)
        ids = at_each[np.arange(len(shift)) * _BYTES_PER_TOKEN + shift]
        bits_left = (8 * (lengths % _BYTES_PER_TOKEN)).astype(np.uint32)
        ids[ends - 1] &= (np.uint32(1) << bits_left) - np.uint32(1)
        input_ids: Int32Array = (ids & np.uint32(0x7FFFFFFF)).view(np.int32)
        tokens = FlatTokens(input_ids, starts, totals, np.ones(len(totals), np.bool_))
        return tokens.framed(batch, min(batch.max_length or self.max_length, self.max_length))


def load(config: TokenizerConfig) -> TokenizerWorker:
    """Makes a NullTokenizer in place of a bundle's tokenizer; a `WorkerSpec.factory`."""
    return TokenizerWorker(NullTokenizer.from_bundle(config.folder))
