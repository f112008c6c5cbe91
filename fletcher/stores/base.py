"""Interface of a vector store.

Batches have the columns of `core.schema.output_schema`. `batch_key` names the group in which a row
was sent: `upload_id:first-last`. Both offsets are inclusive, and a group's key is unique within a
dataset.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.stores.staging import incarnation_of

WriteMode = Literal["append", "upsert"]
Operator = Literal["=", "!=", ">", "<", ">=", "<=", "in", "is null"]
Vector = npt.NDArray[np.float32]
Names = Sequence[str] | None


@dataclass(frozen=True, slots=True)
class StoreCapabilities:
    """Capabilities of a store.

    Attributes:
        dtypes: Element types of `vector` that are stored and searched.
        null_vectors: Rows with a null vector are stored; otherwise they are not sent.
        upsert: Rows can be replaced by id.
        drops_repeated_keys: The store recognises a group sent again under its `batch_key`.
        durable: Rows survive a crash of the store's process once `append` has returned.
        counts_groups: A group counts as stored if the store has as many of its rows as the key
            says. The store therefore cannot confirm a group of which some rows were not sent.
        outputs: Kinds of `vector` that are stored and searched, as in VectorSpec.
        overwrite: A dataset can be replaced for good.
        nanosecond_times: All times are kept in nanoseconds, so only those from 1677 to 2262.
        deletes_uploads: The rows of one upload can be deleted for good.
        index_lags: The store's own searches find rows only some time after they were stored.
    """

    dtypes: tuple[str, ...]
    null_vectors: bool
    upsert: bool
    drops_repeated_keys: bool
    durable: bool
    counts_groups: bool = False
    outputs: tuple[str, ...] = ("dense",)
    overwrite: bool = True
    nanosecond_times: bool = False
    index_lags: bool = False
    deletes_uploads: bool = True


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """A stored dataset. A number is None if the store does not tell it.

    Attributes:
        schema: Schema of the rows, with the metadata of `fletcher.core.schema`.
        num_rows: Number of stored rows.
        num_bytes: Size of the stored rows.
        num_indexed: Number of rows that the store's index has, for a store that indexes rows some
            time after it stored them.
        is_indexing: Whether such a store says that it is indexing rows.
        index: Type of the index on the vectors; None: no index, or unknown.
        written_at: Time of the last write to the dataset.
    """

    name: str
    schema: pa.Schema
    num_rows: int | None
    num_bytes: int | None = None
    num_indexed: int | None = None
    is_indexing: bool = False
    index: str | None = None
    written_at: dt.datetime | None = None


def total_rows(infos: Iterable[DatasetInfo]) -> int | None:
    """Number of rows of several datasets; None if that of one is unknown."""
    total = 0
    for info in infos:
        if info.num_rows is None:
            return None
        total += info.num_rows
    return total


@dataclass(frozen=True, slots=True)
class Comparison:
    """A condition on one column; for a null it is unknown, as in SQL.

    Attributes:
        field: Name of the column.
        operator: Comparison, or `in` for a list of values, or `is null`.
        value: A value of the column's type; times, dates and decimals may be text (ISO 8601).
            A list of values for `in`. None with `=` and `!=` asks for nulls and for other values.
    """

    field: str
    operator: Operator
    value: Any = None


@dataclass(frozen=True, slots=True)
class Negation:
    """A condition that is met where another one is false, not unknown."""

    condition: Filter


@dataclass(frozen=True, slots=True)
class Combination:
    """Conditions of which all (`and`) or one (`or`) must be met; at least one."""

    logic: Literal["and", "or"]
    conditions: tuple[Filter, ...]


# All filters of a sequence must be met. `fletcher.stores.filter_parser` reads them from text.
Filter = Comparison | Negation | Combination
Filters = Sequence[Filter]


class Unconfirmed(Protocol):
    """Rows that a store acknowledged, but may still lose. Not thread-safe.

    Attributes:
        ready_at: Time from which `confirm` does not have to wait (`time.monotonic`).
    """

    ready_at: float

    def confirm(self) -> None:
        """Wait until the store cannot lose the rows any more. May be called once.

        Raises:
            StoreUnavailableError: The rows may or may not be stored, as after `append`.
        """


@dataclass(frozen=True, slots=True)
class Appended:
    """Rows that a store acknowledged.

    Attributes:
        slow_down: The store asks for a pause.
        unconfirmed: The rows, if the store may still lose them.
    """

    slow_down: bool = False
    unconfirmed: Unconfirmed | None = None


class DatasetWriter(Protocol):
    """The only writer of a dataset. Not thread-safe: one thread owns it."""

    def append(self, batches: Sequence[pa.RecordBatch]) -> Appended:
        """Store all rows of all batches, or none.

        Raises:
            StoreUnavailableError: The rows may or may not be stored; ask `missing_keys`, then
                retry.
            OverloadedError: As StoreUnavailableError; retry with fewer rows.
            RequestError: The store refuses these rows; a retry does not help.
        """

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        """The keys among `batch_keys` that are not stored, in the same order."""

    def close(self) -> None:
        """Release the dataset (lock, connection). Idempotent."""


class Store(Protocol):
    """A vector store at one address. Thread-safe, except for its writers."""

    address: str

    @property
    def capabilities(self) -> StoreCapabilities:
        """Capabilities of the store; a remote store is asked on first use.

        Raises:
            StoreUnavailableError: The store does not answer.
        """

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> DatasetWriter:
        """Open a dataset for rows of `schema`; create it if it does not exist.

        With `mode="upsert"`, every `append` replaces rows of the same id.

        Raises:
            ModelMismatchError, DimensionMismatchError, ColumnTypeError: The dataset has vectors of
                another model or width, or a column of another type.
            StoreUnavailableError: The store does not answer, or the dataset has another writer.
        """

    def datasets(self) -> list[DatasetInfo]:
        """All datasets, sorted by name."""

    def dataset(self, name: str) -> DatasetInfo | None:
        """One dataset; None if it does not exist."""

    def read_schema(self, name: str) -> pa.Schema | None:
        """A dataset's schema; None if it does not exist.

        `dataset` also finds the number of rows, which takes some stores many calls.
        """

    def incarnation(self, name: str) -> str | None:
        """Name of a dataset's incarnation (`stores.staging`); None if it is missing."""
        schema = self.read_schema(name)
        return None if schema is None else incarnation_of(schema)

    def staged_datasets(self) -> list[DatasetInfo]:
        """Staged datasets of unfinished uploads with `mode: overwrite`, sorted by name."""

    def replace_dataset(self, name: str, staged: str) -> None:
        """Replace a dataset by a staged dataset, and delete that one.

        The dataset is created if it does not exist. Readers see the old rows until all new ones
        are there. After an error the call may be repeated. Neither dataset has a writer.

        Raises:
            UnknownDatasetError: The staged dataset does not exist.
            StoreUnavailableError: The store does not answer, or a dataset has a writer.
        """

    def delete_upload(self, dataset: str, upload_id: str) -> int:
        """Delete the rows of an upload, and return their number; 0 if there are none.

        After an error, a part may be deleted, and the call may be repeated. The dataset has no
        writer.

        Raises:
            UnsupportedCallError: The store cannot delete rows for good.
            StoreUnavailableError: The store does not answer, or the dataset has a writer.
        """

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        """Stored row offsets of an upload: inclusive (first, last), sorted, merged."""

    def scan(
        self, name: str, *, columns: Names = None, filters: Filters = (), limit: int | None = None
    ) -> pa.RecordBatchReader:
        """Rows of a dataset as a stream.

        Args:
            columns: Columns to return; None: all of the dataset's.
            filters: Conditions that a row must meet.
            limit: Maximum number of rows; None: all.

        Raises:
            UnknownDatasetError, UnknownColumnError.
        """

    def search(
        self, dataset: str, vector: Vector, *, k: int, columns: Names = None, filters: Filters = ()
    ) -> pa.Table:
        """The k rows nearest to a query by the dataset's similarity; best first.

        `vector` is a query of `core.similarity.Similarity`: float32 [dims] for one vector per row.

        Returns:
            Table with `columns`, chosen as in `scan`, and the exact similarity as `score`, float32.
            `exact_search.APPROXIMATE` in the metadata says that rows were compared approximately
            first, so that better rows may be missing.

        Raises:
            UnknownDatasetError, UnknownColumnError, DimensionMismatchError.
        """

    def delete_dataset(self, name: str) -> None:
        """Delete a dataset. Raises UnknownDatasetError."""

    def close(self) -> None:
        """Close writers and connections. Idempotent."""
