"""Embedding cache: vectors of texts that were embedded before.

Texts are looked up in the cache before tokenization. An entry holds the model's output: the float32
vector, its norm, the token count and whether tokens were cut off. Dimensions, normalisation and
element type are applied later, so requests that differ only in these share entries. A key is a
128-bit BLAKE2b hash of the model, the engine, the text, and the options that change its vector,
such as the prompt.
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
# Memory of an entry beside its value, measured with tracemalloc: two bytes objects, a key and a
# dictionary entry.
_ENTRY_BYTES = 190


class CacheBackend(Protocol):
    """Storage of values by key, which evicts the least recently used. Thread-safe."""

    @property
    def num_bytes(self) -> int:
        """Size of all stored values, in bytes."""

    def load_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Returns the value of each key; None for keys that have no value."""

    def store_values(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Stores values, and evicts other values if there is no room."""

    def close(self) -> None:
        """Frees all memory and closes all files. Idempotent."""


class MemoryCache:
    """Cache backend in memory; `max_bytes` limits values, keys and Python's overhead.

    See `CacheBackend`.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[bytes, bytes] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def load_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._lock:
            found = [self._values.get(key) for key in keys]
            for key, value in zip(keys, found, strict=True):
                if value is not None:
                    self._values.move_to_end(key)
            return found

    def store_values(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
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
        with self._lock:
            self._values.clear()
            self._num_bytes = 0


class EmbeddingCache:
    """Vectors of texts that were embedded before. Thread-safe.

    Args:
        scope: Facts that the vectors depend on beside the texts and their options: the model, and
            how it is run.
        dim: Width of the vectors.
    """

    def __init__(
        self, scope: Sequence[str], dim: int, backend: CacheBackend, telemetry: Telemetry
    ) -> None:
        self._scope = list(scope)
        self._backend = backend
        self._telemetry = telemetry
        # The norm is NaN if the network does not normalise its vectors.
        numbers = [("norm", "<f4"), ("token_count", "<i4"), ("truncated", "?")]
        self._record = np.dtype([("embedding", "<f4", (dim,)), *numbers])
        telemetry.cache_memory.observe(lambda: backend.num_bytes)

    def look_up(self, texts: TextBatch) -> CacheLookup:
        keys = self._keys(texts)
        values = self._backend.load_values(keys)
        cached = np.array([value is not None for value in values], np.bool_)
        num_cached = int(cached.sum())
        self._telemetry.cache_hits.add(num_cached)
        self._telemetry.cache_misses.add(len(keys) - num_cached)
        records = np.zeros(len(keys), self._record)
        records[cached] = np.frombuffer(b"".join(filter(None, values)), self._record)
        return CacheLookup(self, texts, keys, cached, records)

    def store_vectors(self, keys: Sequence[bytes], records: Any) -> None:
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
class CacheLookup:
    """Result of looking up the texts of a TextBatch in the cache.

    Attributes:
        cached: bool [num_texts], whether a text's vector is cached.
        records: [num_texts] cached entries; zeros for texts that are not cached.
    """

    cache: EmbeddingCache
    texts: TextBatch
    keys: list[bytes]
    cached: Any
    records: Any

    @property
    def missing(self) -> TextBatch:
        if not self.cached.any():
            return self.texts
        view, offsets = memoryview(self.texts.data), self.texts.offsets
        places = np.flatnonzero(~self.cached).tolist()
        parts = [view[offsets[place] : offsets[place + 1]] for place in places]
        ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        return replace(self.texts, data=b"".join(parts), offsets=ends)

    def complete(self, result: EmbeddingBatch | FletcherError) -> EmbeddingBatch | FletcherError:
        """Returns the vectors of all texts, given the result of the `missing` ones.

        Stores the vectors of the missing texts in the cache.
        """
        places = np.flatnonzero(~self.cached)
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
            # A failed text says nothing about whether the network normalises its vectors.
            records["norm"][list(errors)] = 0
            good = [place for place in places.tolist() if place not in errors]
            self.cache.store_vectors([self.keys[place] for place in good], records[good])
        norms = self.records["norm"]
        # The norm of a failed row says nothing about the model.
        norms[list(errors)] = 0 if len(errors) < len(norms) else np.nan
        return EmbeddingBatch(
            embeddings=np.ascontiguousarray(self.records["embedding"]),
            norms=None if np.isnan(norms).any() else np.ascontiguousarray(norms),
            token_count=np.ascontiguousarray(self.records["token_count"]),
            truncated=np.ascontiguousarray(self.records["truncated"]),
            errors=errors,
        )
