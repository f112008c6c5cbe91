"""Backend without a model, which hashes token ids into vectors.

This backend serves tests and measurements of everything around the model. A row's vector depends
only on the row's token ids and the model's hash. So a wrong vector reveals a lost, doubled or
swapped row, or a row of another model.
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
        """Return vectors by `null_embeddings`, with norms of 1."""
        started = time.perf_counter()
        if batch.spans is not None:
            batch = _cut_out(batch, batch.spans)
        embeddings = null_embeddings(batch.input_ids, batch.lengths, self.dim, self.seed)
        # Vectors after different layers must differ.
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
    """Create the null backend with vectors of width `dim`. No bundle is needed."""
    return NullBackend(config.dim or DEFAULT_DIM, int(config.version or "0", 16))


def load_inline(config: BackendConfig) -> NullBackend:
    """Do the same as `load`, for `fletcher.inference.budget.load_inline`."""
    return load(config)


def _cut_out(batch: MicroBatch, spans: Spans) -> MicroBatch:
    """Turn spans into rows. A span's vector then depends only on the span's tokens."""
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
        input_ids: Token ids of all rows, one row after the other, int32 [total_tokens].
        lengths: Number of tokens of each row, at least 1, int32 [num_rows].
        dim: Width of a vector.
        seed: Number below 2^64; another seed gives other vectors.
    """
    starts = starts_of(lengths)
    position = np.arange(len(input_ids), dtype=np.int64) - np.repeat(starts, lengths)
    tokens = _mix(input_ids.astype(_UINT64) * _UINT64(1 << 32) + position.astype(_UINT64))
    rows = np.add.reduceat(tokens, starts) if len(starts) else tokens[:0]
    rows = rows ^ _mix(np.array([seed], _UINT64))
    # A column is a linear hash of both halves of the row's hash. Overflow wraps around, so that
    # values are centered at 0.
    first, second = _mix(np.arange(2 * dim, dtype=_UINT64)).astype(np.uint32).reshape(2, dim) | 1
    low, high = rows.astype(np.uint32), (rows >> _UINT64(32)).astype(np.uint32)
    values = (low[:, None] * first + high[:, None] * second).view(np.int32).astype(np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))
    values /= np.maximum(norms, np.float32(1e-12))[:, None]
    return np.asarray(values)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finalizer of splitmix64 for arrays (https://prng.di.unimi.it/splitmix64.c)."""
    values = (values ^ (values >> _UINT64(30))) * _UINT64(_FIRST_FACTOR)
    values = (values ^ (values >> _UINT64(27))) * _UINT64(_SECOND_FACTOR)
    return values ^ (values >> _UINT64(31))
