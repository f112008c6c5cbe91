"""128-bit fingerprints of ids and texts, and a compact map of them.

BLAKE2b at 128 bits: two different values of a billion rows share one with a probability of 1e-21.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SIZE = 16
# A new entry: two bytes objects of 16 and a place in a dict, as tracemalloc counts them.
_RECENT_BYTES = 150
_MERGE_ROWS = 65_536

_Array = npt.NDArray[np.bytes_]


def fingerprints(values: pa.Array) -> list[bytes | None]:
    """A fingerprint a value; None where null. Numbers count as their decimal text."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return [
        None if text is None else blake2b(text, digest_size=SIZE).digest()
        for text in values.cast(pa.large_utf8()).cast(pa.large_binary()).to_pylist()
    ]


class FingerprintMap:
    """From fingerprints to values of a fixed size; the last one set counts. Not thread-safe.

    Most of it is two sorted arrays, 16 bytes and the value's size an entry; what is new waits in a
    dict until it is worth merging.

    Args:
        value_bytes: Size of a value.
    """

    def __init__(self, value_bytes: int) -> None:
        self._keys: _Array = np.zeros(0, f"S{SIZE}")
        self._values: _Array = np.zeros(0, f"S{value_bytes}")
        self._value_bytes = value_bytes
        self._recent: dict[bytes, bytes] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return self._keys.nbytes + self._values.nbytes + len(self._recent) * _RECENT_BYTES

    def get(self, keys: Sequence[bytes | None]) -> list[bytes | None]:
        """The value of each key; None where there is none."""
        found: list[bytes | None] = [None] * len(keys)
        present = [place for place, key in enumerate(keys) if key is not None]
        if len(self._keys) and present:
            wanted: _Array = np.frombuffer(
                b"".join(keys[place] or b"" for place in present), f"S{SIZE}"
            )
            at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            values = self._values[at].tobytes()
            for index in np.flatnonzero(self._keys[at] == wanted).tolist():
                start = index * self._value_bytes
                found[present[index]] = values[start : start + self._value_bytes]
        if self._recent:
            for place in present:
                found[place] = self._recent.get(keys[place] or b"", found[place])
        return found

    def update(self, entries: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]]) -> None:
        """Sets the values of some keys."""
        self._recent.update(entries)
        if len(self._recent) > max(_MERGE_ROWS, len(self._keys) // 8):
            self._merge()

    def _merge(self) -> None:
        recent = len(self._recent)
        keys: Any = np.frombuffer(b"".join(self._recent), f"S{SIZE}", recent)
        values: Any = np.frombuffer(
            b"".join(self._recent.values()), f"S{self._value_bytes}", recent
        )
        keys = np.concatenate((self._keys, keys))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        last = np.append(keys[1:] != keys[:-1], True)  # of equal keys the newer comes later
        self._keys = keys[last]
        self._values = np.concatenate((self._values, values))[order[last]]
        self._recent = {}
