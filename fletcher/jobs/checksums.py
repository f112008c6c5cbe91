"""Checksums of stored rows, by upload: ids with texts, and ids with vectors.

A checksum is the sum of the rows' hashes, so that it does not depend on the order of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import types

from fletcher.core.owner import plain_id
from fletcher.core.schema import parse_batch_key

COLUMNS = ("id", "text", "vector", "batch_key")
_MODULUS = 1 << 128


@dataclass(slots=True)
class Checksums:
    """Checksums of an upload's rows.

    Attributes:
        num_rows: Number of rows.
        texts: Sum of the hashes of ids and texts, modulo 2^128.
        vectors: Sum of the hashes of ids and vectors, modulo 2^128.
    """

    num_rows: int = 0
    texts: int = 0
    vectors: int = 0

    def to_text(self) -> str:
        """The checksums as in a manifest: two numbers of 32 hexadecimal digits."""
        return f"{self.texts:032x}-{self.vectors:032x}"


def sum_uploads(batches: Iterable[pa.RecordBatch]) -> dict[str, Checksums]:
    """Checksums of rows by the id of their upload.

    Args:
        batches: Rows with those of COLUMNS that the dataset has. `batch_key` is one of them.
    """
    found: dict[str, Checksums] = {}
    for batch in batches:
        names = batch.schema.names
        ids = batch.column("id").to_pylist() if "id" in names else [None] * batch.num_rows
        texts = batch.column("text").to_pylist() if "text" in names else [None] * batch.num_rows
        vectors = _row_bytes(batch.column("vector"))
        keys = batch.column("batch_key").to_pylist()
        for key, name, text, vector in zip(keys, ids, texts, vectors, strict=True):
            parsed = parse_batch_key(key) if key is not None else None
            sums = found.setdefault(plain_id(parsed[0]) if parsed else "", Checksums())
            head = repr(name).encode()
            sums.num_rows += 1
            sums.texts = (sums.texts + _hash(head, repr(text).encode())) % _MODULUS
            sums.vectors = (sums.vectors + _hash(head, vector)) % _MODULUS
    return found


def differences(
    known: Mapping[str, tuple[int, str]], found: Mapping[str, Checksums]
) -> Iterator[tuple[str, str]]:
    """Uploads whose rows differ from those that were stored, and how they differ.

    Args:
        known: Number of rows and checksums by upload id; empty checksums: they are not known.
        found: Checksums by upload id.
    """
    for upload_id, (num_rows, text) in known.items():
        now = found.get(upload_id, Checksums())
        if now.num_rows != num_rows:
            what = "are missing" if now.num_rows < num_rows else "are there too often"
            yield upload_id, f"{abs(num_rows - now.num_rows):,} of {num_rows:,} rows {what}"
        elif text:
            texts, vectors = text.split("-")
            if int(texts, 16) != now.texts:
                yield upload_id, "an id or a text has changed"
            if int(vectors, 16) != now.vectors:
                yield upload_id, "a vector has changed"


def _hash(head: bytes, data: bytes | memoryview) -> int:
    digest = hashlib.blake2b(head, digest_size=16)
    digest.update(b"\0")
    digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def _row_bytes(column: pa.Array) -> Iterator[bytes | memoryview]:
    """The bytes of each row's vector, which do not depend on the rows around it."""
    if types.is_fixed_size_list(column.type) and not column.null_count:
        flat = column.flatten().to_numpy(zero_copy_only=False)
        rows = memoryview(flat.tobytes())
        width = len(rows) // max(len(column), 1)
        return (rows[at * width : (at + 1) * width] for at in range(len(column)))
    return (repr(value).encode() for value in column.to_pylist())
