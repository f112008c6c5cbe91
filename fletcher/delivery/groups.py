"""Rows on their way to a store, and the groups in which they are sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from fletcher.core.schema import batch_key
from fletcher.delivery.breaker import Breaker
from fletcher.delivery.upload import Upload
from fletcher.stores.base import Store
from fletcher.telemetry.tracing import Telemetry

# Kind of a writer: a schema, its metadata (which pyarrow does not compare), and whether
# rows replace those of the same id.
WriterKind = tuple[pa.Schema, dict[bytes, bytes] | None, bool]


@dataclass(frozen=True, slots=True)
class Destination:
    """A dataset of a store, as the target of rows."""

    store: Store
    dataset: str
    breaker: Breaker
    telemetry: Telemetry


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of an upload, ready to be stored.

    Attributes:
        schema: Schema of the output columns, without `batch_key`.
        first: Offset of the first row in the upload.
        num_rows: Number of uploaded rows; a chunked row becomes several rows of the store.
        num_bytes: Size in memory.
        failed: Places of rows with a null vector, one for each that failed.
        load_batch: Returns the output columns.
        on_released: Called once the rows are stored or given up.
        journaled: The rows are on disk, as a group of fixed extent, and stay there if given up.
        on_refused: Called with the reason if the store refuses the rows for good.
        in_doubt: The store may hold the rows already: an earlier process may have sent them.
        excluded: Places of rows that are not stored: duplicates, and failed rows of an upload with
            `dedupe`, because a repaired row must not count as a duplicate of a failed one.
        num_duplicates: Number of duplicates among `excluded`.
        arrived: Time of creation (`time.monotonic`).
    """

    upload: Upload
    schema: pa.Schema
    first: int
    num_rows: int
    num_bytes: int
    failed: tuple[int, ...]
    load_batch: Callable[[], pa.RecordBatch]
    on_released: Callable[[], None]
    journaled: bool = False
    on_refused: Callable[[str], None] = lambda _reason: None
    in_doubt: bool = False
    excluded: tuple[int, ...] = ()
    num_duplicates: int = 0
    arrived: float = field(default_factory=time.monotonic)

    @classmethod
    def from_batch(
        cls,
        upload: Upload,
        batch: pa.RecordBatch,
        first: int,
        failed: tuple[int, ...],
        on_released: Callable[[], None],
        duplicates: tuple[int, ...] = (),
        num_rows: int | None = None,
    ) -> Rows:
        """Rows in memory; arguments as the attributes.

        Args:
            batch: Output columns.
            duplicates: Places of rows that the prefilter found to be duplicates.
            num_rows: Number of uploaded rows; default: those of `batch`.
        """
        return cls(
            upload,
            batch.schema,
            first,
            int(batch.num_rows) if num_rows is None else num_rows,
            int(batch.nbytes),
            failed,
            lambda: batch,
            on_released,
            excluded=duplicates,
            num_duplicates=len(duplicates),
        )

    @property
    def last(self) -> int:
        return self.first + self.num_rows - 1

    def places_not_stored(self, *, null_vectors: bool) -> list[int]:
        """Places of rows that a store with or without null vectors does not get."""
        return sorted({*self.excluded, *(() if null_vectors else self.failed)})

    @property
    def kind(self) -> tuple[WriterKind, bool]:
        """Properties that all rows of one append have in common."""
        return writer_kind(self.schema, upsert=self.upload.upsert), self.journaled

    @property
    def abandoned(self) -> bool:
        """Whether a client sends these rows again; never true of journaled rows."""
        return self.upload.failure is not None and not self.journaled


def writer_kind(schema: pa.Schema, *, upsert: bool) -> WriterKind:
    return schema, schema.metadata, upsert


@dataclass(slots=True)
class Group:
    """Consecutive rows of one upload that are sent together; fixed once sent.

    Attributes:
        rows: At least one entry.
        in_doubt: An earlier send ended without an answer, so the store may hold the group.
        alone: The group is sent by itself: it, or another group of its append, was refused.
        decided: Its duplicates are marked, and stay so until the group is settled.
    """

    rows: list[Rows]
    in_doubt: bool = False
    alone: bool = False
    decided: bool = False

    @property
    def first(self) -> int:
        return self.rows[0].first

    @property
    def last(self) -> int:
        return self.rows[-1].last

    @property
    def num_rows(self) -> int:
        return self.last - self.first + 1

    @property
    def num_bytes(self) -> int:
        return sum(rows.num_bytes for rows in self.rows)

    @property
    def batch_key(self) -> str:
        return batch_key(self.rows[0].upload.upload_id, self.first, self.last)

    @property
    def dedupe_by(self) -> str | None:
        return self.rows[0].upload.dedupe_by

    def is_recognized(self, num_stored: int, *, counts_groups: bool) -> bool:
        """Whether the store, given `num_stored` rows, can tell later that it holds them."""
        if self.rows[0].upload.upsert:  # later rows may replace them all, and the key goes, too
            return False
        return num_stored > 0 and not (counts_groups and num_stored < self.num_rows)

    def to_batch(self, *, null_vectors: bool) -> pa.RecordBatch:
        """The rows to be stored, with their `batch_key`."""
        batch = pa.concat_batches(
            [
                _without(rows.load_batch(), rows.places_not_stored(null_vectors=null_vectors))
                for rows in self.rows
            ]
        )
        keys = pa.repeat(self.batch_key, batch.num_rows)
        return batch.append_column(pa.field("batch_key", pa.utf8()), keys)


def form_groups(waiting: Sequence[Rows], max_rows: int) -> list[Group]:
    """Join consecutive rows of an upload; journaled rows are groups already."""
    groups: list[Group] = []
    open_groups: dict[int, Group] = {}
    for rows in waiting:
        group = open_groups.get(id(rows.upload))
        if (
            group is None
            or rows.journaled
            or group.last + 1 != rows.first
            or rows.last - group.first >= max_rows
        ):
            group = open_groups[id(rows.upload)] = Group([], in_doubt=rows.in_doubt)
            groups.append(group)
        group.rows.append(rows)
    return groups


def _without(batch: pa.RecordBatch, places: Sequence[int]) -> pa.RecordBatch:
    if not places:
        return batch
    keep = np.ones(batch.num_rows, np.bool_)
    keep[list(places)] = False
    return batch.filter(pa.array(keep))
