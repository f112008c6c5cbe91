"""128-bit fingerprints of ids and texts, row keys, and a compact map for them.

Fingerprints are BLAKE2b hashes of 128 bits. In a billion rows, the probability that two different
values have the same fingerprint is 1e-21. No library is used: libraries for compact maps keep
Python objects, or take only integers of 64 bits.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.delivery.groups import Rows

_DELTA = "delta"
# Output columns that are no carried columns.
_OUTPUT = {"id", "text", "vector", "scale", "timestamp", "token_count", "truncated", "batch_key"}

_SIZE = 16
_ANY = b"\1"  # value for the kinds `id` and `text`, which compare only keys
# Memory of a new entry: two bytes objects of 16 bytes and a place in a dict, by tracemalloc.
_RECENT_BYTES = 150
_MERGE_ROWS = 65_536

_Array = npt.NDArray[np.bytes_]
# A row's key and value. The key is None if the row has none. Rows with the same key and the same
# value are duplicates.
RowKey = tuple[bytes | None, bytes | None]


def fingerprints(values: pa.Array) -> list[bytes | None]:
    """One fingerprint for each value; None for null.

    A number has the fingerprint of its decimal text.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return [
        None if text is None else blake2b(text, digest_size=_SIZE).digest()
        for text in values.cast(pa.large_utf8()).cast(pa.large_binary()).to_pylist()
    ]


def delta_kind(schema: pa.Schema) -> str:
    """The kind of key of a delta upload: it names the carried columns to compare."""
    names = sorted(set(schema.names) - _OUTPUT)
    return f"{_DELTA}:{json.dumps(names)}" if names else _DELTA


def is_delta(kind: str) -> bool:
    return kind.startswith(_DELTA)


def needed_columns(kind: str) -> tuple[str, ...]:
    """Columns that a dataset must have: the key's, then the value's if any."""
    return ("id", "text") if is_delta(kind) else (kind,)


def compared_columns(kind: str) -> list[str]:
    """Carried columns that are compared. A missing column counts as nulls."""
    _, _, names = kind.partition(":")
    return json.loads(names) if names else []


def value_bytes(kind: str) -> int:
    """Size of a value: fingerprints of the text and of carried columns, if any."""
    return _SIZE * (1 + bool(compared_columns(kind))) if is_delta(kind) else len(_ANY)


def has_same_text(value: bytes | None, indexed: bytes | None) -> bool:
    """Whether two values of a delta upload stand for the same text."""
    return value is not None and indexed is not None and value[:_SIZE] == indexed[:_SIZE]


def row_keys(kind: str, rows: pa.RecordBatch) -> list[RowKey]:
    """Keys and values of rows, as received or as stored."""
    keys = fingerprints(rows.column(needed_columns(kind)[0]))
    if not is_delta(kind):
        return [(key, _ANY) for key in keys]
    values = fingerprints(rows.column("text"))
    names = compared_columns(kind)
    if names:
        carried = [blake2b(digest_size=_SIZE) for _ in values]
        for name in names:
            for hashed, text in zip(carried, _value_texts(rows, name), strict=True):
                hashed.update(b"%d:" % len(text) + text)
        values = [
            None if value is None else value + hashed.digest()
            for value, hashed in zip(values, carried, strict=True)
        ]
    return list(zip(keys, values, strict=True))


def _value_texts(rows: pa.RecordBatch, name: str) -> list[bytes]:
    """A carried column's values as bytes; equal values have equal bytes."""
    place = next((one for one in (f"carried:{name}", name) if one in rows.schema.names), None)
    if place is None:
        return [repr(None).encode()] * rows.num_rows
    values = rows.column(place)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_temporal(values.type):
        values = values.view(pa.int64() if values.type.bit_width == 64 else pa.int32())
    try:
        return [repr(value).encode("utf-8", "surrogatepass") for value in values.to_pylist()]
    except ValueError:  # nanoseconds within lists or structs; such rows count as changed
        return [secrets.token_bytes(_SIZE) for _ in range(rows.num_rows)]


def stored_keys(kind: str, rows: pa.RecordBatch, excluded: Sequence[int]) -> dict[bytes, bytes]:
    """Keys and values of stored or journaled rows.

    `excluded` holds the positions of rows to leave out. The column `text` is missing if the upload
    had no texts. The value of an id without a text is all zeros, which no text's value is.
    """
    needed = needed_columns(kind)
    if not set(needed) <= set(rows.schema.names):
        if "id" not in needed:
            return {}
        texts = pa.nulls(rows.num_rows, pa.utf8())
        rows = pa.record_batch({"id": rows.column("id"), "text": texts})
    left_out = set(excluded)
    return {
        key: value or bytes(value_bytes(kind))
        for place, (key, value) in enumerate(row_keys(kind, rows))
        if key is not None and place not in left_out
    }


def keys_to_send(kind: str, group: Sequence[Rows]) -> set[bytes]:
    """Keys of the rows in a group that will be stored."""
    return {key for rows in group for key in stored_keys(kind, rows.load_batch(), rows.excluded)}


class FingerprintMap:
    """A map from fingerprints to values of a fixed size. Not thread-safe.

    Most entries are in two arrays sorted by fingerprint, where an entry takes 16 bytes plus the
    size of its value. New entries stay in a dict until there are enough to merge into the arrays.
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
        """The value of each key; None for a key that is not in the map."""
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
        """Add keys with their values; a later value of a key replaces an earlier one."""
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
        last = np.append(keys[1:] != keys[:-1], True)  # among equal keys, the newest is last
        self._keys = keys[last]
        self._values = np.concatenate((self._values, values))[order[last]]
        self._recent = {}
