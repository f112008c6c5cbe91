"""What Fletcher asks of a vector store, and nothing more.

Output batches have the columns of `core.schema.output_schema`; `batch_key` names the group a row
was sent in: `upload_id:first-last`, both offsets inclusive, unique within a dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

WriteMode = Literal["append", "upsert", "overwrite"]
Operator = Literal["=", "!=", ">", "<", ">=", "<="]


@dataclass(frozen=True, slots=True)
class StoreCapabilities:
    """What a store can do.

    Attributes:
        dtypes: Element types of `vector` that it stores and searches.
        null_vectors: Rows with a null vector are stored; else they are not sent.
        upsert: It can replace rows by id.
        drops_repeated_keys: A group sent again under its `batch_key` is recognised by the store.
        durable: What `append` returned for survives a crash of the store's process.
        counts_groups: It holds a group if it has as many rows of it as its key says: it cannot tell
            of one whose rows it did not all get.
        outputs: What `vector` may be, as in VectorSpec; all but dense ones are stored and not
            searched.
    """

    dtypes: tuple[str, ...]
    null_vectors: bool
    upsert: bool
    drops_repeated_keys: bool
    durable: bool
    counts_groups: bool = False
    outputs: tuple[str, ...] = ("dense",)


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """A dataset as the store has it. `schema` includes the metadata of `fletcher.core.schema`."""

    name: str
    schema: pa.Schema
    num_rows: int
    num_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on one column; `logic` joins it to the one before it."""

    field: str
    operator: Operator
    value: Any
    logic: Literal["and", "or"] = "and"
    filters: tuple[Filter, ...] = ()


class DatasetWriter(Protocol):
    """The one writer of a dataset in this process. Not thread-safe: one thread owns it."""

    def append(self, batches: Sequence[pa.RecordBatch]) -> bool:
        """Stores all rows of all batches or none.

        Returns:
            Whether the store asks to slow down.

        Raises:
            StoreUnavailableError: Nothing is known to be stored; ask `missing_keys`, then retry.
            OverloadedError: The same, and send less at once.
            RequestError: The store refuses these rows for good.
        """
        ...

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        """Those of `batch_keys` that the store does not hold, in their order."""
        ...

    def close(self) -> None:
        """Lets the dataset go (lock, connection). Idempotent."""
        ...


class Store(Protocol):
    """A vector store at one address. Thread-safe, but for the writers it hands out."""

    address: str

    @property
    def capabilities(self) -> StoreCapabilities:
        """What it can do. A remote store is asked the first time.

        Raises:
            StoreUnavailableError: The store does not answer.
        """
        ...

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> DatasetWriter:
        """Prepares to write rows of `schema`, creating the dataset if it is not there.

        `mode="overwrite"` empties an existing dataset first; `mode="upsert"` makes every `append`
        replace rows of the same id.

        Raises:
            ModelMismatchError, DimensionMismatchError, ColumnTypeError: The dataset holds vectors
                of another model, another width, or a column of another type.
            StoreUnavailableError: The store does not answer, or another process writes to it.
        """
        ...

    def datasets(self) -> list[DatasetInfo]:
        """All datasets, by name."""
        ...

    def dataset(self, name: str) -> DatasetInfo | None:
        """One dataset; None where it does not exist."""
        ...

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        """Row offsets of an upload that are stored: inclusive (first, last), sorted, merged."""
        ...

    def scan(
        self,
        dataset: str,
        *,
        columns: Sequence[str] | None = None,
        filters: Sequence[Filter] = (),
        limit: int | None = None,
    ) -> pa.RecordBatchReader:
        """Rows of a dataset.

        Raises:
            UnknownDatasetError, UnknownColumnError.
        """
        ...

    def search(
        self,
        dataset: str,
        vector: npt.NDArray[np.float32],
        *,
        k: int,
        columns: Sequence[str] | None = None,
        filters: Sequence[Filter] = (),
    ) -> pa.Table:
        """The k nearest rows by cosine, best first: the asked columns and `score` float32.

        Args:
            vector: float32 [dim].

        Raises:
            UnknownDatasetError, UnknownColumnError, DimensionMismatchError.
        """
        ...

    def delete_dataset(self, name: str) -> None:
        """Removes a dataset. Raises UnknownDatasetError."""
        ...

    def close(self) -> None:
        """Closes writers and connections. Idempotent."""
        ...
