"""Embedded store of Parquet files: `PATH/<dataset>/<batch_key>.parquet`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from fletcher.core.command import CHOICES, check_dataset
from fletcher.core.ranges import RangeSet
from fletcher.core.schema import ELEMENT_TYPES, parse_batch_key
from fletcher.errors import ColumnTypeError, RequestError, StoreUnavailableError
from fletcher.stores import filters as conditions
from fletcher.stores.base import DatasetInfo, DatasetWriter, Filter, StoreCapabilities, WriteMode
from fletcher.stores.exact_search import check_query, cosine, nearest, unknown_dataset
from fletcher.stores.folder import StoreFolder
from fletcher.stores.schemas import (
    check_columns,
    check_compatible,
    check_storable,
    conform_batch,
    limit_rows,
)
from fletcher.util.durable import atomic_path, sync_path
from fletcher.util.locks import FileLock

# File of the dataset's schema, under the name that Parquet readers expect.
_SCHEMA_FILE = "_common_metadata"
_SUFFIX = ".parquet"


class ParquetStore:
    """Folders of Parquet files, one file per group.

    A group's file is named after its key, so that storing it again changes nothing.

    Search compares every vector with numpy, which suits tens of thousands of rows.

    Args:
        folder: Of the datasets' folders; created if missing.

    Raises:
        StoreError: The folder cannot be created.
    """

    capabilities = StoreCapabilities(
        dtypes=tuple(ELEMENT_TYPES),
        null_vectors=True,
        upsert=False,
        drops_repeated_keys=True,
        durable=True,
        outputs=CHOICES["output"],
    )

    def __init__(self, folder: Path) -> None:
        self.address = f"parquet:{folder}"
        self._folder = StoreFolder(folder)

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> ParquetWriter:
        """See `Store.open_writer`."""
        check_dataset(dataset)
        if mode == "upsert":
            raise RequestError(
                "`mode` is upsert, which a Parquet store cannot do; use a `lance:` store or append",
                field="mode",
                allowed=["append", "overwrite"],
            )
        if "batch_key" not in schema.names:
            raise ColumnTypeError(
                "`batch_key` is missing: it names the Parquet file of a group", field="batch_key"
            )
        check_storable(schema)
        lock = self._folder.lock_dataset(dataset)
        folder = self._folder.path / dataset
        try:
            if mode == "overwrite" and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
            for leftover in folder.glob(".*.tmp"):  # of a killed writer
                leftover.unlink()
            if (folder / _SCHEMA_FILE).exists():
                stored = pq.read_schema(folder / _SCHEMA_FILE)
                check_compatible(dataset, stored, schema)
            else:
                stored = schema
                with atomic_path(folder / _SCHEMA_FILE) as temporary:
                    pq.write_metadata(schema, temporary)
            # The files found here count as stored, so sync them: their writer may have died first.
            sync_path(folder)
            sync_path(self._folder.path)
        except OSError as error:
            lock.release()
            raise _unavailable(dataset, error) from error
        except BaseException:
            lock.release()
            raise
        writer = ParquetWriter(
            folder, dataset, lock, schema=stored, on_close=self._folder.remove_writer
        )
        self._folder.add_writer(writer)
        return writer

    def datasets(self) -> list[DatasetInfo]:
        """See `Store.datasets`."""
        names = sorted(path.parent.name for path in self._folder.path.glob(f"*/{_SCHEMA_FILE}"))
        found = (self.dataset(name) for name in names)
        return [info for info in found if info is not None]

    def dataset(self, name: str) -> DatasetInfo | None:
        """See `Store.dataset`."""
        check_dataset(name)
        if not (self._folder.path / name / _SCHEMA_FILE).exists():
            return None
        files = self._files(name)
        rows = sum(pq.read_metadata(path).num_rows for path in files)
        return DatasetInfo(
            name, self._schema(name), rows, sum(path.stat().st_size for path in files)
        )

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        """See `Store.stored_ranges`."""
        check_dataset(dataset)
        keys = (parse_batch_key(path.name[: -len(_SUFFIX)]) for path in self._files(dataset))
        return RangeSet(key[1:] for key in keys if key and key[0] == upload_id).ranges()

    def scan(
        self,
        dataset: str,
        *,
        columns: Sequence[str] | None = None,
        filters: Sequence[Filter] = (),
        limit: int | None = None,
    ) -> pa.RecordBatchReader:
        """See `Store.scan`. Rows are sorted by batch key."""
        schema = self._schema(dataset)
        wanted = list(columns) if columns is not None else schema.names
        check_columns(dataset, schema, wanted)
        condition = conditions.to_expression(dataset, schema, filters)
        files = [str(path) for path in self._files(dataset)]
        rows = ds.dataset(files, schema=schema, format="parquet").scanner(
            columns=wanted, filter=condition, batch_size=8192
        )
        out = pa.schema([schema.field(name) for name in wanted], metadata=schema.metadata)
        return pa.RecordBatchReader.from_batches(out, limit_rows(rows.to_batches(), out, limit))

    def search(
        self,
        dataset: str,
        vector: npt.NDArray[np.float32],
        *,
        k: int,
        columns: Sequence[str] | None = None,
        filters: Sequence[Filter] = (),
    ) -> pa.Table:
        """See `Store.search`."""
        schema = self._schema(dataset)
        reader = check_query(dataset, schema, vector, k)
        wanted = list(columns) if columns is not None else schema.names
        read = list(dict.fromkeys([*wanted, "vector"]))
        rows = self.scan(dataset, columns=read, filters=filters)
        return nearest(rows, cosine(vector, reader), k=k, columns=wanted)

    def delete_dataset(self, name: str) -> None:
        """See `Store.delete_dataset`."""
        check_dataset(name)
        lock = self._folder.lock_dataset(name)
        try:
            self._schema(name)
            shutil.rmtree(self._folder.path / name)
            sync_path(self._folder.path)
        except OSError as error:
            raise _unavailable(name, error) from error
        finally:
            lock.release()

    def close(self) -> None:
        """Close the writers. Idempotent."""
        self._folder.close_writers()

    def _files(self, dataset: str) -> list[Path]:
        return sorted((self._folder.path / dataset).glob(f"*{_SUFFIX}"))

    def _schema(self, dataset: str) -> pa.Schema:
        check_dataset(dataset)
        try:
            return pq.read_schema(self._folder.path / dataset / _SCHEMA_FILE)
        except FileNotFoundError:
            raise unknown_dataset(dataset) from None


class ParquetWriter:
    """The only writer of a dataset's Parquet files. One thread owns it."""

    def __init__(
        self,
        folder: Path,
        dataset: str,
        lock: FileLock,
        *,
        schema: pa.Schema,
        on_close: Callable[[DatasetWriter], None],
    ) -> None:
        self._folder = folder
        self._dataset = dataset
        self._lock = lock
        self._schema = schema
        self._on_close = on_close
        self._closed = False

    def append(self, batches: Sequence[pa.RecordBatch]) -> bool:
        """Write a file for every key without one; a crash leaves no incomplete file.

        Raises:
            StoreUnavailableError: A file could not be written; files of earlier keys may exist.
            ColumnTypeError: A row has no `batch_key`, or a column has another type.
        """
        assert not self._closed, "append after close"
        for batch in batches:
            check_compatible(self._dataset, self._schema, batch.schema)
            if "batch_key" not in batch.schema.names or batch.column("batch_key").null_count:
                raise ColumnTypeError("`batch_key` is missing in some rows", field="batch_key")
        rows = [conform_batch(batch, self._schema) for batch in batches if batch.num_rows]
        table = pa.Table.from_batches(rows, self._schema)
        keys = table.column("batch_key").unique().to_pylist()
        for key in self.missing_keys(keys):
            group = table.filter(pc.equal(table.column("batch_key"), key)) if keys[1:] else table
            try:
                with atomic_path(self._path(key)) as temporary:
                    pq.write_table(group, temporary)
            except OSError as error:
                raise _unavailable(self._dataset, error) from error
        return False

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        """See `DatasetWriter.missing_keys`."""
        return [key for key in batch_keys if not self._path(key).exists()]

    def close(self) -> None:
        """See `DatasetWriter.close`."""
        if not self._closed:
            self._closed = True
            self._lock.release()
            self._on_close(self)

    def _path(self, key: str) -> Path:
        if "/" in key or "\0" in key or key.startswith((".", "_")) or len(key.encode()) > 200:
            raise ColumnTypeError(
                f"`batch_key` is {key[:200]!r}, which cannot be a file's name; expected "
                "upload_id:first-last",
                field="batch_key",
            )
        return self._folder / f"{key}{_SUFFIX}"


def _unavailable(dataset: str, error: OSError) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"dataset `{dataset}` cannot be written: {error.strerror or type(error).__name__}",
        field="store",
    )
