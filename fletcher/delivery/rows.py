"""Rows on their way to a store, and the groups they are sent in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fletcher.delivery.upload import Upload
from fletcher.schema import batch_key

# What a writer is opened for: a schema with its metadata (which pyarrow does not compare), and
# whether rows replace those of the same id.
WriterKind = tuple[pa.Schema, dict[bytes, bytes] | None, bool]


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of an upload, ready to be stored.

    Attributes:
        schema: Of the output columns, without `batch_key`.
        first: Offset of the first row in the upload.
        num_rows: How many.
        num_bytes: What they take in memory.
        failed: Places of rows with a null vector.
        unsent: Places of rows that the store does not get: duplicates, and failed rows of uploads
            that drop duplicates, for a repaired one must not be taken for one.
        load: Gives the output columns.
        released: Called once the rows are stored, or given up.
        journaled: They are on disk, as a group whose extent is fixed, and stay there if given up.
        refused: Called with the reason where the store refuses them for good.
        doubtful: The store may have them already: an earlier send ended without an answer.
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

    @classmethod
    def of(
        cls,
        upload: Upload,
        batch: pa.RecordBatch,
        first: int,
        failed: tuple[int, ...],
        released: Callable[[], None],
        unsent: tuple[int, ...] = (),
    ) -> Rows:
        """Rows in memory."""
        return cls(
            upload,
            batch.schema,
            first,
            int(batch.num_rows),
            int(batch.nbytes),
            failed,
            lambda: batch,
            released,
            unsent=unsent,
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


def groups_of(taken: Sequence[Rows], max_rows: int) -> list[list[Rows]]:
    """Rows by upload, in order, joined where one follows the other; journaled ones as they are."""
    groups: list[list[Rows]] = []
    open_groups: dict[int, list[Rows]] = {}
    for rows in taken:
        group = open_groups.get(id(rows.upload))
        if (
            group is None
            or rows.journaled
            or group[-1].last + 1 != rows.first
            or rows.last - group[0].first >= max_rows
        ):
            group = open_groups[id(rows.upload)] = []
            groups.append(group)
        group.append(rows)
    return groups


def key_of(group: Sequence[Rows]) -> str:
    """A group's `batch_key`."""
    return batch_key(group[0].upload.upload_id, group[0].first, group[-1].last)


def keyed_batch(group: Sequence[Rows], *, null_vectors: bool) -> pa.RecordBatch:
    """A group's rows with their `batch_key`, without those that the store does not get."""
    batch = pa.concat_batches(
        [_without(rows.load(), rows.left_out(null_vectors=null_vectors)) for rows in group]
    )
    keys = pa.repeat(key_of(group), batch.num_rows)
    return batch.append_column(pa.field("batch_key", pa.utf8()), keys)


def _without(batch: pa.RecordBatch, rows: Sequence[int]) -> pa.RecordBatch:
    if not rows:
        return batch
    keep = np.ones(batch.num_rows, np.bool_)
    keep[list(rows)] = False
    return batch.filter(pa.array(keep))
