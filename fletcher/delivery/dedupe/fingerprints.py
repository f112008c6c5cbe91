"""128-bit fingerprints of ids and texts, row keys, and a compact map of them.

BLAKE2b at 128 bits: two different values of a billion rows share one with a probability of 1e-21.
No library is used: those for compact maps keep Python objects, or take integers of 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.delivery.groups import Rows

# By kind of key, the columns of its key and its value.
COLUMNS = {"id": ("id",), "text": ("text",), "delta": ("id", "text")}

_SIZE = 16
_ANY = b"\1"  # the value of a kind whose rows are equal by key alone
# A new entry: two bytes objects of 16 and a place in a dict, as tracemalloc counts them.
_RECENT_BYTES = 150
_MERGE_ROWS = 65_536

_Array = npt.NDArray[np.bytes_]
# A row's key, None if it has none, and the value that makes another row of that key its duplicate.
RowKey = tuple[bytes | None, bytes | None]


def fingerprints(values: pa.Array) -> list[bytes | None]:
    """One fingerprint a value; None for null. Numbers count as their decimal text."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return [
        None if text is None else blake2b(text, digest_size=_SIZE).digest()
        for text in values.cast(pa.large_utf8()).cast(pa.large_binary()).to_pylist()
    ]


def value_bytes(kind: str) -> int:
    return _SIZE if kind == "delta" else len(_ANY)


def row_keys(kind: str, rows: pa.RecordBatch) -> list[RowKey]:
    """Each row's key and value."""
    if kind == "text":
        return [(key, _ANY) for key in fingerprints(rows.column("text"))]
    ids = fingerprints(rows.column("id"))
    if kind == "id":
        return [(key, _ANY) for key in ids]
    return list(zip(ids, fingerprints(rows.column("text")), strict=True))


def stored_keys(kind: str, rows: pa.RecordBatch, excluded: Sequence[int]) -> dict[bytes, bytes]:
    """Keys and values of stored or journaled rows, without the `excluded` places.

    The column `text` is missing if the upload had no texts. An id without a text gets a value that
    no text has.
    """
    if not set(COLUMNS[kind]) <= set(rows.schema.names):
        if "id" not in COLUMNS[kind]:
            return {}
        texts = pa.nulls(rows.num_rows, pa.utf8())
        rows = pa.record_batch({"id": rows.column("id"), "text": texts})
    left_out = set(excluded)
    return {
        key: value or bytes(_SIZE)
        for place, (key, value) in enumerate(row_keys(kind, rows))
        if key is not None and place not in left_out
    }


def keys_to_send(kind: str, group: Sequence[Rows]) -> set[bytes]:
    """Keys of a group's rows that are to be stored."""
    return {key for rows in group for key in stored_keys(kind, rows.load_batch(), rows.excluded)}


class FingerprintMap:
    """A map from fingerprints to values of a fixed size. Not thread-safe.

    Most of it is two sorted arrays, which take 16 bytes and the value's size an entry; new entries
    wait in a dict until they are worth merging.
    """

    def __init__(self, value_bytes: int) -> None:
        self._keys: _Array = np.zeros(0, f"S{_SIZE}")
        self._values: _Array = np.zeros(0, f"S{value_bytes}")
        self._value_bytes = value_bytes
        self._recent: dict[bytes, bytes] = {}

    @property
    def num_bytes(self) -> int:
        """Approximate size in memory."""
        return self._keys.nbytes + self._values.nbytes + len(self._recent) * _RECENT_BYTES

    def find_values(self, keys: Sequence[bytes | None]) -> list[bytes | None]:
        """The value of each key; None if it has none."""
        found: list[bytes | None] = [None] * len(keys)
        present = [place for place, key in enumerate(keys) if key is not None]
        if len(self._keys) and present:
            wanted: _Array = np.frombuffer(
                b"".join(keys[place] or b"" for place in present), f"S{_SIZE}"
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

    def add_entries(self, entries: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]]) -> None:
        """Set the values of some keys; later values replace earlier ones."""
        self._recent.update(entries)
        if len(self._recent) > max(_MERGE_ROWS, len(self._keys) // 8):
            self._merge()

    def _merge(self) -> None:
        recent = len(self._recent)
        keys: Any = np.frombuffer(b"".join(self._recent), f"S{_SIZE}", recent)
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
