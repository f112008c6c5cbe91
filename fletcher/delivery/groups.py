"""Pending rows, and the groups in which they are sent to a store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from fletcher.core.schema import batch_key, row_keys
from fletcher.delivery.breaker import Breaker
from fletcher.delivery.upload import Upload
from fletcher.stores.base import Store, Unconfirmed
from fletcher.telemetry.tracing import Telemetry

# Kind of a writer: the schema, the schema's metadata (which pyarrow does not compare), and whether
# its rows replace stored rows with the same id.
WriterKind = tuple[pa.Schema, dict[bytes, bytes] | None, bool]


@dataclass(frozen=True, slots=True)
class Destination:
    """The dataset to which rows are sent, with its store and the store's breaker."""

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
        num_rows: Number of uploaded rows. The store may get more, because a chunked row becomes
            several stored rows.
        failed: Positions of rows with a null vector. Each failed row has one such row.
        load_batch: Callback that returns the output columns.
        on_released: Called once the rows are stored or given up.
        journaled: The rows are on disk as a group of fixed extent. They stay on disk if they are
            given up.
        on_refused: Called with the reason if the store refuses the rows for good.
        in_doubt: The store may hold the rows already, because an earlier process may have sent
            them.
        revived: As `JournaledGroup.revived`. Such rows are sent in an append by themselves.
        excluded: Positions of rows that are not stored: duplicates, and failed rows of an upload
            with `dedupe`. A failed row is not stored, so that its repaired version does not count
            as a duplicate.
        num_duplicates: Number of duplicates among `excluded`.
        arrived: Time at which this object was created (`time.monotonic`).
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
    revived: bool = False
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
        """Rows in memory. `duplicates`: positions of duplicates that the prefilter found."""
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
        """Positions of rows not to send. `null_vectors`: the store takes null vectors.

        Failed rows of an upsert are not sent. They would replace stored rows that have a vector,
        and rows without an id would replace each other.
        """
        sends_failed = null_vectors and not self.upload.upsert
        return sorted({*self.excluded, *(() if sends_failed else self.failed)})

    @property
    def kind(self) -> tuple[WriterKind, bool]:
        """Properties that must be equal for all rows of one append."""
        return writer_kind(self.schema, upsert=self.upload.upsert), self.journaled

    @property
    def abandoned(self) -> bool:
        """Whether the upload failed, so that its client must send these rows again.

        Always False for journaled rows.
        """
        return self.upload.failure is not None and not self.journaled


def writer_kind(schema: pa.Schema, *, upsert: bool) -> WriterKind:
    return schema, schema.metadata, upsert


@dataclass(slots=True, eq=False)
class Group:
    """Consecutive rows of one upload that are sent together.

    The rows of a group do not change once it was sent.

    Attributes:
        rows: At least one entry.
        in_doubt: The store may hold the group, because an earlier send ended without an answer.
        alone: The group is sent in an append by itself, because the store refused an append that
            contained it, or because its rows are revived.
        decided: The group's duplicates are marked. The marks stay until the group is settled.
        num_settled: Number of the first entries of `rows` that are settled.
        num_failures: Number of errors of an unknown kind, in attempts to send the group by itself.
        failing_since: Time of the first of these errors.
        ready_at: Earliest time of the next attempt after such an error.
    """

    rows: list[Rows]
    in_doubt: bool = False
    alone: bool = False
    decided: bool = False
    num_settled: int = 0
    num_failures: int = 0
    failing_since: float = 0.0
    ready_at: float = 0.0

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

    @property
    def settled(self) -> bool:
        """Whether the group must not be sent, even if it is queued once more."""
        return self.num_settled == len(self.rows)

    @property
    def upsert(self) -> bool:
        return self.rows[0].upload.upsert

    def is_recognized(self, num_stored: int, *, counts_groups: bool) -> bool:
        """Whether the store can tell later that it has this group.

        `num_stored`: number of the group's rows that were sent to the store.
        """
        if self.upsert:  # later rows may replace all rows that have the key
            return False
        return num_stored > 0 and not (counts_groups and num_stored < self.num_rows)

    def to_batch(self, *, null_vectors: bool, exact_keys: bool = False) -> pa.RecordBatch:
        """The rows to store, with the column `batch_key`.

        `exact_keys`: a key names only rows that are in the batch, so that rows that are left out
        divide the group. Not for texts with several rows.
        """
        parts, offsets = [], []
        for rows in self.rows:
            places = rows.places_not_stored(null_vectors=null_vectors)
            parts.append(_without(rows.load_batch(), places))
            offsets.append(np.delete(np.arange(rows.first, rows.last + 1), places))
        batch = pa.concat_batches(parts)
        if exact_keys and batch.num_rows:
            keys = row_keys(self.rows[0].upload.upload_id, np.concatenate(offsets))
        else:
            keys = pa.repeat(self.batch_key, batch.num_rows)
        return batch.append_column(pa.field("batch_key", pa.utf8()), keys)


@dataclass(frozen=True, slots=True)
class SentGroups:
    """Groups that a store acknowledged.

    Attributes:
        slow_down: The store asks for a pause.
        unconfirmed: The groups' rows, if the store may still lose them.
        unrecognized: Keys of those groups that the store cannot report as stored later.
    """

    groups: Sequence[Group]
    slow_down: bool = False
    unconfirmed: Unconfirmed | None = None
    unrecognized: Sequence[str] = ()

    @property
    def ready_at(self) -> float:
        """Time from which it takes no wait to confirm the rows."""
        return -math.inf if self.unconfirmed is None else self.unconfirmed.ready_at


def form_groups(waiting: Sequence[Rows], max_rows: int) -> list[Group]:
    """Join consecutive rows of each upload into groups of up to `max_rows` rows.

    Each entry of journaled rows stays a group by itself.
    """
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
            group = open_groups[id(rows.upload)] = Group([], rows.in_doubt, alone=rows.revived)
            groups.append(group)
        group.rows.append(rows)
    return groups


def _without(batch: pa.RecordBatch, places: Sequence[int]) -> pa.RecordBatch:
    if not places:
        return batch
    keep = np.ones(batch.num_rows, np.bool_)
    keep[list(places)] = False
    return batch.filter(pa.array(keep))
