"""Reads a test's store while its processes run, and after they were killed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fletcher.stores.address import open_store
from tests.faults.longbow_servers import LongbowServer


class LongbowRows:
    """Rows of the datasets of a Longbow."""

    def __init__(self, longbow: LongbowServer) -> None:
        self._longbow = longbow

    def table(self, dataset: str, columns: Sequence[str]) -> pa.Table | None:
        """Columns of all rows; None if there is no dataset."""
        table = self._longbow.table(dataset)
        return table and table.select(columns)

    def num_rows(self, dataset: str) -> int:
        table = self._longbow.table(dataset)
        return 0 if table is None else table.num_rows


class StoredRows:
    """Rows of the datasets in a folder.

    Args:
        kind: `lance` or `parquet`. Parquet files are read one by one, so that incomplete datasets
            can be read, too.
    """

    def __init__(self, folder: Path, kind: str = "lance") -> None:
        self._folder = folder
        self._kind = kind
        self._counted: dict[str, tuple[list[str], int]] = {}

    def table(self, dataset: str, columns: Sequence[str]) -> pa.Table | None:
        """Columns of all rows; None if there is no dataset."""
        if self._kind == "parquet":
            tables = [pq.read_table(path, columns=columns) for path in self._files(dataset)]
            return pa.concat_tables(tables) if tables else None
        store = open_store(f"lance:{self._folder}")
        try:
            if store.dataset(dataset) is None:
                return None
            return store.scan(dataset, columns=columns).read_all()
        finally:
            store.close()

    def num_rows(self, dataset: str) -> int:
        """Number of rows. Reads only file names while the dataset does not change."""
        names = [path.name for path in self._files(dataset)]
        known, count = self._counted.get(dataset, ([], 0))
        if names != known:
            count = self._count(dataset)
            self._counted[dataset] = names, count
        return count

    def _count(self, dataset: str) -> int:
        if self._kind == "parquet":
            count = 0
            for path in self._files(dataset):
                with contextlib.suppress(FileNotFoundError):  # it was replaced meanwhile
                    count += pq.read_metadata(path).num_rows
            return count
        store = open_store(f"lance:{self._folder}")
        try:
            info = store.dataset(dataset)
            return 0 if info is None else info.num_rows
        finally:
            store.close()

    def _files(self, dataset: str) -> list[Path]:
        """A Parquet dataset's files, or the versions of a Lance dataset."""
        if self._kind == "parquet":
            return sorted((self._folder / dataset).glob("*.parquet"))
        return sorted((self._folder / f"{dataset}.lance" / "_versions").glob("*.manifest"))
