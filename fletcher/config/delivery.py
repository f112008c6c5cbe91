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
        stores: A store, as NAME=ADDRESS or ADDRESS; repeatable, the first is the default store.
            Addresses: lance:PATH, parquet:PATH, grpc://HOST:PORT, or none to only send vectors
            back. Default: lance: in the home folder.
        group_rows: Maximum number of rows in one write. A higher value makes writes fewer and
            larger, and rows are acknowledged later.
        group_delay_ms: Longest wait for rows to fill a write. A lower value acknowledges rows
            earlier, but makes writes smaller.
        store_timeout_s: Longest time for one write before it is retried. Raise it for slow stores.
        store_compression: Compression of rows sent to Flight stores. It saves network traffic and
            costs CPU time; auto measures both and decides.
        store_retry_s: Time for which a failing write is retried before its upload fails.
        commit_rows: Maximum number of rows in one append, which may hold several groups. At least
            `group_rows`; 0: 50,000.
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
        """Duration beyond which an append counts as slow, so that the next has fewer rows."""
        return self.store_timeout_s / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalConfig(OptionGroup):
    """Size and place of the journal, which holds acknowledged rows on disk.

    Attributes:
        max_bytes: Disk space for rows that are acknowledged but not stored yet. 0: no journal; rows
            are acknowledged when the store has them.
        retention_s: Time for which the journal keeps rows after the store accepted them. Used only
            for stores that acknowledge rows before the rows are durable.
        folder: Root folder of all journals; `ServeConfig` derives it from `home`. A journal is in
            `folder/ADDRESS/DATASET`, where ADDRESS is a hash of the store's address.
        segment_bytes: Size of one journal file; 0: an eighth of `max_bytes`, at most 128 MiB.
    """

    max_bytes: int = option(4 * GIB, SIZE, name="max_journal")
    retention_s: float = option(DAY_S, name="journal_retention")
    folder: Path
    segment_bytes: int = 0

    def _check_together(self) -> None:
        if not self.segment_bytes:
            size = min(_SEGMENT_BYTES, max(1, self.max_bytes // 8))
            object.__setattr__(self, "segment_bytes", size)
