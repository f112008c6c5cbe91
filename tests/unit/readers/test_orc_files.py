"""ORC files: columns, stripes, and files that are damaged or compressed."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import orc

from fletcher.errors import FletcherError, InvalidCommandError, UnknownColumnError
from fletcher.readers import open_source

ROWS = 30_000
TABLE = pa.table(
    {
        "meta": [{"author": f"author {n}", "year": n} if n % 7 else None for n in range(ROWS)],
        "number": pa.array(range(ROWS), pa.int32()),
        "text": [f"text {n} " * 9 for n in range(ROWS)],
        "id": range(ROWS),
    }
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("orc") / "a.orc"
    orc.write_table(TABLE, str(place), stripe_size=100_000)
    assert orc.ORCFile(str(place)).nstripes > 3
    return place


def test_selected_columns_of_all_stripes_are_read(path: Path) -> None:
    source = open_source(path, columns=["meta.year", "number"])
    rows = pa.Table.from_batches(source.batches(), source.schema)
    assert rows.column_names == ["id", "text", "meta_year", "number"]
    for name in ("id", "text", "number"):
        assert rows[name].to_pylist() == TABLE[name].to_pylist()
    assert rows["meta_year"].to_pylist()[:9] == [None, 1, 2, 3, 4, 5, 6, None, 8]
    assert source.bytes_read == path.stat().st_size


def test_the_content_tells_the_format(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "data.bin"
    other.write_bytes(path.read_bytes())
    assert open_source(other, limit=2).files[0].format is None
    assert sum(one.num_rows for one in open_source(other, limit=2).batches()) == 2


def test_faults_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownColumnError, match=r"a\.orc has no column `none`"):
        open_source(path, text_column="none")
    with pytest.raises(InvalidCommandError, match="standard input is an ORC file"):
        list(open_source("-", stdin=io.BytesIO(path.read_bytes())).batches())
    (tmp_path / "c.orc.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InvalidCommandError, match="decompress it first"):
        open_source(tmp_path / "c.orc.gz")
    (tmp_path / "d.orc").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FletcherError, match=r"d\.orc cannot be read"):
        open_source(tmp_path / "d.orc")
