"""Options of the journal: disk for acknowledged rows that wait for their store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fletcher.config.option import DAY_S, GIB, MIB, SECONDS, SIZE, OptionGroup, option

_SEGMENT_BYTES = 128 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalConfig(OptionGroup):
    """Size and place of the journal.

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
    retention_s: float = option(DAY_S, SECONDS, name="journal_retention")
    folder: Path
    segment_bytes: int = 0

    def _check_together(self) -> None:
        if not self.segment_bytes:
            size = min(_SEGMENT_BYTES, max(1, self.max_bytes // 8))
            object.__setattr__(self, "segment_bytes", size)
