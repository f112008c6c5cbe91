"""Rows on their way to a store, and the groups they are sent in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from fletcher.core.schema import batch_key
from fletcher.delivery.upload import Upload

# What a writer is opened for: a schema with its metadata (which pyarrow does not compare), and
# whether rows replace those of the same id.
WriterKind = tuple[pa.Schema, dict[bytes, bytes] | None, bool]


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of an upload, ready to be stored.

    Attributes:
        schema: Of the output columns, without `batch_key`.
        first: Offset of the first row in the upload.
        num_rows: How many; each may be several rows of the store, its chunks.
        num_bytes: What they take in memory.
        failed: Places of rows with a null vector, one for each that failed.
        unsent: Places of rows that the store does not get: duplicates, and failed rows of uploads
            that drop duplicates, for a repaired one must not be taken for one.
        num_dropped: How many of these are duplicates.
        load: Gives the output columns.
        released: Called once the rows are stored, or given up.
        journaled: They are on disk, as a group whose extent is fixed, and stay there if given up.
        refused: Called with the reason where the store refuses them for good.
        doubtful: The store may have them already: an earlier process may have sent them.
        arrived: When they were made ready (`time.monotonic`).
    """

    upload: Upload
    schema: pa.Schema
    first: int
    num_rows: int
    num_bytes: int
    failed: tuple[int, ...]
    load: Callable[[], pa.RecordBatch]
    released: Callable[[], None]
    journaled: bool = False
    refused: Callable[[str], None] = lambda _reason: None
    doubtful: bool = False
    unsent: tuple[int, ...] = ()
    num_dropped: int = 0
    arrived: float = field(default_factory=time.monotonic)

    @classmethod
    def from_batch(
        cls,
        upload: Upload,
        batch: pa.RecordBatch,
        first: int,
        failed: tuple[int, ...],
        released: Callable[[], None],
        duplicates: tuple[int, ...] = (),
        num_rows: int | None = None,
    ) -> Rows:
        """Rows in memory, as many as `batch` has where `num_rows` says nothing else."""
        return cls(
            upload,
            batch.schema,
            first,
            int(batch.num_rows) if num_rows is None else num_rows,
            int(batch.nbytes),
            failed,
            lambda: batch,
            released,
            unsent=duplicates,
            num_dropped=len(duplicates),
        )

    @property
    def last(self) -> int:
        """Offset of the last row."""
        return self.first + self.num_rows - 1

    def left_out(self, *, null_vectors: bool) -> list[int]:
        """Places of rows that a store does not get, which takes null vectors or not."""
        return sorted({*self.unsent, *(() if null_vectors else self.failed)})

    @property
    def kind(self) -> tuple[WriterKind, bool]:
        """What rows of one append have in common."""
        return writer_kind(self.schema, upsert=self.upload.upsert), self.journaled

    @property
    def dropped(self) -> bool:
        """Their upload failed and its client was told, and sends them again; not if journaled."""
        return self.upload.failure is not None and not self.journaled


def writer_kind(schema: pa.Schema, *, upsert: bool) -> WriterKind:
    """What a writer for such rows is opened for."""
    return schema, schema.metadata, upsert


@dataclass(slots=True)
class Group:
    """Consecutive rows of one upload that are sent together; their extent is fixed once sent.

    Attributes:
        rows: At least one.
        doubtful: An earlier send ended without an answer: the store may have them.
        alone: Goes in an append of its own: it, or another in its append, was refused.
    """

    rows: list[Rows]
    doubtful: bool = False
    alone: bool = False

    @property
    def first(self) -> int:
        """Offset of the first row."""
        return self.rows[0].first

    @property
    def last(self) -> int:
        """Offset of the last row."""
        return self.rows[-1].last

    @property
    def num_rows(self) -> int:
        """How many."""
        return self.last - self.first + 1

    @property
    def num_bytes(self) -> int:
        """What they take in memory."""
        return sum(rows.num_bytes for rows in self.rows)

    @property
    def key(self) -> str:
        """Their `batch_key`."""
        return batch_key(self.rows[0].upload.upload_id, self.first, self.last)

    @property
    def dedupe_by(self) -> str | None:
        """By what duplicates among them are known; None: they are not asked about."""
        return self.rows[0].upload.dedupe_by

    def batch(self, *, null_vectors: bool) -> pa.RecordBatch:
        """The rows with their `batch_key`, without those that the store does not get."""
        batch = pa.concat_batches(
            [_without(rows.load(), rows.left_out(null_vectors=null_vectors)) for rows in self.rows]
        )
        keys = pa.repeat(self.key, batch.num_rows)
        return batch.append_column(pa.field("batch_key", pa.utf8()), keys)


def groups_of(taken: Sequence[Rows], max_rows: int) -> list[Group]:
    """Rows by upload, in order, joined where one follows the other; journaled ones as they are."""
    groups: list[Group] = []
    open_groups: dict[int, Group] = {}
    for rows in taken:
        group = open_groups.get(id(rows.upload))
        if (
            group is None
            or rows.journaled
            or group.last + 1 != rows.first
            or rows.last - group.first >= max_rows
        ):
            group = open_groups[id(rows.upload)] = Group([], doubtful=rows.doubtful)
            groups.append(group)
        group.rows.append(rows)
    return groups


def _without(batch: pa.RecordBatch, rows: Sequence[int]) -> pa.RecordBatch:
    if not rows:
        return batch
    keep = np.ones(batch.num_rows, np.bool_)
    keep[list(rows)] = False
    return batch.filter(pa.array(keep))
