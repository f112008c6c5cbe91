"""The examples of docs/dataframes.md, run as they stand: pandas, Polars, DuckDB and LanceDB."""

from __future__ import annotations

import datetime as dt
import math
import re
import shlex
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fletcher.cli import main
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.stores.address import open_store
from tests.doubles import store_rows

PAGE = Path(__file__).parents[2] / "docs" / "dataframes.md"
IDS = ["a", "b", "c", "d"]
DAYS = [dt.date(2024, 1, 31), None, dt.date(2024, 2, 1), dt.date(1999, 12, 31)]


def _blocks(heading: str) -> list[str]:
    """The Python and console blocks under a heading; before the first one if it is empty."""
    text = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    part = dict(zip(["", *parts[1::2]], parts[::2], strict=True))[heading]
    return re.findall(r"^```(?:python|console)\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(
    tiny_home: Path, tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the datasets of the page."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FLETCHER_HOME", str(tiny_home))
        make, commands = _blocks("")
        exec(make, {})
        for line in commands.splitlines():
            words = shlex.split(line.removeprefix("$ fletcher "))
            assert main([*words, "--model", tiny_bundle.name, "--backend", "null"]) == 0
    return folder


@pytest.fixture
def names(place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names that the examples under `LanceDB` define, with a table of the dataset."""
    monkeypatch.chdir(place)
    return _run("LanceDB", {"np": np, "pa": pa, "pq": pq})


def _run(heading: str, names: dict[str, Any]) -> dict[str, Any]:
    blocks = _blocks(heading)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{PAGE}: {heading}", "exec"), names)
    return names


def test_lancedb(names: dict[str, Any]) -> None:
    near = names["near"]
    assert set(near["id"]) == {"a", "c"}
    assert abs(near["_distance"].iloc[0]) < 1e-2
    assert names["table"].schema.field("timestamp").type == pa.timestamp("us", "UTC")


def test_pandas(names: dict[str, Any]) -> None:
    names = _run("pandas", names)
    for frame in (names["from_files"], names["from_lance"].sort_values("id", ignore_index=True)):
        assert list(frame["id"]) == IDS
        assert str(frame["timestamp"].dtype) == "datetime64[us, UTC]"
        age = dt.datetime.now(dt.UTC) - frame["timestamp"].max().to_pydatetime()
        assert dt.timedelta(0) <= age < dt.timedelta(hours=1)
        assert [None if one is None else len(one) for one in frame["vector"]].index(None) == 1
        assert [None if one != one else one for one in frame["day"]] == DAYS
        assert [math.isnan(one) for one in frame["rating"]] == [False, False, True, True]
    rating = dict(zip(names["exact"]["id"], names["exact"]["rating"].array, strict=True))
    assert math.isnan(rating["c"])
    assert not isinstance(rating["d"], float)  # null, not NaN
    assert names["metadata"][b"fletcher.dtype"] == b"float16"
    assert names["metadata"][b"fletcher.model"] == names["table"].schema.metadata[b"fletcher.model"]
    assert names["found"]["id"].iloc[names["cosines"].argmax()] == "a"


def test_polars(names: dict[str, Any]) -> None:
    names = _run("Polars", names)
    for frame in (names["files_frame"].sort("id"), names["lance_frame"].sort("id")):
        assert frame["id"].to_list() == IDS
        assert frame.schema["timestamp"] == pl.Datetime("us", "UTC")
        assert frame["vector"].is_null().to_list() == [False, True, False, False]
        assert frame["day"].to_list() == DAYS
        assert frame["rating"].is_null().to_list() == [False, False, False, True]
        assert frame["rating"].is_nan().to_list() == [False, False, True, None]
    best = names["with_vector"].with_columns(score=names["scores"]).sort("score", descending=True)
    assert best["id"][0] == "a"


def test_duckdb(names: dict[str, Any]) -> None:
    names = _run("DuckDB", names)
    assert {row[0] for row in names["nearest"].fetchall()} == {"a", "c"}
    assert (
        names["model"].fetchall()[0][0].encode()
        == names["table"].schema.metadata[b"fletcher.model"]
    )
    assert sorted(row[0] for row in names["recent"].fetchall()) == IDS
    files = "read_parquet('files/notes/*.parquet')"
    kinds = duckdb.sql(f"select timestamp, day, rating, vector from {files}").types
    assert [str(one) for one in kinds] == ["TIMESTAMP WITH TIME ZONE", "DATE", "DOUBLE", "FLOAT[]"]
    odd = duckdb.sql(f"select id from {files} where isnan(rating) or rating is null order by id")
    assert odd.fetchall() == [("c",), ("d",)]


def test_a_column_that_a_later_upload_added(tmp_path: Path) -> None:
    """pandas and DuckDB left it out without a word."""
    with closing(open_store(f"parquet:{tmp_path}")) as store:
        for rows in (
            store_rows.batch(0, 2),
            store_rows.batch(2, 1).append_column("x", pa.array([1.5])),
        ):
            with closing(store.open_writer("d", rows.schema, "append")) as writer:
                writer.append([rows])
    files = str(tmp_path / "d" / "*.parquet")
    frame = pd.read_parquet(tmp_path / "d")
    assert [None if one != one else one for one in frame["x"]] == [None, None, 1.5]
    assert list(frame["id"]) == ["id0", "id1", "id2"]
    inserted = pl.scan_parquet(files, missing_columns="insert").collect()
    assert inserted["x"].to_list() == [None, None, 1.5]
    with pytest.raises(pl.exceptions.PolarsError, match="x"):
        pl.read_parquet(files)
    named = duckdb.sql(f"select x from read_parquet('{files}', union_by_name = true)")
    assert named.fetchall() == [(None,), (None,), (1.5,)]
    with pytest.raises(duckdb.Error, match="union_by_name"):
        duckdb.sql(f"select x from read_parquet('{files}')").fetchall()
