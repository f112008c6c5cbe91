"""Vectors of texts that were embedded before, found by what they were made of.

The cache stands before tokenization and holds what the network gave: the vector in float32, its
norm, the token count and whether tokens were cut off. Dims, normalisation and element type come
later, so that all requests share it. A key is a BLAKE2b of 128 bits over the model, the engine and
the text with all that is done to it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from fletcher.core.batches import EmbeddingBatch, TextBatch
from fletcher.errors import FletcherError
from fletcher.telemetry.tracing import Telemetry

_KEY_BYTES = 16
# What an entry takes beside its value: two bytes objects, a key, a place in an OrderedDict, as
# tracemalloc counts them.
_ENTRY_BYTES = 190


class CacheBackend(Protocol):
    """Keeps values of one size by key, the least recently used go first. Thread-safe."""

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        ...

    def load_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key; None where there is none."""
        ...

    def store_values(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Keeps values, as long as there is room."""
        ...

    def close(self) -> None:
        """Lets everything go. Idempotent."""
        ...


class MemoryCache:
    """See `CacheBackend`.

    Args:
        max_bytes: Values, keys and what Python needs for them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[bytes, bytes] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """See `CacheBackend`."""
        return self._num_bytes

    def load_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `CacheBackend`."""
        with self._lock:
            found = [self._values.get(key) for key in keys]
            for key, value in zip(keys, found, strict=True):
                if value is not None:
                    self._values.move_to_end(key)
            return found

    def store_values(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """See `CacheBackend`."""
        with self._lock:
            for key, value in zip(keys, values, strict=True):
                if key not in self._values:
                    self._num_bytes += len(value) + _ENTRY_BYTES
                self._values[key] = value
                self._values.move_to_end(key)
            while self._num_bytes > self._max_bytes:
                _, value = self._values.popitem(last=False)
                self._num_bytes -= len(value) + _ENTRY_BYTES

    def close(self) -> None:
        """See `CacheBackend`."""
        with self._lock:
            self._values.clear()
            self._num_bytes = 0


class EmbeddingCache:
    """Finds vectors on a shelf, and puts new ones there. Thread-safe.

    Args:
        scope: What the vectors depend on beside the texts: the model and how it is run.
        dim: Width of a vector.
        shelf: Where they are kept.
        telemetry: Where hits and misses are counted.
    """

    def __init__(
        self, scope: Sequence[str], dim: int, backend: CacheBackend, telemetry: Telemetry
    ) -> None:
        self._scope = list(scope)
        self._backend = backend
        self._telemetry = telemetry
        self._record = np.dtype(
            [
                ("embedding", "<f4", (dim,)),
                ("norm", "<f4"),  # NaN where the network does not normalise
                ("token_count", "<i4"),
                ("truncated", "?"),
            ]
        )
        telemetry.cache_memory.observe(lambda: backend.num_bytes)

    def recall(self, texts: TextBatch) -> Recall:
        """What is known of some texts."""
        keys = self._keys(texts)
        values = self._backend.load_values(keys)
        known = np.array([value is not None for value in values], np.bool_)
        num_known = int(known.sum())
        self._telemetry.cache_hits.add(num_known)
        self._telemetry.cache_misses.add(len(keys) - num_known)
        records = np.zeros(len(keys), self._record)
        records[known] = np.frombuffer(b"".join(filter(None, values)), self._record)
        return Recall(self, texts, keys, known, records)

    def remember(self, keys: Sequence[bytes], records: Any) -> None:
        """Keeps new vectors."""
        raw, size = records.tobytes(), self._record.itemsize
        self._backend.store_values(keys, [raw[n * size : (n + 1) * size] for n in range(len(keys))])

    def _keys(self, texts: TextBatch) -> list[bytes]:
        treatment = [*self._scope, texts.prompt, texts.truncate, texts.max_length, texts.layers]
        common = blake2b(json.dumps(treatment).encode() + b"\0", digest_size=_KEY_BYTES)
        view = memoryview(texts.data)
        offsets = texts.offsets.tolist()
        keys = []
        for first, last in pairwise(offsets):
            key = common.copy()
            key.update(view[first:last])
            keys.append(key.digest())
        return keys


@dataclass(frozen=True, slots=True)
class Recall:
    """What was known of a TextBatch when it came.

    Attributes:
        known: bool [num_texts].
        records: [num_texts] vectors and what goes with them, zeros where not known.
    """

    cache: EmbeddingCache
    texts: TextBatch
    keys: list[bytes]
    known: Any
    records: Any

    @property
    def missing(self) -> TextBatch:
        """The texts that have to be embedded."""
        if not self.known.any():
            return self.texts
        view, offsets = memoryview(self.texts.data), self.texts.offsets
        places = np.flatnonzero(~self.known).tolist()
        parts = [view[offsets[place] : offsets[place + 1]] for place in places]
        ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        return replace(self.texts, data=b"".join(parts), offsets=ends)

    def complete(self, result: EmbeddingBatch | FletcherError) -> EmbeddingBatch | FletcherError:
        """The vectors of all texts, from those of `missing`, which are remembered."""
        places = np.flatnonzero(~self.known)
        if isinstance(result, FletcherError):
            if len(places) == len(self.keys):
                return result
            errors: dict[int, FletcherError] = dict.fromkeys(places.tolist(), result)
        else:
            errors = {int(places[index]): error for index, error in result.errors.items()}
            records = self.records
            records["embedding"][places] = result.embeddings
            records["norm"][places] = np.nan if result.norms is None else result.norms
            records["token_count"][places] = result.token_count
            records["truncated"][places] = result.truncated
            good = [place for place in places.tolist() if place not in errors]
            self.cache.remember([self.keys[place] for place in good], records[good])
        norms = self.records["norm"]
        return EmbeddingBatch(
            embeddings=np.ascontiguousarray(self.records["embedding"]),
            norms=None if np.isnan(norms).any() else np.ascontiguousarray(norms),
            token_count=np.ascontiguousarray(self.records["token_count"]),
            truncated=np.ascontiguousarray(self.records["truncated"]),
            errors=errors,
        )
