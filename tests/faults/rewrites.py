"""Versions of the same rows, to check that no older row replaces a newer one.

Each version is one upload that replaces the last version by id. It is sent when the last version is
acknowledged to its end. Some versions go through the journal, others straight to the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from fletcher.delivery.journal.root import journal_folders
from fletcher.delivery.journal.segment import WAITING, Segment, read_segments

DATASET = "rewritten"
SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8(), "n": pa.int64()})


_Plan = TypeVar("_Plan")


@dataclass(frozen=True)
class Rewrites:
    """The versions.

    Attributes:
        num_rows: Rows of each version; their ids are their offsets.
        durabilities: Each version's `durability`.
    """

    num_rows: int
    durabilities: tuple[str, ...]

    def upload_id(self, version: int) -> str:
        return f"version-{version}"

    def batch(self, version: int) -> pa.RecordBatch:
        texts = [f"row {row} as of {version}" for row in range(self.num_rows)]
        return pa.record_batch(
            {"id": range(self.num_rows), "text": texts, "n": [version] * self.num_rows}, SCHEMA
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class CheckedVersions(Generic[_Plan]):
    """Versions of a dataset, to compare with what is journaled and stored.

    Args:
        plan: The versions.
        diary: File in which the client notes how far it got.
        home: The server's home, for its journal.
        read_store: Returns the dataset's rows in the store; None: there is no dataset.
    """

    def __init__(
        self,
        plan: _Plan,
        diary: Path,
        *,
        home: Path,
        read_store: Callable[[str], pa.Table | None],
    ) -> None:
        self.plan = plan
        self.diary = diary
        self._home = home
        self._read_store = read_store


class Rewritten(CheckedVersions[Rewrites]):
    """Checks the versions that are journaled and stored."""

    def check(self) -> None:
        """Check that each row is stored once, and stays at least as new as acknowledged.

        Raises:
            AssertionError: It does not hold.
        """
        acknowledged = self.num_acknowledged - 1
        versions = self._waiting()
        stored = self._stored()
        versions = np.where(versions < 0, stored, versions)
        older = np.flatnonzero(versions < acknowledged)
        assert not len(older), (
            f"rows {older.tolist()[:8]} are or will be of version {versions[older].tolist()[:8]}, "
            f"acknowledged is {acknowledged}"
        )

    @property
    def is_done(self) -> bool:
        """Whether the store has the last version of all rows."""
        return bool((self._stored() == len(self.plan.durabilities) - 1).all())

    @property
    def num_acknowledged(self) -> int:
        """Number of acknowledged versions."""
        lines = self.diary.read_text().splitlines() if self.diary.exists() else []
        return len(lines)

    def _waiting(self) -> np.ndarray:
        """Last journaled version of each row; -1: none."""
        versions = np.full(self.plan.num_rows, -1)
        for _, dataset, folder in journal_folders(self._home / "journal"):
            for _, segment in read_segments(folder.glob(f"*{WAITING}")):
                groups = segment.groups if isinstance(segment, Segment) else ()
                for info in (group.info for group in groups if not group.settled):
                    if dataset == DATASET:
                        version = int(info.upload_id.rpartition("-")[2])
                        versions[info.first : info.last + 1] = version
        return versions

    def _stored(self) -> np.ndarray:
        versions = np.full(self.plan.num_rows, -1)
        table = self._read_store(DATASET)
        if table is not None:
            ids = table.column("id").to_numpy()
            assert len(set(ids.tolist())) == len(ids), f"ids of `{DATASET}` are there twice"
            versions[ids] = table.column("n").to_numpy()
        return versions
