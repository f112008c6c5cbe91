"""`fletcher index` and `fletcher optimize` on every kind of store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import lancedb
import pyarrow as pa
import pytest

from fletcher.cli import main
from fletcher.cli.index import cli as index_command
from fletcher.stores.address import open_store
from fletcher.stores.lance.indexing import TYPES
from tests.doubles import store_rows as rows
from tests.doubles.store_addresses import empty_store


@pytest.fixture(params=["parquet", "fletcher", "longbow"])
def other_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of a store that these commands refuse."""
    with empty_store(request.param, tmp_path / "v") as found:
        yield found


def fill(address: str, count: int = 600) -> None:
    with closing(open_store(address)) as store:
        writer = store.open_writer("d", rows.schema(dtype="float32"), "append")
        writer.append([rows.batch(0, count, dtype="float32")])
        writer.close()


def test_an_index_is_made_measured_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["d", "--store", f"lance:{tmp_path / 'v'}", "--home", str(tmp_path)]
    fill(where[2])
    assert main(["index", *where, "--type", "ivf_rq", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"]["recall"] >= 0.99
    assert told["index"]["kind"] == "IVF_RQ"
    assert main(["index", *where, "--type", "ivf_rq"]) == 0
    out = capsys.readouterr().out
    assert "recall@10" in out
    assert "ms exact" in out
    assert main(["datasets", "show", *where]) == 0
    assert "IVF_RQ, 600 rows, 600 indexed (100%)" in capsys.readouterr().out
    assert main(["index", *where]) == 0  # too few rows for another one
    assert main(["optimize", *where, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["after"]["num_rows"] == 600
    assert told["after"]["num_unindexed"] == 0
    assert main(["optimize", *where]) == 0
    assert main(["optimize", *where, "--keep-minutes", "0"]) == 2


@pytest.mark.parametrize("command", ["index", "optimize"])
def test_other_stores_are_refused_by_name(
    other_store: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(other_store, 10)
    where = ["--store", other_store, "--home", str(tmp_path)]
    assert main([command, "d", *where]) == 1
    assert "only a `lance:` store" in capsys.readouterr().err
    assert main([command, "missing", *where]) == 1


@pytest.mark.parametrize("command", ["index", "optimize"])
def test_a_table_of_another_program_is_changed_only_if_told(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["d", "--store", f"lance:{tmp_path / 'v'}", "--home", str(tmp_path)]
    database = lancedb.connect(tmp_path / "v")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0] * 3, pa.float32()), 2)
    table = database.create_table("d", pa.table({"id": ["a", "b", "c"], "vector": vectors}))
    assert main([command, *where]) == 1
    assert "--foreign" in capsys.readouterr().err
    assert len(table.list_versions()) == 1
    assert main([command, *where, "--foreign"]) == 0


def test_the_types_of_the_command_are_those_of_the_store() -> None:
    kind = next(one for one in index_command.params if one.name == "kind")
    assert tuple(kind.type.choices) == TYPES  # type: ignore[attr-defined]
