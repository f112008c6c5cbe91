"""`fletcher journal` on journals that a server left."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from fletcher.cli import main
from fletcher.delivery.journal import GroupInfo, Journal, JournalSpace, lock_journal

SCHEMA = pa.schema({"id": pa.int64()})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path))
    return tmp_path / "journal" / "lance-0" / "d"


def leave(folder: Path, *, retention_s: float = 0.0) -> None:
    """Two groups of ten rows, the first of them stored."""
    space = JournalSpace(1 << 30)
    journal = Journal(folder, space, segment_bytes=1, retention_s=lambda: retention_s)
    journal.recover()
    for first in (0, 10):
        batch = pa.record_batch([pa.array(range(first, first + 10), pa.int64())], schema=SCHEMA)
        (group,) = journal.append([(GroupInfo("u", first, first + 9), batch)], SCHEMA)
        if first == 0:
            journal.settle(group)
    journal.close()


def test_an_empty_journal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", "status"]) == 0
    assert "empty" in capsys.readouterr().out
    assert main(["journal", "replay"]) == 2
    assert "there is no journal" in capsys.readouterr().err


def test_what_waits_was_sent_or_is_damaged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(folder, retention_s=3600)
    assert main(["journal", "status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["files"]
    assert [(one["state"], one["rows"], one["uploads"]) for one in found] == [
        ("sent", 10, ["u"]),
        ("waits", 10, ["u"]),
    ]
    waiting = folder / found[1]["file"]
    data = bytearray(waiting.read_bytes())
    data[-20] ^= 1
    waiting.write_bytes(bytes(data))
    assert main(["journal", "status"]) == 1
    assert "1 groups damaged" in capsys.readouterr().out


def test_replay_makes_sent_rows_wait_behind_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(folder, retention_s=3600)
    lock = lock_journal(folder.parents[1])
    assert main(["journal", "replay"]) == 2
    assert "another server" in capsys.readouterr().err
    import os

    os.close(lock)
    assert main(["journal", "replay"]) == 0
    assert capsys.readouterr().out.startswith("1 files wait again")
    groups = Journal(
        folder, JournalSpace(1 << 30), segment_bytes=1, retention_s=lambda: 0.0
    ).recover()
    assert [group.info.first for group in groups] == [10, 0]
