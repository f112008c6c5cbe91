"""One vector a text out of those of its chunks: on whole arrays, and part of text by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.batches import Chunks, EmbeddingBatch
from fletcher.errors import FletcherError
from fletcher.vectors.pooling import normalize

_Floats = npt.NDArray[np.float64]


def weights(chunks: Chunks) -> _Floats:
    """What chunks weigh in a `weighted` mean: float64 [num_rows].

    Its tokens, times the discount of its place that DCG gives to ranks, 1 / log2(place + 2) from
    place 0 on (https://dl.acm.org/doi/10.1145/582415.582418): texts say early what they are about,
    and chunks to come change nothing about those that are there.
    """
    return np.asarray(np.maximum(chunks.num_tokens, 1) / np.log2(chunks.index + 2.0))


@dataclass(slots=True)
class _Part:
    """What is known of a text of which more comes."""

    total: Any
    weight: float = 0.0
    num_chunks: int = 0
    num_tokens: int = 0
    error: FletcherError | None = None


class Aggregation:
    """Makes vectors of texts; keeps of a text only what does not depend on its length.

    Args:
        method: `mean`, `weighted` or `max`.
        normalized: The vectors get norm 1 (zeros stay). A text of one chunk has its vector.
    """

    def __init__(self, method: str, *, normalized: bool) -> None:
        self._weighted = method == "weighted"
        self._combine: np.ufunc = np.maximum if method == "max" else np.add
        self._nothing = -np.inf if method == "max" else 0.0
        self._normalized = normalized
        self._part: _Part | None = None

    def take(
        self, batch: EmbeddingBatch | FletcherError, *, continued: bool
    ) -> EmbeddingBatch | FletcherError | None:
        """The vectors of texts out of those of their chunks.

        Args:
            batch: Chunks with their final width and norm; or why there are none.
            continued: More of the only text comes.

        Returns:
            The same of texts, whose `token_count` is that of their chunks together; None: of the
            only text more comes.
        """
        before, self._part = self._part, None
        if isinstance(batch, FletcherError):
            if before is None and not continued:
                return batch
            now = before or _Part(self._nothing)
            now.error = now.error or batch
            self._part = now if continued else None
            return None if continued else now.error
        return self._join(batch, before, continued=continued)

    def _join(
        self, batch: EmbeddingBatch, before: _Part | None, *, continued: bool
    ) -> EmbeddingBatch | None:
        chunks = batch.chunks
        assert chunks is not None
        num_chunks = np.diff(chunks.offsets)
        present = num_chunks > 0
        starts = chunks.offsets[:-1][present]
        total = np.full((len(num_chunks), batch.embeddings.shape[1]), self._nothing)
        weight, num_tokens = np.zeros(len(num_chunks)), np.zeros(len(num_chunks), np.int64)
        if len(starts):
            scale = weights(chunks) if self._weighted else np.ones(len(chunks.index))
            total[present] = self._combine.reduceat(batch.embeddings * scale[:, None], starts)
            weight[present] = np.add.reduceat(scale, starts)
            num_tokens[present] = np.add.reduceat(batch.token_count, starts, dtype=np.int64)
        errors: dict[int, FletcherError] = {}
        if before is not None:
            total[0] = self._combine(total[0], before.total)
            weight[0] += before.weight
            num_chunks[0] += before.num_chunks
            num_tokens[0] += before.num_tokens
            if before.error is not None:
                errors[0] = before.error
        for row in sorted(batch.errors):
            text = int(np.searchsorted(chunks.offsets, row, side="right")) - 1
            errors.setdefault(text, batch.errors[row])
        if continued:
            self._part = _Part(
                total[0], weight[0], int(num_chunks[0]), int(num_tokens[0]), errors.get(0)
            )
            return None
        if self._combine is np.add:
            total /= weight[:, None]
        embeddings = total.astype(np.float32)
        if self._normalized:
            several = num_chunks > 1
            embeddings[several], _ = normalize(embeddings[several])
        return EmbeddingBatch(
            embeddings=embeddings,
            norms=None,
            token_count=np.minimum(num_tokens, np.iinfo(np.int32).max).astype(np.int32),
            truncated=np.zeros(len(num_chunks), np.bool_),
            errors=errors,
        )
