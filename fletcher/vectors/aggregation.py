"""Aggregation of the vectors of a text's chunks to one vector.

The chunks of a text may come in several text parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import Chunks, EmbeddingBatch
from fletcher.errors import FletcherError
from fletcher.vectors.pooling import normalize

_Floats = npt.NDArray[np.float64]


def weights(chunks: Chunks) -> _Floats:
    """Returns float64 [num_rows], the weight of each chunk in a `weighted` mean.

    A weight is the chunk's number of tokens times DCG's discount of its index, 1 / log2(index + 2)
    (https://dl.acm.org/doi/10.1145/582415.582418). Texts tend to state their subject early, and
    later chunks do not change the weights of earlier ones.
    """
    return np.asarray(np.maximum(chunks.num_tokens, 1) / np.log2(chunks.index + 2.0))


def aggregation(method: str, *, normalized: bool) -> Aggregation | Hierarchical:
    """Returns the aggregation for a method.

    Args:
        method: `mean`, `weighted`, `max` or `hierarchical`.
        normalized: Whether the vectors of texts with several chunks are scaled to norm 1. Zero
            vectors stay zero. A text with one chunk keeps the chunk's vector.
    """
    if method == "hierarchical":
        return Hierarchical(normalized=normalized)
    return Aggregation(method, normalized=normalized)


@dataclass(slots=True)
class _Part:
    """State of a text whose next part is still to come."""

    total: Any
    weight: float = 0.0
    num_chunks: int = 0
    num_tokens: int = 0
    error: FletcherError | None = None


class Aggregation:
    """Aggregation by `mean`, `weighted` or `max`; see `aggregation`.

    Its memory does not grow with the length of a text.
    """

    def __init__(self, method: str, *, normalized: bool) -> None:
        self._weighted = method == "weighted"
        self._combine: np.ufunc = np.maximum if method == "max" else np.add
        self._nothing = -np.inf if method == "max" else 0.0
        self._normalized = normalized
        self._part: _Part | None = None

    def add_chunks(
        self, batch: EmbeddingBatch | FletcherError, *, continued: bool
    ) -> EmbeddingBatch | FletcherError | None:
        """Adds chunks and returns the vectors of the texts that are complete.

        Args:
            batch: Chunks with their final width and norm, or the error of all of them.
            continued: Whether the last text has more parts.

        Returns:
            The vectors of the complete texts, or an error. The `token_count` of a text is the sum
            over its chunks. None if no text is complete.
        """
        before, self._part = self._part, None
        if isinstance(batch, FletcherError):
            if before is None and not continued:
                return batch
            now = before or _Part(self._nothing)
            now.error = now.error or batch
            self._part = now if continued else None
            return None if continued else now.error
        found = self._join(batch, before, continued=continued)
        return None if continued and not len(found.embeddings) else found

    @property
    def waits(self) -> bool:
        """Whether the last text has more parts, which were not added yet."""
        return self._part is not None

    def _join(
        self, batch: EmbeddingBatch, before: _Part | None, *, continued: bool
    ) -> EmbeddingBatch:
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
            last = len(num_chunks) - 1
            error = errors.pop(last, None)
            self._part = _Part(
                total[last], weight[last], int(num_chunks[last]), int(num_tokens[last]), error
            )
            total, weight = total[:last], weight[:last]
            num_chunks, num_tokens = num_chunks[:last], num_tokens[:last]
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


class Hierarchical:
    """Mean of a text's paragraph vectors, each of which is the mean of its chunks.

    All paragraphs have the same weight, however many chunks they have.

    Args:
        normalized: As in `aggregation`. Applies to the vectors of paragraphs, too.
    """

    def __init__(self, *, normalized: bool) -> None:
        self._paragraphs = Aggregation("mean", normalized=normalized)
        self._texts = Aggregation("mean", normalized=normalized)

    def add_chunks(
        self, batch: EmbeddingBatch | FletcherError, *, continued: bool
    ) -> EmbeddingBatch | FletcherError | None:
        if isinstance(batch, FletcherError):
            self._paragraphs.add_chunks(batch, continued=False)
            return self._texts.add_chunks(batch, continued=continued)
        chunks = batch.chunks
        assert chunks is not None
        starts = np.flatnonzero(chunks.begins)
        # A paragraph that continues from the part before comes first. It may have no chunk here.
        if self._paragraphs.waits or (len(chunks.begins) and not chunks.begins[0]):
            starts = np.append(0, starts)
        paragraphs = EmbeddingBatch.zeros(0, batch.embeddings.shape[1])
        if len(starts):
            bounds = replace(chunks, offsets=np.append(starts, len(chunks.index)))
            joined = self._paragraphs.add_chunks(replace(batch, chunks=bounds), continued=continued)
            assert not isinstance(joined, FletcherError)
            paragraphs = joined or paragraphs
        ends = np.searchsorted(starts, chunks.offsets[1:])
        ends[-1] = len(paragraphs.token_count)
        ones = np.ones(len(paragraphs.token_count), np.int32)
        offsets = np.append(0, ends).astype(np.int64)
        of_texts = replace(chunks, offsets=offsets, index=ones, num_tokens=ones)
        return self._texts.add_chunks(replace(paragraphs, chunks=of_texts), continued=continued)
