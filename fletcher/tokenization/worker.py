"""The tokenizer process: a Tokenizer behind the worker protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fletcher.batches import TextBatch, TokenBatch
from fletcher.tokenization.tokenizer import Tokenizer


class Encoder(Protocol):
    """What makes tokens of texts; `max_length` of them at most."""

    max_length: int

    def encode(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts of a batch."""
        ...


class TokenizerWorker:
    """One core, one request at a time."""

    concurrency = 1
    express = 0

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer

    def run(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes a batch."""
        return self._tokenizer.encode(batch)

    def describe(self) -> dict[str, str]:
        """Nothing that is not the same for every tokenizer."""
        return {"max_length": str(self._tokenizer.max_length)}


def load(folder: str) -> TokenizerWorker:
    """Factory for a worker's spec: the tokenizer of the bundle in `folder`."""
    return TokenizerWorker(Tokenizer.load(Path(folder)))
