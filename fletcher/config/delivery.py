"""Options of delivery to stores: grouping, retry, timeouts and the journal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fletcher.config.network import COMPRESSIONS
from fletcher.config.option import DAY_S, GIB, MIB, MILLISECONDS, SIZE, STORES, OptionGroup, option

DEFAULT_STORE = "default"
NO_STORE = "none"
_COMMIT_ROWS = 50_000
_SEGMENT_BYTES = 128 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryConfig(OptionGroup):
    """Stores, and how rows are grouped, appended and retried.

    Attributes:
        stores: NAME=ADDRESS or ADDRESS of a store; repeatable, the first is the default. Addresses:
            lance:PATH, parquet:PATH, grpc://HOST:PORT, or none to only send vectors back. Default:
            lance: in the home folder.
        group_rows: Most rows in one write. More gives fewer, larger writes, which are acknowledged
            later.
        group_delay_ms: Longest wait for rows to fill a write. Less acknowledges rows earlier, in
            smaller writes.
        store_timeout_s: Longest time for one write before it is retried. Raise it for slow stores.
        store_compression: Compression of rows sent to Flight stores. It saves network and costs CPU
            time; auto measures both.
        store_retry_s: Time for which a failing write is retried before its upload fails.
        commit_rows: Most rows of one append, over all its groups; at least `group_rows`;
            0: 50,000.
        max_dedupe_bytes: Memory for the dedupe indexes of all datasets; `ServeConfig` derives it
            from `max_memory`.
    """

    stores: tuple[str, ...] = option((), STORES, name="store")
    group_rows: int = option(10_000, minimum=1)
    group_delay_ms: float = option(500, MILLISECONDS)
    store_timeout_s: float = option(60, minimum=0.001)
    store_compression: str = option("auto", choices=COMPRESSIONS)
    store_retry_s: float = option(300)
    commit_rows: int = 0
    max_dedupe_bytes: int = 64 << 20

    def _check_together(self) -> None:
        commit_rows = max(self.commit_rows or _COMMIT_ROWS, self.group_rows)
        object.__setattr__(self, "commit_rows", commit_rows)

    @property
    def group_delay_s(self) -> float:
        """`group_delay_ms` in seconds."""
        return self.group_delay_ms / 1000

    @property
    def slow_append_s(self) -> float:
        """Duration beyond which an append is slow, and the next ones carry fewer rows."""
        return self.store_timeout_s / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalConfig(OptionGroup):
    """Size and place of the journal: disk for acknowledged rows.

    Attributes:
        max_bytes: Disk for rows that are acknowledged but not stored yet. 0: no journal; rows are
            acknowledged when the store has them.
        retention_s: Time for which rows are kept after a store accepted them, for stores that
            acknowledge rows before these are durable.
        folder: Root of all journals, `folder/ADDRESS/DATASET` with a hash of the address;
            `ServeConfig` derives it from `home`.
        segment_bytes: Size of one file; 0: an eighth of `max_bytes`, at most 128 MiB.
    """

    max_bytes: int = option(4 * GIB, SIZE, name="max_journal")
    retention_s: float = option(DAY_S, name="journal_retention")
    folder: Path
    segment_bytes: int = 0

    def _check_together(self) -> None:
        if not self.segment_bytes:
            size = min(_SEGMENT_BYTES, max(1, self.max_bytes // 8))
            object.__setattr__(self, "segment_bytes", size)
