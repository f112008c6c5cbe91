"""Embedded store: a folder of LanceDB tables, `PATH/<dataset>.lance`."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.command import CHOICES, check_dataset
from fletcher.core.quantization import VectorReader, pack_signs
from fletcher.core.ranges import RangeSet
from fletcher.core.schema import ELEMENT_TYPES, parse_batch_key
from fletcher.errors import ColumnTypeError, InvalidCommandError, StoreError, StoreUnavailableError
from fletcher.stores import filters as conditions
from fletcher.stores.base import DatasetInfo, Filter, StoreCapabilities, WriteMode
from fletcher.stores.exact_search import check_query, cosine, nearest, unknown_dataset
from fletcher.stores.folder import StoreFolder
from fletcher.stores.lance.repair import set_torn_versions_aside
from fletcher.stores.lance.writer import (
    LanceWriter,
    check_new_columns,
    distinct_keys,
    to_store_error,
)
from fletcher.stores.schemas import check_columns, check_compatible, new_fields
from fletcher.util.allocator import keep_large_blocks
from fletcher.util.durable import sync_path

# LanceDB's defaults (6 GiB of index cache, 1 GiB of metadata cache, 2 GiB of read-ahead per scan)
# exceed the bound that `--max-memory` promises.
CACHE_BYTES = 32 << 20
SCAN_BUFFER_BYTES = 64 << 20

# Approximate size of a scanned batch; a column may be as wide as 64 Ki numbers.
SCAN_BATCH_BYTES = 2 << 20
# Rows of a scanned batch whose rows have several vectors: 1 to 100 KiB each.
LIST_SCAN_ROWS = 256

# Search of binary vectors: candidates by Hamming distance per requested row, which a float32 query
# then ranks again, because it loses less than a binary one. Share of float32's first 10 among 40
# (all-MiniLM-L6-v2, 6,000 texts, 1,000 queries): 0.882 by Hamming distance alone, 0.944 with 2
# candidates per row, 0.963 with 4, 0.967 with 8, 0.968 with all rows.
HAMMING_CANDIDATES = 8
MAX_HAMMING_CANDIDATES = 10_000


def _lancedb() -> Any:
    # Lance reads this once, when its library is loaded.
    os.environ.setdefault("LANCE_DEFAULT_IO_BUFFER_SIZE", str(SCAN_BUFFER_BYTES))
    try:
        import lancedb
    except ImportError as error:
        raise StoreError(
            "a `lance:` store needs LanceDB, which is not installed; run: "
            "pip install 'longbow-fletcher[lance]'",
            field="store",
        ) from error
    keep_large_blocks()
    return lancedb


class LanceStore:
    """LanceDB tables in one folder. Thread-safe; other processes may read them.

    Search is exact: it compares every vector, unless the table has an index made with LanceDB's own
    tools. A million rows of 384 float16 take about a second on two cores.

    Args:
        folder: Of the tables; created if missing.

    Raises:
        StoreError: LanceDB is not installed, or the folder cannot be created or written.
    """

    capabilities = StoreCapabilities(
        dtypes=tuple(ELEMENT_TYPES),
        null_vectors=True,
        upsert=True,
        drops_repeated_keys=False,
        durable=True,
        outputs=CHOICES["output"],
    )

    def __init__(self, folder: Path) -> None:
        lancedb = _lancedb()
        self.address = f"lance:{folder}"
        self._folder = StoreFolder(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StoreError(f"the store's folder {folder} cannot be written", field="store")
        self._database = lancedb.connect(
            str(folder),
            # Commits of other processes are visible at once.
            read_consistency_interval=dt.timedelta(0),
            session=lancedb.Session(
                index_cache_size_bytes=CACHE_BYTES, metadata_cache_size_bytes=CACHE_BYTES
            ),
        )
        self._repaired: set[str] = set()

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> LanceWriter:
        """See `Store.open_writer`. Adds columns that the dataset lacks."""
        check_dataset(dataset)
        _check_offered(schema, mode)
        check_new_columns(schema)
        lock = self._folder.lock_dataset(dataset)
        try:
            self._repair(dataset)
            table = self._open_table(dataset)
            if table is not None and mode != "overwrite":
                check_compatible(dataset, table.schema, schema)
                added = new_fields(table.schema, schema)
                if added:
                    table.add_columns(pa.schema(added))
            else:
                fields = [field.with_nullable(True) for field in schema]
                table = self._database.create_table(
                    dataset,
                    schema=pa.schema(fields, metadata=schema.metadata),
                    mode="overwrite" if table is not None else "create",
                )
            writer = LanceWriter(
                table,
                folder=self._folder.path / f"{dataset}.lance",
                dataset=dataset,
                lock=lock,
                mode=mode,
                on_close=self._folder.remove_writer,
            )
        except (ValueError, RuntimeError, OSError) as error:
            lock.release()
            raise to_store_error(dataset, error) from error
        except BaseException:
            lock.release()
            raise
        self._folder.add_writer(writer)
        return writer

    def datasets(self) -> list[DatasetInfo]:
        """See `Store.datasets`."""
        names = sorted(path.stem for path in self._folder.path.glob("*.lance") if path.is_dir())
        found = (self.dataset(name) for name in names)
        return [info for info in found if info is not None]

    def dataset(self, name: str) -> DatasetInfo | None:
        """See `Store.dataset`."""
        check_dataset(name)
        table = self._open_table(name)
        if table is None:
            return None
        try:
            size = table.stats()["total_bytes"]
            return DatasetInfo(name, table.schema, table.count_rows(), int(size))
        except (ValueError, RuntimeError, OSError) as error:
            raise to_store_error(name, error) from error

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        """See `Store.stored_ranges`."""
        check_dataset(dataset)
        table = self._open_table(dataset)
        if table is None or "batch_key" not in table.schema.names:
            return []
        prefix = conditions.quoted(f"{upload_id}:")
        keys = distinct_keys(table, f"starts_with(batch_key, {prefix})")
        parsed = (parse_batch_key(key) for key in keys)
        return RangeSet(one[1:] for one in parsed if one and one[0] == upload_id).ranges()

    def scan(
        self,
        dataset: str,
        *,
        columns: Sequence[str] | None = None,
        filters: Sequence[Filter] = (),
        limit: int | None = None,
    ) -> pa.RecordBatchReader:
        """See `Store.scan`."""
        table = self._table(dataset)
        query = table.search()
        wanted = list(columns) if columns is not None else table.schema.names
        return self._query(
            dataset, table, query, columns=wanted, filters=filters, limit=limit
        ).to_batches(_scan_rows(table.schema))

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
        table = self._table(dataset)
        reader = check_query(dataset, table.schema, vector, k)
        wanted = list(columns) if columns is not None else table.schema.names
        asked = np.asarray(vector, np.float32)
        if reader.dtype in ("int8", "ubinary"):
            rows = self._candidates(dataset, table, reader, asked, k, wanted, filters)
            return nearest(rows, cosine(asked, reader), k=k, columns=wanted)
        query = table.search(asked, vector_column_name="vector").distance_type("cosine")
        found = self._found(dataset, table, query, wanted, filters, k)
        distance = found.column("_distance").to_numpy()
        # By rounding, a vector's distance to itself may be slightly below 0.
        score = pa.array(np.clip(1.0 - distance, -1.0, 1.0).astype(np.float32))
        return found.select(wanted).append_column("score", score)

    def _candidates(
        self,
        dataset: str,
        table: Any,
        reader: VectorReader,
        vector: npt.NDArray[np.float32],
        k: int,
        columns: list[str],
        filters: Sequence[Filter],
    ) -> pa.RecordBatchReader:
        """Rows that include the nearest ones, with `vector` and `columns`.

        For int8, which LanceDB stores and cannot search, these are all rows.
        """
        read = list(dict.fromkeys([*columns, "vector"]))
        if reader.dtype == "int8":
            return self.scan(dataset, columns=read, filters=filters)
        query = table.search(pack_signs(vector), vector_column_name="vector")
        query = query.distance_type("hamming")
        limit = max(k, min(k * HAMMING_CANDIDATES, MAX_HAMMING_CANDIDATES))
        return self._found(dataset, table, query, read, filters, limit).to_reader()

    def _found(
        self,
        dataset: str,
        table: Any,
        query: Any,
        columns: list[str],
        filters: Sequence[Filter],
        k: int,
    ) -> pa.Table:
        try:
            return self._query(
                dataset, table, query, columns=[*columns, "_distance"], filters=filters, limit=k
            ).to_arrow()
        except (ValueError, RuntimeError, OSError) as error:
            raise to_store_error(dataset, error) from error

    def delete_dataset(self, name: str) -> None:
        """See `Store.delete_dataset`."""
        check_dataset(name)
        lock = self._folder.lock_dataset(name)
        try:
            self._repair(name)
            if self._open_table(name) is None:
                raise unknown_dataset(name)
            self._database.drop_table(name)
            sync_path(self._folder.path)
        except (ValueError, RuntimeError, OSError) as error:
            raise to_store_error(name, error) from error
        finally:
            lock.release()

    def close(self) -> None:
        """Close the writers. Idempotent."""
        self._folder.close_writers()

    def _repair(self, name: str) -> None:
        """Set incomplete versions aside; the caller holds the lock."""
        if name not in self._repaired:
            try:
                set_torn_versions_aside(self._folder.path / f"{name}.lance")
            except OSError as error:
                raise to_store_error(name, error) from error
            self._repaired.add(name)

    def _open_table(self, name: str) -> Any | None:
        # A table without a manifest is being created, or its creator died.
        manifests = self._folder.path / f"{name}.lance" / "_versions"
        if not any(manifests.glob("*.manifest")):
            return None
        if name not in self._repaired:
            try:
                lock = self._folder.lock_dataset(name)
            except StoreUnavailableError:
                pass  # the writer that holds the lock has repaired the table
            else:
                try:
                    self._repair(name)
                finally:
                    lock.release()
            if not any(manifests.glob("*.manifest")):
                return None
        try:
            return self._database.open_table(name)
        except (ValueError, RuntimeError, OSError) as error:
            raise to_store_error(name, error) from error

    def _table(self, name: str) -> Any:
        check_dataset(name)
        table = self._open_table(name)
        if table is None:
            raise unknown_dataset(name)
        return table

    def _query(
        self,
        dataset: str,
        table: Any,
        query: Any,
        *,
        columns: list[str],
        filters: Sequence[Filter],
        limit: int | None,
    ) -> Any:
        schema = table.schema
        check_columns(dataset, schema, [name for name in columns if name != "_distance"])
        condition = conditions.to_sql(dataset, schema, filters)
        if condition is not None:
            try:
                # LanceDB checks only here whether a literal fits its column (300 in an int8).
                table.search().where(condition).select([]).limit(1).explain_plan()
            except ValueError as error:
                raise ColumnTypeError(
                    "a filter's value does not fit its column; compare with a value of its type",
                    field="filters",
                ) from error
            query = query.where(condition)
        query = query.select(columns)
        return query if limit is None else query.limit(limit)


def _check_offered(schema: pa.Schema, mode: WriteMode) -> None:
    if mode == "upsert" and "id" not in schema.names:
        raise InvalidCommandError(
            "`mode` is upsert, which replaces rows by `id`, and the rows have no `id`; send one, "
            "or append",
            field="mode",
        )


def _scan_rows(schema: pa.Schema) -> int:
    kind = schema.field("vector").type if "vector" in schema.names else pa.null()
    if pa.types.is_list(kind):
        return LIST_SCAN_ROWS
    if not pa.types.is_fixed_size_list(kind):
        return 8192
    row_bytes = kind.list_size * kind.value_type.bit_width // 8 + 512
    return int(min(max(SCAN_BATCH_BYTES // row_bytes, 64), 8192))
