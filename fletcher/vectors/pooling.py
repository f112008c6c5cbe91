"""Pooling, normalisation and cutting of vectors to a width."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import BoolArray, FloatArray, VectorArray

_Vectors = TypeVar("_Vectors", FloatArray, VectorArray)

# Smallest divisor in `normalize`, as in torch.nn.functional.normalize.
MIN_NORM = 1e-12
_LEAST_LENGTH = 1e-15  # squares of such numbers are still normal in float32


def pool(token_embeddings: FloatArray, mask: BoolArray, pooling: str) -> FloatArray:
    """Pools token embeddings to one embedding for each row.

    Args:
        token_embeddings: float32 [num_rows, length, dim]; values at padding are ignored.
        mask: bool [num_rows, length], True for tokens and False for the padding after them. Each
            row has at least one token.
        pooling: As in ModelSpec: a name, or several joined by `+`, whose results are concatenated.

    Returns:
        float32 [num_rows, dim], or several times as wide if poolings are joined.
    """
    if "+" in pooling:
        every = [pool(token_embeddings, mask, one) for one in pooling.split("+")]
        return np.concatenate(every, axis=1)
    if pooling == "cls":
        return np.ascontiguousarray(token_embeddings[:, 0])
    if pooling == "last_token":
        last = mask.sum(axis=1) - 1
        return np.asarray(token_embeddings[np.arange(len(mask)), last], dtype=np.float32)
    if pooling == "max":
        seen = np.where(mask[:, :, None], token_embeddings, np.float32(-np.inf))
        return np.asarray(seen.max(axis=1), dtype=np.float32)
    kept = np.where(mask[:, :, None], token_embeddings, np.float32(0))
    weights = mask.astype(np.float32)
    if pooling == "weighted_mean":  # a token counts as often as its position, from 1
        weights *= np.arange(1, mask.shape[1] + 1, dtype=np.float32)
        kept = kept * weights[:, :, None]
    total, count = kept.sum(axis=1, dtype=np.float32), weights.sum(axis=1)[:, None]
    if pooling == "mean_sqrt_len":
        count = np.sqrt(count)
    elif pooling not in ("mean", "weighted_mean"):
        raise ValueError(f"`pooling` is {pooling!r}, expected names of `spec.POOLINGS`")
    return np.asarray(total / count, dtype=np.float32)


def normalize(embeddings: FloatArray) -> tuple[FloatArray, npt.NDArray[np.float32]]:
    """Scales rows to an L2 norm of 1; rows of zeros stay zero.

    Args:
        embeddings: float32 [num_rows, dim].

    Returns:
        float32 [num_rows, dim], and float32 [num_rows], the norms before normalisation.
    """
    # Rows that are not finite, or become so, are found later: `fletcher.vectors.finite`.
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.asarray(np.linalg.norm(embeddings, axis=1), dtype=np.float32)
        divisors = np.maximum(norms, np.float32(MIN_NORM))[:, None]
        return np.asarray(embeddings / divisors, dtype=np.float32), norms


def finish(
    embeddings: _Vectors, norms: FloatArray | None, *, dims: int, normalized: bool
) -> _Vectors:
    """Applies `dims` and `normalize` to a graph's output.

    Args:
        embeddings: float32 [n, dim], L2-normalised if `norms` is given. May be float16 if `dims`
            and `normalized` change nothing.
        norms: float32 [n], L2 norms before normalisation. None: the vectors are not normalised.
        dims: Number of leading dimensions to keep.
        normalized: Whether the result is scaled to norm 1. Zero vectors stay zero.

    Returns:
        [n, dims] of the same type. Vectors are cut to `dims` before normalisation, as in the
        training of Matryoshka models (https://arxiv.org/abs/2205.13147).
    """
    if norms is not None and not normalized:
        with np.errstate(over="ignore", invalid="ignore"):  # as in `normalize`
            return (embeddings * norms[:, None])[:, :dims]
    if norms is not None and dims == embeddings.shape[1]:
        return embeddings
    kept = embeddings[:, :dims]
    if normalized and (norms is None or dims < embeddings.shape[1]):
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(kept / _lengths(kept), np.float32)
    return kept


def _lengths(vectors: VectorArray) -> npt.NDArray[Any]:
    """L2 norms, [n, 1]; 1 for rows of zeros.

    Squares of very small and very large numbers are 0 and infinity in float32. Such rows are
    computed in float64.
    """
    lengths: npt.NDArray[Any] = np.linalg.norm(vectors, axis=1, keepdims=True)
    inexact = ~((lengths > _LEAST_LENGTH) & (lengths < np.inf))[:, 0]
    if inexact.any():
        lengths = lengths.astype(np.float64)
        exact = vectors[inexact].astype(np.float64)
        lengths[inexact] = np.linalg.norm(exact, axis=1, keepdims=True)
        lengths[lengths == 0] = 1
    return lengths
