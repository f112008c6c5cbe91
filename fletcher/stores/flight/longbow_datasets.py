"""Descriptions of a Longbow's datasets, as far as its answers tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
import pyarrow as pa

from fletcher.errors import FletcherError, UnknownDatasetError
from fletcher.stores.base import DatasetInfo
from fletcher.stores.flight.connection import FlightConnection

_Answer = TypeVar("_Answer")

# No dataset has more rows.
_MAX_ROWS = 1 << 62


class Readiness(msgspec.Struct):
    """Answer of the action `check_readiness`."""

    status: str
    index_len: int | None = None


class LongbowDatasets:
    """Descriptions of a Longbow's datasets. Thread-safe."""

    def __init__(self, connection: FlightConnection) -> None:
        self._connection = connection
        self._last_counts: dict[str, int] = {}

    def describe_all(self) -> list[DatasetInfo]:
        """All datasets with rows, sorted by name.

        Raises:
            FletcherError: The store does not answer.
        """
        found = map(self.describe_dataset, self._connection.list_names(b""))
        return [info for info in found if info is not None]

    def describe_dataset(self, name: str) -> DatasetInfo | None:
        """A dataset; None if it has no rows, as no call tells its schema then.

        Raises:
            FletcherError: The store does not answer.
        """
        schema = self.read_schema(name)
        if schema is None:
            return None
        ready = _told(lambda: self._read_readiness(name))
        return DatasetInfo(
            name,
            schema,
            num_rows=self.count_rows(name),
            num_bytes=_told(lambda: self._connection.read_size(name)[1]),
            num_indexed=None if ready is None else ready.index_len,
            is_indexing=ready is not None and ready.status != "READY",
        )

    def count_rows(self, name: str) -> int | None:
        """Number of a dataset's rows; None if the store does not tell it."""
        return _told(lambda: self._count_rows(name))

    def read_schema(self, name: str) -> pa.Schema | None:
        """The schema of a dataset's first rows; None if there are none."""
        try:
            return self._connection.read_schema(name)
        except UnknownDatasetError:
            return None

    def _read_readiness(self, name: str) -> Readiness:
        return self._connection.ask("check_readiness", {"dataset": name}, Readiness)

    def _count_rows(self, name: str) -> int | None:
        """Number of a dataset's rows; None if the store does not tell it.

        Longbow tells the number of a dataset's batches, never that of its rows. But it lists the
        datasets with more than a given number of rows, so a search by halves finds the number. That
        takes about 2 * log2(rows) calls, and four if the number is that of the last time. Rows that
        were deleted by their id count, too: Longbow keeps them.
        """

        def exceeds(number: int) -> bool:
            conditions = [
                {"field": "name", "operator": "contains", "value": name},
                {"field": "rows", "operator": ">", "value": str(number)},
            ]
            return name in self._connection.list_names(msgspec.json.encode({"filters": conditions}))

        if exceeds(_MAX_ROWS) or not exceeds(-1):  # it lists all datasets, or not this one
            return None
        found = self._last_counts[name] = _find_count(exceeds, self._last_counts.get(name, 0))
        return found


def _told(ask: Callable[[], _Answer]) -> _Answer | None:
    """Answer of a store to a question that not every store knows; else None."""
    try:
        return ask()
    except FletcherError:
        return None


def _find_count(exceeds: Callable[[int], bool], last: int) -> int:
    """The smallest number, at least 0, for which `exceeds` is false.

    A number near `last` is found in few calls.
    """
    low, high, step = -1, max(last - 1, 0), 1
    while exceeds(high):
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return high
