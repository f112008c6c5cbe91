"""Backend without a model, which hashes token ids into vectors.

It serves tests, and measurements of everything around the model. A row's vector depends only on its
token ids and the model's hash. So vectors show lost, doubled or swapped rows, and rows of another
model.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import InferenceResult, Int32Array, MicroBatch, Spans
from fletcher.inference.backend import BackendConfig
from fletcher.vectors.ragged import places, starts_of

DEFAULT_DIM = 384

_UINT64 = np.uint64
_FIRST_FACTOR = 0xBF58476D1CE4E5B9
_SECOND_FACTOR = 0x94D049BB133111EB


class NullBackend:
    """Backend whose vectors, of L2 norm 1, are hashes of token ids and `seed`."""

    def __init__(self, dim: int = DEFAULT_DIM, seed: int = 0) -> None:
        self.dim = dim
        self.seed = seed
        self.concurrency, self.urgent_concurrency = 2, 1

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Vectors by `null_embeddings`, and norms of 1."""
        started = time.perf_counter()
        if batch.spans is not None:
            batch = _cut_out(batch, batch.spans)
        embeddings = null_embeddings(batch.input_ids, batch.lengths, self.dim, self.seed)
        # Other layers give other vectors.
        embeddings = np.roll(embeddings, batch.layers, axis=1) if batch.layers else embeddings
        norms = np.ones(len(embeddings), dtype=np.float32)
        return InferenceResult(embeddings, norms, time.perf_counter() - started)

    def describe(self) -> dict[str, str]:
        return {
            "backend": "null",
            "version": "1",
            "device": "cpu",
            "precision": "float32",
            "provider": "null",
        }


def load(config: BackendConfig) -> NullBackend:
    """The null backend, with vectors of width `dim`; it needs no bundle."""
    return NullBackend(config.dim or DEFAULT_DIM, int(config.version or "0", 16))


def load_inline(config: BackendConfig) -> NullBackend:
    """As `load`, for the front process; see `fletcher.inference.budget.load_inline`."""
    return load(config)


def _cut_out(batch: MicroBatch, spans: Spans) -> MicroBatch:
    """Turn spans into rows, whose vectors depend only on their own tokens."""
    rows = np.repeat(starts_of(batch.lengths), spans.counts)
    firsts, lasts = spans.bounds.T
    return MicroBatch(
        batch.input_ids[places(rows + firsts, lasts - firsts)], lasts - firsts, batch.layers
    )


def null_embeddings(
    input_ids: Int32Array, lengths: Int32Array, dim: int, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Vectors of the null backend, float32 [num_rows, dim], of L2 norm 1.

    Args:
        input_ids: int32 [total_tokens], rows one after the other.
        lengths: int32 [num_rows], each at least 1.
        dim: Width of a vector.
        seed: Changes all vectors; below 2^64.
    """
    starts = starts_of(lengths)
    position = np.arange(len(input_ids), dtype=np.int64) - np.repeat(starts, lengths)
    tokens = _mix(input_ids.astype(_UINT64) * _UINT64(1 << 32) + position.astype(_UINT64))
    rows = np.add.reduceat(tokens, starts) if len(starts) else tokens[:0]
    rows = rows ^ _mix(np.array([seed], _UINT64))
    # A column is a linear hash of both halves of a row's; wrapping centers it at 0.
    first, second = _mix(np.arange(2 * dim, dtype=_UINT64)).astype(np.uint32).reshape(2, dim) | 1
    low, high = rows.astype(np.uint32), (rows >> _UINT64(32)).astype(np.uint32)
    values = (low[:, None] * first + high[:, None] * second).view(np.int32).astype(np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))
    values /= np.maximum(norms, np.float32(1e-12))[:, None]
    return np.asarray(values)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finalizer of splitmix64 (https://prng.di.unimi.it/splitmix64.c), on arrays."""
    values = (values ^ (values >> _UINT64(30))) * _UINT64(_FIRST_FACTOR)
    values = (values ^ (values >> _UINT64(27))) * _UINT64(_SECOND_FACTOR)
    return values ^ (values >> _UINT64(31))
