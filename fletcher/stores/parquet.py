"""Embedded store of Parquet files: a folder per dataset, and a file per group."""

from __future__ import annotations

import datetime as dt
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from fletcher.core.schema import parse_batch_key
from fletcher.errors import ColumnTypeError, RequestError, StoreUnavailableError
from fletcher.stores import filters as conditions
from fletcher.stores.base import Appended, DatasetInfo, Filters, Names, Vector, WriteMode
from fletcher.stores.embedded import EmbeddedStore, EmbeddedWriter, concerns_store
from fletcher.stores.exact_search import check_query, existing_schema, nearest, unknown_dataset
from fletcher.stores.schemas import (
    check_compatible,
    check_storable,
    conform_batch,
    limit_rows,
    new_fields,
    upload_ranges,
    wanted_columns,
)
from fletcher.stores.staging import check_stored, staged_for, with_incarnation
from fletcher.util.durable import atomic_path, sync_path, write_atomically
from fletcher.util.locks import FileLock

# File of the dataset's schema, under the name that Parquet readers expect.
_SCHEMA_FILE = "_common_metadata"
_SUFFIX = ".parquet"
# Group keys that may name files. The name has `~` instead of `:`, which Windows and Hadoop do not
# allow in names. Names of earlier releases have the `:`.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
# File that is written when a column is added. It has all columns and no rows. Its name sorts first,
# because some programs take the columns from the first file, and older files lack the new column.
_COLUMNS_FILE = f"+columns{_SUFFIX}"
# File beside the datasets that names the folder of a dataset while it is replaced.
_POINTER = ".current"


