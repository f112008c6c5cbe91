"""Writer of a LanceDB table: one synced commit per append, and compaction."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types

from fletcher.errors import (
    OverloadedError,
    RequestError,
    StoreUnavailableError,
)
from fletcher.stores.base import Appended, WriteMode
from fletcher.stores.embedded import EmbeddedStore, EmbeddedWriter, concerns_store
from fletcher.stores.filters import quoted
from fletcher.stores.lance.new_columns import check_new_columns
from fletcher.stores.lance.pinned import PinnedTable
from fletcher.stores.lance.synced_folder import SyncedFolder
from fletcher.stores.schemas import (
    align_batch,
    check_compatible,
    conform_batch,
    has_chunks,
    last_of_each_id,
)
from fletcher.util.allocator import trim_heap
from fletcher.util.locks import FileLock
from fletcher.util.threads import start_thread

_log = logging.getLogger(__name__)

# Each append adds a fragment. Fragments below LARGE_ROWS slow scans down. Larger fragments do not,
# and rewriting them took 250 to 500 MB and both cores for seconds. Compaction rewrites every
# fragment below Lance's target of 1 Mi rows. Compaction therefore waits until the new rows are a
# quarter of the rows to rewrite, or until there are COMPACT_FRAGMENTS_AT_MOST fragments.
COMPACT_FRAGMENTS = 20
COMPACT_FRAGMENTS_AT_MOST = 200
LARGE_ROWS = 8192
LARGE_BYTES = 16 << 20
FRAGMENT_ROWS = 1 << 20
# Rewriting rows of HEAVY_ROW_BYTES or more takes memory of up to 2.3 times their size. If there are
# more than HEAVY_BYTES of them, compaction waits for as many small fragments as are allowed.
HEAVY_ROW_BYTES = 16 << 10
HEAVY_BYTES = 256 << 20
# Old versions are kept for this long, for readers in other processes.
KEEP_VERSIONS = dt.timedelta(minutes=10)
# LanceDB's messages about a table that is deleted while it is opened or read.
_GONE = re.compile(r"Not found: .*/_versions|Table '.*' was not found")
_DATA_FILE = re.compile(r"\bdata/\w+\.lance\b")
KEEP_FOREVER = dt.timedelta(days=36500)


class LanceWriter(EmbeddedWriter):
    """The only writer of a LanceDB table; see `DatasetWriter`. One thread owns it.

    Rows survive a power loss once `append` has returned. For this, `append` syncs the commit's
    files and folders, which LanceDB does not do. It takes 1 to 6 ms on a local SSD.

    Args:
        store, dataset, lock, pinned: Store, name, write lock and open table of the dataset.
        mode: Mode in which the table was opened. With `upsert`, every append replaces rows of the
            same `id`.

    Attributes:
        table: The open LanceDB table.
        old_versions_left: The table's rows were replaced, and `close` frees the disk space of its
            old rows.
    """

    def __init__(
        self,
        store: EmbeddedStore,
        dataset: str,
        lock: FileLock,
        pinned: PinnedTable,
        mode: WriteMode,
    ) -> None:
        self._pinned = pinned
        self.table = table = pinned.table
        self.schema: pa.Schema = table.schema
        self._mode = mode
        self.old_versions_left = False
        self._files = SyncedFolder(store.folder / f"{dataset}.lance", store.known_whole)
        self._files.sync_new_files(settled=True)
        stats = table.stats()
        self._small_fragments = int(stats["fragment_stats"]["num_small_fragments"])
        self._rows, self._bytes = int(table.count_rows()), int(stats["total_bytes"])
        self._rows_since = self._bytes_since = 0
        self._compaction: threading.Thread | None = None
        super().__init__(store, dataset, lock)  # last: the store closes all writers that it lists

    def append(self, batches: Sequence[pa.RecordBatch]) -> Appended:
        """Store all rows of all batches in one commit; durable on return.

        Raises:
            StoreUnavailableError: The commit failed, for example on a full disk; the rows may or
                may not be stored.
            RequestError: The rows do not fit the table.
        """
        self.write_rows(batches, upsert=self._mode == "upsert")
        return Appended()

    def write_rows(self, batches: Sequence[pa.RecordBatch], *, upsert: bool) -> None:
        """Store rows as `append` does, with the mode chosen per call."""
        assert self.is_open, "append after close"
        for batch in batches:
            check_compatible(self.dataset, self.schema, batch.schema)
        rows = [conform_batch(align_batch(one), self.schema) for one in batches if one.num_rows]
        if not rows:
            return
        table = pa.Table.from_batches(rows, self.schema)
        with lance_errors(self.dataset):
            with self._in_its_folder():
                if upsert:
                    self._join_compaction()  # it may rewrite the same fragments
                    if _holds_nan(table, "vector"):
                        raise _nan_refused()
                    self._merge(last_of_each_id(table), "id")
                else:
                    self._add(table)
            self._files.sync_new_files(settled=not self._compacting)
        self._rows += table.num_rows
        self._rows_since += table.num_rows
        self._bytes += table.nbytes
        self._bytes_since += table.nbytes
        self._small_fragments += 1
        if self._compaction_due(COMPACT_FRAGMENTS):
            self._start_compaction()

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        """The keys that are not stored. Takes 30-50 ms at 2 million rows."""
        if "batch_key" not in self.schema.names or not batch_keys:
            return list(batch_keys)
        condition = f"batch_key IN ({', '.join(quoted(key) for key in set(batch_keys))})"
        stored = distinct_keys(self.dataset, self.table, condition)
        return [key for key in batch_keys if key not in stored]

    def stored_keys(self) -> set[str]:
        """All batch keys of the table."""
        if "batch_key" not in self.schema.names:
            return set()
        return distinct_keys(self.dataset, self.table)

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Add columns, null in the stored rows. Raises as `check_new_columns`."""
        added = pa.schema(list(fields))
        check_new_columns(added)
        self._join_compaction()
        with lance_errors(self.dataset):
            self.table.add_columns(added)
            self._files.sync_new_files(settled=True)
        self.schema = self.table.schema

    def delete_rows(self, condition: str) -> int:
        """Delete the rows that meet an SQL condition; return their number."""
        self._join_compaction()
        with lance_errors(self.dataset):
            count = int(self.table.count_rows(condition))
            if count:
                self.table.delete(condition)
                self._files.sync_new_files(settled=True)
        self._rows -= count
        return count

    def delete_upload(self, upload_id: str) -> int:
        """Delete the rows of an upload; return their number."""
        if "batch_key" not in self.schema.names:
            return 0
        return self.delete_rows(upload_condition(upload_id))

    def finish(self) -> None:
        """Wait for a running compaction, and compact if due."""
        try:
            self._join_compaction()
            if self.old_versions_left or self._compaction_due(COMPACT_FRAGMENTS // 2):
                self._compact()
        finally:
            self._pinned.close()
            trim_heap()

    @property
    def _compacting(self) -> bool:
        return self._compaction is not None and self._compaction.is_alive()

    @property
    def holds_table(self) -> bool:
        """Whether the table is still there, and was not made anew."""
        return self._pinned.is_current

    @contextlib.contextmanager
    def _in_its_folder(self) -> Iterator[None]:
        """Context that raises `table_gone` if the folder is deleted before the block ends."""
        try:
            self._check_folder()
            yield
        except (ValueError, RuntimeError, OSError):
            self._check_folder()
            raise
        self._check_folder()

    def _check_folder(self) -> None:
        if not self.holds_table:
            raise table_gone(self.dataset)

    def _merge(self, table: pa.Table, key: str) -> None:
        chunks = key == "id" and has_chunks(table.schema)
        merge = self.table.merge_insert([key, "chunk_index"] if chunks else key)
        if key == "id":
            merge = merge.when_matched_update_all()
        if chunks:  # a text may have fewer chunks than before
            ids = table.column("id").unique().to_pylist()
            literals = ", ".join(quoted(one) if isinstance(one, str) else str(one) for one in ids)
            merge = merge.when_not_matched_by_source_delete(f"id IN ({literals})")
        # Unlike `add`, a merge treats null vectors as bad vectors and refuses them by default.
        merge.when_not_matched_insert_all().execute(table, on_bad_vectors="null")

    def _add(self, table: pa.Table) -> None:
        try:
            # One file per commit: parallel writers took more memory and were slower.
            self.table.add(table, write_parallelism=1)
        except (ValueError, RuntimeError) as error:
            if "contains NaN" not in str(error) or _holds_nan(table, "vector"):
                raise
            self._join_compaction()
            self._insert_nan(table)

    def _insert_nan(self, table: pa.Table) -> None:
        """Add rows with NaN in a carried list of a fixed size.

        `add` takes each such list for a vector and refuses NaN. A merge looks at `vector` alone. No
        row has the keys of these rows, so the merge inserts them all.
        """
        keys = table.column("batch_key") if "batch_key" in table.schema.names else None
        asked = [] if keys is None or keys.null_count else keys.unique().to_pylist()
        if not asked or len(self.missing_keys(asked)) < len(asked):
            name = next(one for one in table.schema.names if _holds_nan(table, one))
            raise RequestError(
                f"`{name[:200]}` holds NaN in a list of fixed size, which LanceDB takes only in "
                "rows with a new `batch_key`; send a list of variable size",
                field=name[:200],
            )
        self._merge(table, "batch_key")

    def _compaction_due(self, fragments: int) -> bool:
        if self._compacting or self._small_fragments < fragments:
            return False
        small = (
            self._rows_since < LARGE_ROWS * self._small_fragments
            and self._bytes_since < LARGE_BYTES * self._small_fragments
        )
        share = self._rows_since * 4 >= min(self._rows, FRAGMENT_ROWS)
        most = self._small_fragments >= COMPACT_FRAGMENTS_AT_MOST
        if self._bytes > max(HEAVY_BYTES, HEAVY_ROW_BYTES * self._rows):
            return small and share and most
        return (small and share) or most

    def _start_compaction(self) -> None:
        # Compact in the background, since a million rows take some 4 s. Appends continue meanwhile:
        # Lance commits an append and a rewrite of other fragments in any order.
        self._join_compaction()
        try:
            self._compaction = start_thread(f"compact-{self.dataset}", self._compact)
        except OverloadedError as error:  # the rows are stored; the next append tries again
            _log.warning("dataset %s is not compacted now: %s", self.dataset, error)
        else:
            self._small_fragments = self._rows_since = self._bytes_since = 0

    def _join_compaction(self) -> None:
        if self._compaction is not None:
            self._compaction.join()
            self._compaction = None

    def optimize_table(self, keep: dt.timedelta) -> None:
        """Join small fragments, add new rows to the indexes, and delete old versions.

        Args:
            keep: Age up to which old versions are kept for readers.

        Raises:
            StoreUnavailableError: LanceDB failed. No row is lost.
        """
        self._join_compaction()
        with lance_errors(self.dataset):
            self._rewrite(keep)
        self._small_fragments = self._rows_since = 0

    def sync_files(self) -> None:
        """Sync what was written to `table` by other means than this writer's methods."""
        self._files.sync_new_files(settled=True)

    def _rewrite(self, keep: dt.timedelta) -> None:
        self.table.optimize(cleanup_older_than=KEEP_FOREVER)
        self._files.sync_new_files(settled=False)
        # The old version may be deleted only once the new one is on disk.
        self.table.optimize(cleanup_older_than=keep)

    def _compact(self) -> None:
        try:
            self._rewrite(KEEP_VERSIONS)
        except (ValueError, RuntimeError, OSError, StoreUnavailableError) as error:
            # No row is lost; a later compaction tries again.
            _log.warning("dataset %s was not compacted: %s", self.dataset, _cause(error))


def table_gone(dataset: str) -> StoreUnavailableError:
    """Error for a table that another program deleted or made again during a call."""
    return StoreUnavailableError(
        f"dataset `{dataset}` was deleted by another program; its rows are gone", field="dataset"
    )


def upload_condition(upload_id: str) -> str:
    """The SQL condition of an upload's rows."""
    return f"starts_with(batch_key, {quoted(f'{upload_id}:')})"


def distinct_keys(dataset: str, table: Any, condition: str | None = None) -> set[str]:
    """The distinct `batch_key`s of a dataset's rows that meet an SQL condition."""
    query = table.search()
    if condition is not None:
        query = query.where(condition)
    keys: set[str] = set()
    with lance_errors(dataset):
        for batch in query.select(["batch_key"]).to_batches(65_536):
            keys.update(batch.column("batch_key").drop_null().unique().to_pylist())
    return keys


@contextlib.contextmanager
def lance_errors(dataset: str) -> Iterator[None]:
    """Context that turns errors of LanceDB and of the disk into a `FletcherError`."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        text = str(error)
        if "contains NaN" in text:
            raise _nan_refused() from error
        if isinstance(error, ValueError) and "Invalid input" in text:
            reason = f"dataset `{dataset}` refuses these rows: {_cause(error)}"
            raise RequestError(reason) from error
        if _GONE.search(text):
            raise table_gone(dataset) from error
        if concerns_store(error) or "StorageFull" in text:
            reason, field = "the disk is full or read-only; free some space", "store"
        else:
            at = _DATA_FILE.search(text)
            reason = f"LanceDB failed{f' on {at[0]}' if at else ''}; see the log"
            field = "dataset"
            _log.error("LanceDB failed on dataset %s", dataset, exc_info=error)
        raise StoreUnavailableError(f"dataset `{dataset}`: {reason}", field=field) from error


def _holds_nan(table: pa.Table, name: str) -> bool:
    """Whether a column that LanceDB takes for vectors holds NaN."""
    if name not in table.schema.names:
        return False
    vectors = table.column(name)
    kind = vectors.type
    if not (types.is_fixed_size_list(kind) and types.is_floating(kind.value_type)):
        return False
    values = (one.flatten().to_numpy(zero_copy_only=False) for one in vectors.chunks)
    return any(bool(np.isnan(one).any()) for one in values)


def _nan_refused() -> RequestError:
    return RequestError(
        "`vector` holds NaN, which no search can compare; send null for a row without a vector",
        field="vector",
    )


def _cause(error: Exception) -> str:
    """First sentence of LanceDB's message; the rest names source files and paths."""
    text = str(error).split(", /", 1)[0].split("\n", 1)[0]
    return text.removeprefix("Invalid input, ")[:500]
