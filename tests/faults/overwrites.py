"""Versions of a dataset that replace each other as a whole, by `mode: overwrite`.

Each version is one upload. Readers see the last version until the next one is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from fletcher.core.ranges import RangeSet
from fletcher.delivery.journal.root import journal_folders
from fletcher.delivery.journal.segment import WAITING, Segment, read_segments
from fletcher.stores.staging import staged_for, staged_name
from tests.faults.rewrites import SCHEMA, CheckedVersions

DATASET = "overwritten"


@dataclass(frozen=True)
class Overwrites:
    """The versions.

    Attributes:
        sizes: Number of rows of each version.
        durabilities: Each version's `durability`.
        batch_rows: Rows of a batch.
        pause_s: Pause of the client after each batch.
    """

    sizes: tuple[int, ...]
    durabilities: tuple[str, ...]
    batch_rows: int
    pause_s: float

    def upload_id(self, version: int) -> str:
        return f"overwrite-{version}"

    def batches(self, version: int) -> Iterator[pa.RecordBatch]:
        num_rows = self.sizes[version]
        for first in range(0, num_rows, self.batch_rows):
            rows = range(first, min(first + self.batch_rows, num_rows))
            texts = [f"row {row} in place of {version}" for row in rows]
            yield pa.record_batch({"id": rows, "text": texts, "n": [version] * len(rows)}, SCHEMA)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Overwritten(CheckedVersions[Overwrites]):
    """Checks the version that is stored, and the unfinished one."""

    def check(self) -> None:
        """Check that one whole version is stored, not older than the last complete one.

        Raises:
            AssertionError: The check failed.
        """
        complete = self.last("complete")
        version = self._stored()
        begun = self.last("begun")
        assert complete <= version <= begun, (
            f"`{DATASET}` has version {version}; version {complete} was complete, {begun} begun"
        )

    @property
    def is_done(self) -> bool:
        """Whether the store has the last version."""
        return self._stored() == len(self.plan.sizes) - 1

    def last(self, what: str) -> int:
        """The last version that the client began or completed; -1: none."""
        lines = self.diary.read_text().splitlines() if self.diary.exists() else []
        return max((entry.get(what, -1) for entry in map(json.loads, lines)), default=-1)

    def staged_in_journal(self) -> dict[str, int]:
        """Number of waiting rows of unfinished versions, by the name of the staged dataset."""
        waiting: dict[str, int] = {}
        for _, dataset, folder in journal_folders(self._home / "journal"):
            if staged_for(dataset) == DATASET:
                rows = RangeSet()
                for _, segment in read_segments(folder.glob(f"*{WAITING}")):
                    for group in segment.groups if isinstance(segment, Segment) else ():
                        rows.add_range(group.info.first, group.info.last)
                waiting[dataset] = rows.count
        return waiting

    def staged_names(self) -> dict[str, int]:
        """Version of each staged dataset that may exist."""
        versions = range(len(self.plan.sizes))
        return {staged_name(DATASET, self.plan.upload_id(one)): one for one in versions}

    def _stored(self) -> int:
        """The stored version; -1: there is no dataset."""
        table = self._read_store(DATASET)
        if table is None:
            return -1
        versions = set(table.column("n").to_pylist())
        assert len(versions) == 1, f"`{DATASET}` has rows of the versions {sorted(versions)}"
        (version,) = versions
        ids = sorted(table.column("id").to_pylist())
        assert ids == list(range(self.plan.sizes[version])), (
            f"`{DATASET}` has {len(ids)} rows of version {version}, which has "
            f"{self.plan.sizes[version]}"
        )
        return int(version)
