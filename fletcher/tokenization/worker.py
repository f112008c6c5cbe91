"""Worker that runs in a tokenizer process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fletcher.core.batches import TextBatch, TokenBatch
from fletcher.models.bundle.bundle import version_folder
from fletcher.tokenization.tokenizer import Tokenizer


class TextEncoder(Protocol):
    """Tokenizer that gives each text at most `max_length` tokens."""

    max_length: int

    def encode(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts of a batch."""


class TokenizerWorker:
    """Tokenizes one request at a time, on one core."""

    concurrency = 1
    urgent_concurrency = 0

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer

    def run(self, batch: TextBatch) -> TokenBatch:
        return self._tokenizer.encode(batch)

    def describe(self) -> dict[str, str]:
        return {"max_length": str(self._tokenizer.max_length)}


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Bundle that a tokenizer process loads; picklable.

    Attributes:
        bundle: Folder of the bundle.
        version: Hash of the version to load. It is in the bundle's folder or kept beside it. Empty:
            whichever version is in the folder.
    """

    bundle: str
    version: str = ""

    @property
    def folder(self) -> Path:
        """Folder that now has this version. Raises ModelError if no folder has it."""
        folder = Path(self.bundle)
        return version_folder(folder, self.version) if self.version else folder


def load(config: TokenizerConfig) -> TokenizerWorker:
    """Loads a bundle's tokenizer; a `WorkerSpec.factory`. Raises ModelError."""
    return TokenizerWorker(Tokenizer.from_bundle(config.folder))