class ParquetStore(EmbeddedStore):
    """Folders of Parquet files, one file per group.

    A group's file is named after its key, so storing the group again changes nothing. Search
    compares every vector with numpy, which suits tens of thousands of rows.
    """

    scheme = "parquet"
    capabilities = replace(EmbeddedStore.capabilities, upsert=False, drops_repeated_keys=True)

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> ParquetWriter:
        check_stored(dataset)
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
        schema = _as_stored(schema)
        folder = self.folder / dataset
        with ExitStack() as undo:
            with _disk_errors(dataset):
                lock = undo.enter_context(self.lock_dataset(dataset))
                self._finish_replacement(dataset)
                folder.mkdir(exist_ok=True)
                for leftover in folder.glob(".*.tmp"):  # of a killed writer
                    leftover.unlink()
                if (folder / _SCHEMA_FILE).exists():
                    stored = pq.read_schema(folder / _SCHEMA_FILE)
                    check_compatible(dataset, stored, schema)
                    added = new_fields(stored, schema)
                    if added:
                        stored = pa.schema([*stored, *added], metadata=stored.metadata)
                        with atomic_path(folder / _COLUMNS_FILE) as temporary:
                            pq.write_table(stored.empty_table(), temporary)
                        _write_schema(folder, stored)
                else:
                    stored = with_incarnation(dataset, schema)
                    _write_schema(folder, stored)
                # Sync the files found here, as they count as stored: their writer may have died
                # before its sync.
                sync_path(folder)
                sync_path(self.folder)
                writer = ParquetWriter(self, dataset, lock, schema=stored)
                undo.callback(writer.close)
            undo.pop_all()
        return writer

    def dataset_folder(self, name: str) -> Path:
        return self.folder / name

    def dataset_names(self) -> Iterator[str]:
        # While a dataset is replaced, only its pointer may be there.
        pointed = (
            path.name[1:].removesuffix(_POINTER) for path in self.folder.glob(f".*{_POINTER}")
        )
        found = (path.parent.name for path in self.folder.glob(f"*/{_SCHEMA_FILE}"))
        return iter({name for name in (*found, *pointed) if not name.startswith(".")})

    def dataset(self, name: str) -> DatasetInfo | None:
        schema = self.read_schema(name)
        if schema is None:
            return None
        with self._named_damage(name):
            files = self._files(name)
            num_rows = sum(pq.read_metadata(path).num_rows for path in files)
            sizes = [path.stat() for path in (*files, self._current(name) / _SCHEMA_FILE)]
            num_bytes = sum(one.st_size for one in sizes[:-1])
            written_at = dt.datetime.fromtimestamp(max(one.st_mtime for one in sizes), dt.UTC)
        return DatasetInfo(name, schema, num_rows, num_bytes, written_at=written_at)

    def read_schema(self, name: str) -> pa.Schema | None:
        check_stored(name)
        with self._named_damage(name):
            try:
                return pq.read_schema(self._current(name) / _SCHEMA_FILE)
            except FileNotFoundError:
                return None

    def replace_dataset(self, name: str, staged: str) -> None:
        """See `Store.replace_dataset`.

        A pointer file names the staged folder. From then on it is the dataset, while the folders
        are renamed. Whoever opens the dataset for writing next finishes an interrupted replacement.
        """
        with self.lock_dataset(name), self.locked_to_its_end(staged), _disk_errors(name):
            if self._current(name) == self.folder / name:  # else it was interrupted
                if self.read_schema(staged) is None:
                    raise unknown_dataset(staged)
                sync_path(self.folder / staged)
                write_atomically(self._pointer(name), staged)
            self._finish_replacement(name)

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        check_stored(dataset)
        return upload_ranges(map(_key_of, self._files(dataset)), upload_id)

    def scan(
        self, name: str, *, columns: Names = None, filters: Filters = (), limit: int | None = None
    ) -> pa.RecordBatchReader:
        """See `Store.scan`. Rows are sorted by batch key."""
        schema = self._schema(name)
        wanted = wanted_columns(name, schema, columns)
        condition = conditions.to_expression(name, schema, filters)
        with self._named_damage(name):
            files = [str(path) for path in self._files(name)]
            rows = ds.dataset(files, schema=schema, format="parquet").scanner(
                columns=wanted, filter=condition, batch_size=8192
            )
        out = pa.schema([schema.field(name) for name in wanted], metadata=schema.metadata)

        def batches() -> Iterator[pa.RecordBatch]:
            with self._named_damage(name):
                yield from limit_rows(rows.to_batches(), out, limit)

        return pa.RecordBatchReader.from_batches(out, batches())

    def search(
        self, dataset: str, vector: Vector, *, k: int, columns: Names = None, filters: Filters = ()
    ) -> pa.Table:
        schema = self._schema(dataset)
        scores = check_query(dataset, schema, vector, k)
        wanted = wanted_columns(dataset, schema, columns)
        read = list(dict.fromkeys([*wanted, *scores.columns]))
        rows = self.scan(dataset, columns=read, filters=filters)
        return nearest(rows, scores, k=k, columns=wanted)

    def delete_upload(self, dataset: str, upload_id: str) -> int:
        check_stored(dataset)
        with self.lock_dataset(dataset), _disk_errors(dataset):
            self._finish_replacement(dataset)
            files = [one for one in self._files(dataset) if _is_of(_key_of(one), upload_id)]
            num_rows: int = sum(pq.read_metadata(path).num_rows for path in files)
            for path in files:
                path.unlink()
            if files:
                sync_path(self.folder / dataset)
        return num_rows

    def delete_dataset(self, name: str) -> None:
        check_stored(name)
        with self.locked_to_its_end(name), _disk_errors(name):
            self._finish_replacement(name)
            self._schema(name)
            shutil.rmtree(self.folder / name)
            sync_path(self.folder)

    @contextmanager
    def _named_damage(self, dataset: str) -> Iterator[None]:
        """Context for reads, in which an error about a damaged file names the file.

        Raises:
            StoreUnavailableError: A file is damaged, or cannot be read now.
        """
        with _disk_errors(dataset):
            try:
                yield
            except pa.ArrowInvalid as error:
                paths = [self._current(dataset) / _SCHEMA_FILE, *self._files(dataset)]
                name = next((path.name for path in paths if not _is_whole(path)), "a file")
                raise StoreUnavailableError(
                    f"dataset `{dataset}` cannot be read: {name} is damaged; put that file back, "
                    "or delete the dataset",
                    field="dataset",
                ) from error

    def _files(self, dataset: str) -> list[Path]:
        files = self._current(dataset).glob(f"*{_SUFFIX}")
        return sorted((one for one in files if one.name != _COLUMNS_FILE), key=_key_of)

    def _schema(self, dataset: str) -> pa.Schema:
        return existing_schema(self, dataset)

    def _pointer(self, dataset: str) -> Path:
        return self.folder / f".{dataset}{_POINTER}"

    def _current(self, dataset: str) -> Path:
        """Folder of a dataset: its own, or the one that its pointer names."""
        try:
            staged = self._pointer(dataset).read_text()
        except FileNotFoundError:
            return self.folder / dataset
        there = staged_for(staged) == dataset and (self.folder / staged).exists()
        return self.folder / (staged if there else dataset)

    def _finish_replacement(self, dataset: str) -> None:
        """Rename the folder that the pointer names. The caller holds the dataset's lock."""
        pointer, folder = self._pointer(dataset), self.folder / dataset
        replaced = self.folder / f".{dataset}.replaced"
        if pointer.exists():
            current = self._current(dataset)
            if current != folder:
                if folder.exists():
                    shutil.rmtree(replaced, ignore_errors=True)
                    folder.rename(replaced)
                current.rename(folder)
                sync_path(self.folder)
            pointer.unlink()
            sync_path(self.folder)
        if replaced.exists():
            shutil.rmtree(replaced, ignore_errors=True)


