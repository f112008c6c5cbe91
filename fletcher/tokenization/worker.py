"""The tokenizer process: a Tokenizer behind the worker protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fletcher.core.batches import TextBatch, TokenBatch
from fletcher.models.bundle.bundle import version_folder
from fletcher.tokenization.tokenizer import Tokenizer


class TextEncoder(Protocol):
    """What makes tokens of texts; `max_length` of them at most."""

    max_length: int

    def encode(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts of a batch."""
        ...


class TokenizerWorker:
    """One core, one request at a time."""

    concurrency = 1
    urgent_concurrency = 0

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer

    def run(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes a batch."""
        return self._tokenizer.encode(batch)

    def describe(self) -> dict[str, str]:
        """Nothing that is not the same for every tokenizer."""
        return {"max_length": str(self._tokenizer.max_length)}


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Whose tokenizer a process loads; picklable.

    Attributes:
        bundle: The bundle's folder.
        version: Its hash: what the folder must hold, or the one kept beside it; empty: whatever is
            there.
    """

    bundle: str
    version: str = ""

    @property
    def folder(self) -> Path:
        """Where that is now. Raises ModelError where it is no more."""
        folder = Path(self.bundle)
        return version_folder(folder, self.version) if self.version else folder


def load(config: TokenizerConfig) -> TokenizerWorker:
    """Factory for a worker's spec: a bundle's tokenizer.

    Raises:
        ModelError: The bundle is gone or damaged.
    """
    return TokenizerWorker(Tokenizer.from_bundle(config.folder))
