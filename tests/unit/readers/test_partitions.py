"""Columns in the names of folders."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fletcher.errors import UnknownColumnError
from fletcher.readers import open_source
from fletcher.readers.partitions import PartitionTypes, partition_values


def write(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    path = folder / name
    if name.endswith(".parquet"):
        parquet.write_table(pa.table({"text": [f"text {name}"], "n": [1]}), path)
    elif name.endswith(".jsonl"):
        path.write_text(f'{{"text": "text {name}", "n": 1}}\n')
    elif name.endswith(".csv"):
        path.write_text(f"text,n\ntext {name},1\n")
    else:
        path.write_text(f"text {name}\n")


def read(*paths: Path, columns: list[str]) -> pa.Table:
    source = open_source(paths, columns=columns)
    return pa.Table.from_batches(source.batches(), source.schema)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_folders_become_columns_of_every_format(tmp_path: Path, name: str) -> None:
    for year, month in (("2024", "01"), ("2024", "12"), ("2025", "02")):
        write(tmp_path / f"year={year}" / f"month={month}", name)
    rows = read(tmp_path, columns=["month", "n", "year"])
    assert rows.column_names == ["text", "month", "n", "year"]
    assert rows["year"].type == pa.int64()
    assert rows["year"].to_pylist() == [2024, 2024, 2025]
    assert rows["month"].to_pylist() == ["01", "12", "02"]
    assert rows["n"].to_pylist() == [1, 1, 1]
    assert read(tmp_path, columns=["n"]).column_names == ["text", "n"]


def test_plain_text_gets_columns_too(tmp_path: Path) -> None:
    write(tmp_path / "lang=en", "a.txt")
    write(tmp_path / "lang=__HIVE_DEFAULT_PARTITION__", "b.txt")
    write(tmp_path / "lang=a%2Fb", "c.txt")
    rows = read(tmp_path, columns=["lang"])
    assert dict(zip(rows["text"].to_pylist(), rows["lang"].to_pylist(), strict=True)) == {
        "text a.txt": "en",
        "text b.txt": None,
        "text c.txt": "a/b",
    }


def test_a_file_outside_of_such_a_folder_lacks_the_column(tmp_path: Path) -> None:
    write(tmp_path / "year=2024", "a.csv")
    write(tmp_path / "other", "b.csv")
    with pytest.raises(UnknownColumnError, match=r"b\.csv has no column `year`"):
        read(tmp_path, columns=["year"])


def test_the_folder_counts_if_the_file_has_the_column_too(tmp_path: Path) -> None:
    write(tmp_path / "n=7", "a.csv")
    assert read(tmp_path / "n=7" / "a.csv", columns=["n"])["n"].to_pylist() == [7]


def test_values_are_those_of_folders_alone() -> None:
    path = "s3://bucket/year=2024/a%20b=c%3Dd/x=/name=file.txt"
    found = partition_values(path, ["year", "a b", "x", "name", "none"])
    assert found == {"year": "2024", "a b": "c=d", "x": ""}


@pytest.mark.parametrize(
    ("value", "is_integer"),
    [
        *(("0", True), ("-5", True), ("9223372036854775807", True)),
        *(("9223372036854775808", False), ("-0", False), ("01", False), ("", False)),
        *(("+1", False), ("1.0", False), ("\u0661", False), (None, True)),
    ],
)
def test_integers_are_those_that_are_written_back(value: str | None, is_integer: bool) -> None:
    types = PartitionTypes()
    types.observe_values({"x": value})
    assert pa.types.is_integer(types.folder_schema({"x": value}).field("x").type) == is_integer
