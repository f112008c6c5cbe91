"""`fletcher datasets` on every kind of store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from fletcher.cli import main
from fletcher.delivery.journal.root import folder_name, lock_journal
from fletcher.stores.address import open_store
from tests.doubles import store_rows as rows
from tests.doubles.store_addresses import empty_store

Run = Callable[..., int]


@pytest.fixture(params=["lance", "parquet", "fletcher", "longbow"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of an empty store."""
    with empty_store(request.param, tmp_path / "v") as found:
        yield found


@pytest.fixture
def run(address: str, tmp_path: Path) -> Run:
    def command(*words: str) -> int:
        return main(["datasets", *words, "--store", address, "--home", str(tmp_path)])

    return command


def fill(address: str, name: str, count: int = 10, dtype: str = "float32") -> None:
    with closing(open_store(address)) as store:
        dtype = dtype if dtype in store.capabilities.dtypes else "float32"
        writer = store.open_writer(name, rows.schema(dtype=dtype), "append")
        if count:
            writer.append([rows.batch(0, count, dtype=dtype)])
        writer.close()


def test_datasets_are_listed_shown_and_read(
    address: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list") == 0
    assert capsys.readouterr().out == "there is no dataset\n"
    fill(address, "a-1")
    fill(address, "b", 3)
    assert run("list", "--json") == 0
    found = json.loads(capsys.readouterr().out)["datasets"]
    told = [(one["name"], one["rows"], one["dims"], one["dtype"], one["index"]) for one in found]
    assert told == [("a-1", 10, 8, "float32", None), ("b", 3, 8, "float32", None)]
    assert {one["model"] for one in found} == {"mini@abc"}
    assert not any(one["foreign"] for one in found)
    if address.startswith(("lance", "parquet")):
        assert all(one["written_at"].endswith("+00:00") and one["bytes"] > 0 for one in found)
    assert run("list") == 0
    assert "a-1" in capsys.readouterr().out
    assert run("show", "a-1", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["columns"]["vector"].startswith("fixed_size_list")
    assert shown["rows"] == 10
    assert run("show", "a-1") == 0
    assert "similarity" in capsys.readouterr().out
    assert run("head", "a-1", "--rows", "2", "--json") == 0
    head = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(head) == 2
    assert "vector" not in head[0]
    assert "batch_key" not in head[0]
    assert run("head", "a-1", "--columns", "id,vector", "--rows", "99", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert len(json.loads(lines[0])["vector"]) == 8
    assert run("head", "b", "--filter", "token_count < -1") == 0
    assert capsys.readouterr().out == "no rows\n"


def test_a_dataset_is_dropped_only_if_asked(
    address: str, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(address, "a")
    fill(address, "b")
    assert run("drop", "a") == 2  # nobody answers here
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda *_, **__: False)
    assert run("drop", "a") == 1
    with closing(open_store(address)) as store:
        assert [info.name for info in store.datasets()] == ["a", "b"]
    assert run("drop", "a", "--yes") == 0
    assert capsys.readouterr().out.startswith("nothing is deleted\ndeleted a, 10 rows")
    with closing(open_store(address)) as store:
        assert [info.name for info in store.datasets()] == ["b"]
    assert run("drop", "a", "--yes") == 1
    assert "there is no dataset 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("show",), ("head",), ("drop", "--yes")])
@pytest.mark.parametrize("name", ["missing", "../x", "", "a b", "x" * 129, "*"])
def test_odd_names_are_refused(
    address: str, run: Run, words: tuple[str, ...], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(address, "a", 1)
    assert run(words[0], name, *words[1:]) != 0
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "unexpected" not in error
    with closing(open_store(address)) as store:
        assert [info.name for info in store.datasets()] == ["a"]


def test_an_empty_dataset_is_listed_read_and_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for scheme in ("lance", "parquet"):
        where = ["--store", f"{scheme}:{tmp_path / scheme}", "--home", str(tmp_path)]
        fill(where[1], "none", 0)
        assert main(["datasets", "list", "--json", *where]) == 0
        (one,) = json.loads(capsys.readouterr().out)["datasets"]
        assert (one["name"], one["rows"]) == ("none", 0)
        assert main(["datasets", "head", "none", *where]) == 0
        assert main(["datasets", "drop", "none", "--yes", *where]) == 0
        assert not list((tmp_path / scheme).glob("none*"))
        capsys.readouterr()


@pytest.mark.parametrize("output", ["sparse", "multi"])
def test_sparse_and_token_vectors_are_described(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--store", f"lance:{tmp_path / 'v'}", "--home", str(tmp_path)]
    batch = rows.list_batch(0, 10, output, "float32")
    with closing(open_store(where[1])) as store:
        store.open_writer("d", batch.schema, "append").append([batch])
    assert main(["datasets", "list", "--json", *where]) == 0
    (one,) = json.loads(capsys.readouterr().out)["datasets"]
    dims = {"sparse": 30_000, "multi": 8}[output]
    assert (one["output"], one["dims"], one["dtype"]) == (output, dims, "float32")


def test_a_table_of_another_program_is_deleted_only_if_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--store", f"lance:{tmp_path / 'v'}", "--home", str(tmp_path)]
    database = lancedb.connect(tmp_path / "v")
    database.create_table("theirs", pa.table({"id": ["a"], "vector": [[1.0, 2.0]]}))
    database.create_table("other", pa.table({"n": [1]}))
    assert main(["datasets", "drop", "theirs", "--yes", *where]) == 1
    assert "--foreign" in capsys.readouterr().err
    for flags in ([], ["--foreign"]):  # it has neither ids nor vectors
        assert main(["datasets", "drop", "other", "--yes", *flags, *where]) != 0
    assert set(database.list_tables().tables) == {"theirs", "other"}
    assert main(["datasets", "drop", "theirs", "--yes", "--foreign", *where]) == 0
    assert database.list_tables().tables == ["other"]


def test_rows_in_the_journal_go_with_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"lance:{tmp_path / 'v'}"
    where = ["--store", address, "--home", str(tmp_path)]
    fill(address, "d")
    journal = tmp_path / "journal" / folder_name(address) / "d"
    journal.mkdir(parents=True)
    (journal / "000000000000.arrow").write_bytes(b"rows")
    with lock_journal(tmp_path / "journal"):  # a server runs
        assert main(["datasets", "drop", "d", "--yes", *where]) == 2
    assert main(["datasets", "head", "d", *where]) == 0
    assert main(["datasets", "drop", "d", "--yes", *where]) == 0
    assert not journal.exists()
    capsys.readouterr()


def test_a_dataset_that_is_being_written_is_not_dropped(tmp_path: Path) -> None:
    address = f"lance:{tmp_path / 'v'}"
    where = ["--store", address, "--home", str(tmp_path)]
    with closing(open_store(address)) as store:
        writer: Any = store.open_writer("d", rows.schema(), "append")
        writer.append([rows.batch(0, 10)])
        assert main(["datasets", "drop", "d", "--yes", *where]) == 1
        writer.append([rows.batch(10, 10)])
        found = store.dataset("d")
        assert found is not None
        assert found.num_rows == 20


def test_two_stores_with_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = [f"lance:{tmp_path / 'v'}", f"parquet:{tmp_path / 'p'}"]
    where = ["--home", str(tmp_path)]
    for number, one in enumerate(stores):
        fill(one, "d")
        where += ["--store", f"s{number}={one}"]
    assert main(["datasets", "list", "--json", *where]) == 0
    assert len(json.loads(capsys.readouterr().out)["datasets"]) == 2
    assert main(["datasets", "drop", "d", "--yes", *where]) == 2
    assert "several" in capsys.readouterr().err


def test_no_folder_is_made_by_reading(tmp_path: Path) -> None:
    where = ["--store", f"lance:{tmp_path / 'v'}", "--home", str(tmp_path)]
    assert main(["datasets", "list", *where]) == 0
    assert main(["datasets", "show", "d", *where]) == 1
    assert not (tmp_path / "v").exists()
