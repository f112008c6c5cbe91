"""Numbers of a Longbow's rows, found with questions that it answers."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from fletcher.errors import RequestError, StoreUnavailableError, UnknownDatasetError
from fletcher.stores.base import DatasetInfo, total_rows
from fletcher.stores.flight.longbow_datasets import LongbowDatasets, Readiness

SCHEMA = pa.schema({"id": pa.utf8()})


class Connection:
    """A Longbow with the numbers of rows in `rows`."""

    def __init__(self, **rows: int) -> None:
        self.rows = rows
        self.num_lists = 0
        self.index_len: int | None = 3
        self.listing_fails: Exception | None = None
        self.ignores_criteria = False

    def list_names(self, criteria: bytes) -> list[str]:
        self.num_lists += 1
        if self.listing_fails is not None and criteria:
            raise self.listing_fails
        if self.ignores_criteria or not criteria:
            return sorted(self.rows)
        name, rows = (one["value"] for one in json.loads(criteria)["filters"])
        return [one for one, number in self.rows.items() if name in one and number > int(rows)]

    def read_schema(self, name: str) -> pa.Schema:
        if not self.rows.get(name):
            raise UnknownDatasetError("there is none")
        return SCHEMA

    def read_size(self, name: str) -> tuple[int, int]:
        return 2, 100

    def ask(self, action: str, request: Any, answer: Any) -> Any:
        assert (action, request, answer) == ("check_readiness", {"dataset": "d"}, Readiness)
        return Readiness("READY", self.index_len)


def count(datasets: LongbowDatasets, name: str = "d") -> int | None:
    info = datasets.describe_dataset(name)
    assert info is not None
    return info.num_rows


@pytest.mark.parametrize("rows", [*range(1, 20), 255, 256, 257, 123_456, 2**40, 2**62])
def test_rows_are_counted(rows: int) -> None:
    assert count(LongbowDatasets(Connection(d=rows, dd=7, e=1))) == rows


def test_rows_are_counted_in_few_calls() -> None:
    connection = Connection(d=1_000_000)
    datasets = LongbowDatasets(connection)
    assert count(datasets) == 1_000_000
    assert connection.num_lists <= 44
    for rows, most in ((1_000_000, 4), (1_000_500, 24), (999_999, 24), (1, 24), (700, 24)):
        connection.num_lists, connection.rows["d"] = 0, rows
        assert count(datasets) == rows
        assert connection.num_lists <= most, rows


def test_a_dataset_is_described() -> None:
    (info,) = LongbowDatasets(Connection(d=5, empty=0)).describe_all()
    assert info == DatasetInfo("d", SCHEMA, num_rows=5, num_bytes=100, num_indexed=3)
    assert LongbowDatasets(Connection(empty=0)).describe_dataset("empty") is None


def test_numbers_that_the_store_does_not_tell_are_unknown() -> None:
    connection = Connection(d=5)
    connection.ignores_criteria = True
    connection.index_len = None
    info = LongbowDatasets(connection).describe_dataset("d")
    assert info is not None
    assert (info.num_rows, info.num_indexed) == (None, None)
    connection.ignores_criteria = False
    for error in (RequestError("no"), StoreUnavailableError("away")):
        connection.listing_fails = error
        assert count(LongbowDatasets(connection)) is None


def test_a_store_whose_lists_lack_the_dataset_tells_no_number() -> None:
    class Silent(Connection):
        def list_names(self, criteria: bytes) -> list[str]:
            return []

    assert count(LongbowDatasets(Silent(d=5))) is None


def test_the_sum_of_unknown_numbers_is_unknown() -> None:
    infos = [DatasetInfo("a", SCHEMA, 2), DatasetInfo("b", SCHEMA, 0)]
    assert total_rows(infos) == 2
    assert total_rows([*infos, DatasetInfo("c", SCHEMA, None)]) is None
    assert total_rows([]) == 0
