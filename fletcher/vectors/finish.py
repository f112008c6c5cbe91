"""Conversion of a graph's vectors to the width and norm that were asked for."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from fletcher.core.batches import FloatArray, VectorArray

_Vectors = TypeVar("_Vectors", FloatArray, VectorArray)


def finish(
    embeddings: _Vectors, norms: FloatArray | None, *, dims: int, normalized: bool
) -> _Vectors:
    """Applies `dims` and `normalize` to a graph's output.

    Args:
        embeddings: float32 [n, dim], or float16 if nothing is to be changed; L2-normalised if
            `norms` is given.
        norms: float32 [n], L2 norms before normalisation; None: the vectors are as pooled.
        dims: Leading dimensions to keep.
        normalized: Whether the result has norm 1 (a zero vector stays zero).

    Returns:
        [n, dims] of the same type, sliced before normalisation, as Matryoshka models are trained
        (https://arxiv.org/abs/2205.13147).
    """
    if norms is not None and not normalized:
        return (embeddings * norms[:, None])[:, :dims]
    if norms is not None and dims == embeddings.shape[1]:
        return embeddings
    kept = embeddings[:, :dims]
    if normalized and (norms is None or dims < embeddings.shape[1]):
        lengths = np.linalg.norm(kept, axis=1, keepdims=True)
        return np.asarray(kept / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)
    return kept
