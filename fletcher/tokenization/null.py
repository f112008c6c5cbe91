"""A tokenizer without a vocabulary: four bytes of text are a token, whatever they say.

For measuring everything around tokenization. Texts get about as many tokens as English gets of a
real tokenizer, which depend on the text and on nothing else. No model knows these tokens.
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
    """Bytes to ids.

    Args:
        max_length: Tokens per text at most.
    """

    def __init__(self, *, max_length: int) -> None:
        self.max_length = max_length

    @classmethod
    def from_bundle(cls, folder: Path) -> NullTokenizer:
        """One that cuts where the tokenizer of a model bundle does."""
        return cls(max_length=ModelBundle.from_folder(folder).max_length)

    def encode(self, batch: TextBatch) -> TokenBatch:
        """Makes ids of all texts of a batch; see `Tokenizer.encode` for what becomes of long ones.

        A text's last token has what is left of it, 0 to 3 bytes, so each has at least one.

        Raises:
            InvalidCommandError: Texts shall be cut into chunks.
        """
        if batch.chunking is not None:
            raise InvalidCommandError(
                "`chunking` needs a tokenizer, and this server runs with --tokenizer null",
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
    """Factory for a worker's spec: as a bundle's tokenizer, without it."""
    return TokenizerWorker(NullTokenizer.from_bundle(config.folder))
