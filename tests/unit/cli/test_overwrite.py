"""`fletcher overwrite` on stores with unfinished overwrites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fletcher.cli import main
from fletcher.delivery.journal.root import folder_name, lock_journal
from fletcher.stores.address import open_store
from fletcher.stores.staging import staged_name
from tests.doubles import store_rows as rows


@pytest.mark.parametrize("scheme", ["lance", "parquet"])
def test_unfinished_overwrites_are_listed_and_dropped(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"{scheme}:{tmp_path / 'v'}"
    store = open_store(address)
    for name in ("d", staged_name("d", "u")):
        writer = store.open_writer(name, rows.schema(), "append")
        writer.append([rows.batch(0, 10)])
    store.close()
    where = ["--store", address, "--home", str(tmp_path)]
    assert main(["overwrite", "list", "--json", *where]) == 0
    (found,) = json.loads(capsys.readouterr().out)["overwrites"]
    assert (found["dataset"], found["upload_id"], found["rows"]) == ("d", "u", 10)
    journal = tmp_path / "journal" / folder_name(address) / found["name"]
    journal.mkdir(parents=True)
    (journal / "000000000000.arrow").write_bytes(b"rows")
    with lock_journal(tmp_path / "journal"):
        assert main(["overwrite", "drop", found["name"], *where]) == 2
    assert main(["overwrite", "drop", "d", *where]) == 2  # a dataset is none
    assert main(["overwrite", "drop", found["name"], *where]) == 0
    assert not journal.exists()
    assert main(["overwrite", "drop", found["name"], *where]) == 2
    capsys.readouterr()
    assert main(["overwrite", "list", *where]) == 0
    assert capsys.readouterr().out == "no overwrite is unfinished\n"
    again = open_store(address)
    assert [info.num_rows for info in again.datasets()] == [10]
    again.close()
