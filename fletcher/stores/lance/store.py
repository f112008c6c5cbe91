"""Embedded store: a folder of LanceDB tables, `PATH/<dataset>.lance`."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from fletcher.core.quantization import pack_signs
from fletcher.errors import ColumnTypeError, InvalidCommandError, StoreError, StoreUnavailableError
from fletcher.stores import filters as conditions
from fletcher.stores.base import DatasetInfo, Filters, Names, Vector, WriteMode
from fletcher.stores.embedded import EmbeddedStore
from fletcher.stores.exact_search import APPROXIMATE, check_query, nearest, unknown_dataset
from fletcher.stores.lance.earlier import EarlierVersions
from fletcher.stores.lance.indexes import CANDIDATES, find_index, num_candidates
from fletcher.stores.lance.library import import_lancedb
from fletcher.stores.lance.new_columns import check_new_columns
from fletcher.stores.lance.pinned import PinnedTable
from fletcher.stores.lance.repair import (
    WholeFiles,
    find_whole_version,
    prepare_table,
    set_torn_versions_aside,
    written_at,
)
from fletcher.stores.lance.scanning import in_batches
from fletcher.stores.lance.synced_folder import SyncedFolder
from fletcher.stores.lance.writer import (
    LanceWriter,
    distinct_keys,
    lance_errors,
    table_gone,
    upload_condition,
)
from fletcher.stores.schemas import check_compatible, new_fields, upload_ranges, wanted_columns
from fletcher.stores.staging import check_stored, incarnation_of, with_incarnation
from fletcher.util.durable import sync_path

_log = logging.getLogger(__name__)

# LanceDB's defaults (6 GiB of index cache, 1 GiB of metadata cache) are more memory than
# `--max-memory` allows.
CACHE_BYTES = 32 << 20

# LanceDB's names of the metrics that it can search by.
METRICS = {"cosine": "cosine", "dot": "dot", "euclidean": "l2", "hamming": "hamming"}


class LanceStore(EmbeddedStore):
    """LanceDB tables in one folder. Thread-safe; other processes may read them.

    Search compares every vector, and is exact. If the table has an index, or vectors of bits,
    LanceDB finds candidates and the exact similarity ranks them. A search of a million rows of 384
    float16 without an index takes about a second on two cores.

    Raises:
        StoreError: LanceDB is not installed, or the folder cannot be created or written.
    """

    scheme = "lance"

    def __init__(self, folder: Path) -> None:
        lancedb = import_lancedb()
        super().__init__(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StoreError(f"the store's folder {folder} cannot be written", field="store")
        session = lancedb.Session(
            index_cache_size_bytes=CACHE_BYTES, metadata_cache_size_bytes=CACHE_BYTES
        )

        def connect(to: Path) -> Any:
            # Commits of other processes are visible at once.
            consistency = dt.timedelta(0)
            return lancedb.connect(str(to), read_consistency_interval=consistency, session=session)

        self._connect = connect
        self._database = connect(folder)
        self._whole: defaultdict[str, WholeFiles] = defaultdict(dict)  # by dataset
        self._replaced: set[str] = set()  # datasets whose old version is to be deleted later
        self._reading = threading.Lock()
        self._earlier = EarlierVersions()

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> LanceWriter:
        """See `Store.open_writer`. Adds columns that the dataset lacks."""
        check_stored(dataset)
        if mode == "upsert" and "id" not in schema.names:
            raise InvalidCommandError(
                "`mode` is upsert, which replaces rows by `id`, and the rows have no `id`; send "
                "one, or append",
                field="mode",
            )
        check_new_columns(schema)
        with ExitStack() as undo:
            with lance_errors(dataset):
                lock = undo.enter_context(self.lock_dataset(dataset))
                self._repair(dataset)
                table = self._open_table(dataset)
                if table is not None:
                    check_compatible(dataset, table.schema, schema)
                    added = new_fields(table.schema, schema)
                    if added:
                        table.add_columns(pa.schema(added))
                else:
                    fields = [field.with_nullable(True) for field in schema]
                    stored = pa.schema(fields, metadata=schema.metadata)
                    stored = with_incarnation(dataset, stored)
                    prepare_table(self.dataset_folder(dataset))
                    table = self._database.create_table(dataset, schema=stored)
                pinned = PinnedTable(self.dataset_folder(dataset), self._connect)
                undo.callback(pinned.close)
                if not pinned.table.schema.equals(table.schema, check_metadata=True):
                    raise table_gone(dataset)
                writer = LanceWriter(self, dataset, lock, pinned, mode)
                undo.callback(writer.close)
                writer.old_versions_left = dataset in self._replaced
            self._replaced.discard(dataset)
            undo.pop_all()
        return writer

    def open_maintainer(self, dataset: str) -> LanceWriter:
        """Open an existing dataset for an index or a compaction, as its only writer.

        Raises:
            UnknownDatasetError: The dataset does not exist.
            StoreUnavailableError: The dataset has another writer, or is damaged.
        """
        self._table(dataset)
        with ExitStack() as undo, lance_errors(dataset):
            lock = undo.enter_context(self.lock_dataset(dataset))
            self._repair(dataset)
            self._table(dataset)
            pinned = PinnedTable(self.dataset_folder(dataset), self._connect)
            undo.callback(pinned.close)
            writer = LanceWriter(self, dataset, lock, pinned, "append")
            undo.pop_all()
        return writer

    def dataset_folder(self, name: str) -> Path:
        return self.folder / f"{name}.lance"

    def dataset_names(self) -> Iterator[str]:
        return (path.stem for path in self.folder.glob("*.lance") if path.is_dir())

    def dataset(self, name: str) -> DatasetInfo | None:
        check_stored(name)
        with lance_errors(name):
            table = self._open_table(name)
            if table is None:
                return None
            size, rows = int(table.stats()["total_bytes"]), int(table.count_rows())
            index = find_index(table, self.dataset_folder(name))
            return DatasetInfo(
                *(name, table.schema, rows, size),
                num_indexed=None if index is None else index.num_rows,
                index=None if index is None else index.kind,
                written_at=written_at(self.dataset_folder(name)),
            )

    def read_schema(self, name: str) -> pa.Schema | None:
        check_stored(name)
        with lance_errors(name):
            table = self._open_table(name)
            return None if table is None else table.schema

    def replace_dataset(self, name: str, staged: str) -> None:
        """See `Store.replace_dataset`. Copies the rows, in one commit.

        Readers of the old version keep their files for a while, as with any commit. A dataset that
        does not exist yet gets the files themselves.
        """
        with self.lock_dataset(name), self.locked_to_its_end(staged), lance_errors(name):
            self._repair(staged)
            new = self._open_table(staged)
            if new is None:
                raise unknown_dataset(staged)
            old = None
            with contextlib.suppress(StoreUnavailableError):  # it is damaged
                self._repair(name)
                old = self.incarnation(name)
            folder = self.dataset_folder(name)
            if not folder.exists():
                self._synced(staged).sync_new_files(settled=True)
                self.dataset_folder(staged).rename(folder)
                self._whole.pop(staged, None)
                sync_path(self.folder)
                return
            if old is None or old != incarnation_of(new.schema):
                rows = in_batches(new.search(), new.schema)
                mode = "overwrite" if any((folder / "_versions").glob("*.manifest")) else "create"
                if mode == "create":
                    prepare_table(folder)
                self._database.create_table(
                    # Null vectors are no bad vectors here, and the staged dataset has no NaN.
                    name,
                    data=rows,
                    schema=new.schema,
                    mode=mode,
                    on_bad_vectors="null",
                )
                self._synced(name).sync_new_files(settled=True)
                self.known_whole.add(name)
                self._replaced.add(name)
            self._drop(staged)

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        check_stored(dataset)
        with lance_errors(dataset):
            table = self._open_table(dataset)
            if table is None or "batch_key" not in table.schema.names:
                return []
            keys = distinct_keys(dataset, table, upload_condition(upload_id))
        return upload_ranges(keys, upload_id)

    def scan(
        self, name: str, *, columns: Names = None, filters: Filters = (), limit: int | None = None
    ) -> pa.RecordBatchReader:
        with lance_errors(name):
            table = self._table(name)
            wanted = wanted_columns(name, table.schema, columns)
            query = _filtered(name, table, table.search(), filters).select(wanted)
            if limit is not None:
                query = query.limit(limit)
            rows = in_batches(query, table.schema)
        return pa.RecordBatchReader.from_batches(rows.schema, _read_batches(name, rows))

    def search(
        self,
        dataset: str,
        vector: Vector,
        *,
        k: int,
        columns: Names = None,
        filters: Filters = (),
        metric: str | None = None,
    ) -> pa.Table:
        """See `Store.search`.

        `metric` replaces the dataset's similarity, for single vectors.
        """
        with lance_errors(dataset):
            table = self._table(dataset)
            scores = check_query(dataset, table.schema, vector, k, metric=metric)
            wanted = wanted_columns(dataset, table.schema, columns)
            read = list(dict.fromkeys([*wanted, *scores.columns]))
            similarity = scores.similarity
            distance = None  # LanceDB's metric; None if LanceDB cannot search such vectors
            if similarity.output == "dense" and similarity.reader is not None:
                dtype = similarity.reader.dtype
                distance = METRICS.get("hamming" if dtype == "ubinary" else similarity.metric)
                distance = None if dtype == "int8" else distance
            if distance is None:
                rows = self.scan(dataset, columns=read, filters=filters)
                return nearest(rows, scores, k=k, columns=wanted)
            query = pack_signs(scores.query) if distance == "hamming" else scores.query
            search = table.search(query, vector_column_name="vector").distance_type(distance)
            found = _filtered(dataset, table, search, filters).select([*read, "_distance"])
            # An index ranks by the dataset's similarity.
            index = find_index(table, self.dataset_folder(dataset)) if metric is None else None
            best = None
            if index is not None:
                rows = index.applied_to(found).limit(index.limit(k))
                try:
                    best = nearest(in_batches(rows, table.schema), scores, k=k, columns=wanted)
                except (ValueError, RuntimeError, OSError) as error:
                    _log.warning("dataset %s is searched without its index: %s", dataset, error)
                    index = None
            if best is None:
                limit = k if distance != "hamming" else num_candidates(k, CANDIDATES)
                rows = found.bypass_vector_index().limit(limit)
                best = nearest(in_batches(rows, table.schema), scores, k=k, columns=wanted)
        if distance != "hamming" and index is None:
            return best
        return best.replace_schema_metadata({**(best.schema.metadata or {}), APPROXIMATE: b"true"})

    def delete_upload(self, dataset: str, upload_id: str) -> int:
        schema = self.read_schema(dataset)
        if schema is None:
            return 0
        with closing(self.open_writer(dataset, schema, "append")) as writer:
            return writer.delete_upload(upload_id)

    def delete_dataset(self, name: str) -> None:
        check_stored(name)
        with self.locked_to_its_end(name), lance_errors(name):
            try:
                known = self._open_table(name) is not None
            except StoreUnavailableError:  # it is damaged
                known = True
            if not known:
                raise unknown_dataset(name)
            self._drop(name)

    def close(self) -> None:
        super().close()
        with self._reading:
            self._earlier.close()

    def _drop(self, name: str) -> None:
        """Delete a table. A crash midway may leave files, but never a damaged table."""
        folder = self.dataset_folder(name)
        with contextlib.suppress(FileNotFoundError):
            (folder / "_versions").rename(folder / "_versions.deleted")
        shutil.rmtree(folder)
        self.known_whole.discard(name)
        self._whole.pop(name, None)
        sync_path(self.folder)

    def _repair(self, name: str) -> None:
        """Set incomplete versions aside; the caller holds the lock.

        The files are looked for at each call, because another program may have deleted some of them
        or made the table anew. Those that changed since the last call are read.
        """
        self.known_whole.discard(name)
        with lance_errors(name):
            set_torn_versions_aside(self.dataset_folder(name), self._whole[name])
        self.known_whole.add(name)

    def _synced(self, name: str) -> SyncedFolder:
        return SyncedFolder(self.dataset_folder(name), self.known_whole)

    def _open_table(self, name: str) -> Any | None:
        """A table at its newest complete version; None if it does not exist.

        Raises:
            InvalidCommandError: Fletcher did not write the table.
            StoreUnavailableError: The table is damaged.
        """
        folder = self.dataset_folder(name)
        # A table without a manifest is being created, or its creator died.
        if not any((folder / "_versions").glob("*.manifest")):
            return None
        database = self._database
        with lance_errors(name):
            if name not in self.known_whole:
                manifest, torn = find_whole_version(folder)
                if manifest is None:
                    return None
                if torn:
                    _log.warning("%s; reading an earlier version of dataset %s", torn[0][1], name)
                    with self._reading:
                        database = self._connect(self._earlier.folder_of(manifest))
                else:
                    self.known_whole.add(name)
            table = database.open_table(name)
            if not _is_dataset(table.schema):
                raise InvalidCommandError(
                    f"`{name}` is a LanceDB table that Fletcher did not write; choose another name",
                    field="dataset",
                )
            return table

    def _table(self, name: str) -> Any:
        check_stored(name)
        table = self._open_table(name)
        if table is None:
            raise unknown_dataset(name)
        return table


def _is_dataset(schema: pa.Schema) -> bool:
    """Whether Fletcher wrote the table, or may write to it: it has ids and vectors."""
    written = any(key.startswith(b"fletcher.") for key in schema.metadata or ())
    return written or {"id", "vector"} <= set(schema.names)


def _read_batches(dataset: str, rows: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with lance_errors(dataset):
        yield from rows


def _filtered(dataset: str, table: Any, query: Any, filters: Filters) -> Any:
    """The query of a table, limited to rows that meet the filters."""
    condition = conditions.to_sql(dataset, table.schema, filters)
    if condition is None:
        return query
    try:
        # LanceDB checks only here whether it understands the condition.
        table.search().where(condition).select([]).limit(1).explain_plan()
    except ValueError as error:
        raise ColumnTypeError(
            "LanceDB cannot run this filter; filter by other columns, or with other values",
            field="filter",
        ) from error
    return query.where(condition)