class ParquetWriter(EmbeddedWriter):
    """The only writer of a dataset's Parquet files. One thread owns it."""

    def __init__(
        self, store: ParquetStore, dataset: str, lock: FileLock, *, schema: pa.Schema
    ) -> None:
        self._folder = store.folder / dataset
        self._schema = schema
        super().__init__(store, dataset, lock)

    def append(self, batches: Sequence[pa.RecordBatch]) -> Appended:
        """Write one file for each batch key that has no file yet.

        A crash leaves no incomplete file.

        Raises:
            StoreUnavailableError: A file could not be written; files of earlier keys may exist.
            ColumnTypeError: A row has no `batch_key`, or a column has another type.
        """
        assert self.is_open, "append after close"
        for batch in batches:
            check_compatible(self.dataset, self._schema, _as_stored(batch.schema))
            if "batch_key" not in batch.schema.names or batch.column("batch_key").null_count:
                raise ColumnTypeError("`batch_key` is missing in some rows", field="batch_key")
        rows = [conform_batch(batch, self._schema) for batch in batches if batch.num_rows]
        table = pa.Table.from_batches(rows, self._schema)
        keys = table.column("batch_key").unique().to_pylist()
        for key in self.missing_keys(keys):
            group = table.filter(pc.equal(table.column("batch_key"), key)) if keys[1:] else table
            with _disk_errors(self.dataset), atomic_path(self._path(key)) as temporary:
                pq.write_table(group, temporary)
        return Appended()

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        return [key for key in batch_keys if not self._is_stored(key)]

    def _is_stored(self, key: str) -> bool:
        names = (key.replace(":", "~"), key)  # earlier releases kept the `:`
        files = (self._folder / f"{name}{_SUFFIX}" for name in names)
        return "~" not in key and any(path.exists() for path in files)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ColumnTypeError(
                f"`batch_key` is {key[:200]!r}, which cannot be a file's name; expected "
                "upload_id:first-last, with 1 to 200 letters, digits and `_.-`",
                field="batch_key",
            )
        return self._folder / f"{key.replace(':', '~')}{_SUFFIX}"


def _key_of(path: Path) -> str:
    """The batch key that a file is named after."""
    return path.stem.replace("~", ":")


def _is_of(key: str, upload_id: str) -> bool:
    parsed = parse_batch_key(key)
    return parsed is not None and parsed[0] == upload_id


def _is_whole(path: Path) -> bool:
    try:
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches(8192):
                pass
    except pa.ArrowInvalid:
        return False
    return True


@lru_cache
def _as_stored(schema: pa.Schema) -> pa.Schema:
    """The schema as Parquet gives it back: it has no seconds, for example.

    Raises:
        ColumnTypeError: Parquet cannot store a type.
    """
    fields = []
    for field in schema:
        file = io.BytesIO()
        try:
            pq.write_metadata(pa.schema([field]), file)
        except (pa.ArrowException, OSError):
            raise ColumnTypeError(
                f"`{field.name[:200]}` is {str(field.type)[:200]}, which Parquet files cannot "
                "hold; send another type, or use a `lance:` store",
                field=field.name[:200],
            ) from None
        file.seek(0)
        fields.append(pq.read_schema(file).field(0).with_nullable(field.nullable))
    return pa.schema(fields, metadata=schema.metadata)


def _write_schema(folder: Path, schema: pa.Schema) -> None:
    with atomic_path(folder / _SCHEMA_FILE) as temporary:
        pq.write_metadata(schema, temporary)


@contextmanager
def _disk_errors(dataset: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        code = getattr(error, "errno", None)
        cause = os.strerror(code) if code else "one of its files is not a whole Parquet file"
        if isinstance(error, FileNotFoundError):  # Arrow gives it no number
            cause = "a file went away, as if the dataset is being replaced; try again"
        raise StoreUnavailableError(
            f"dataset `{dataset}` cannot be read or written: {cause}",
            field="store" if concerns_store(error) else "dataset",
        ) from error
