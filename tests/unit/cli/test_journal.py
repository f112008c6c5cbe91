"""`fletcher journal` on journals that a server left."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from fletcher.cli import main
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.root import JournalSpace, lock_journal
from fletcher.delivery.journal.segment import GroupInfo
from fletcher.delivery.journal.settled_groups import SettledGroups

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
        (group,) = journal.append_groups([(GroupInfo("u", first, first + 9), batch)], SCHEMA)
        if first == 0:
            journal.settle_group(group)
    journal.close()


def test_an_empty_journal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", "status"]) == 0
    assert "empty" in capsys.readouterr().out
    assert main(["journal", "replay"]) == 2
    assert "there is no journal" in capsys.readouterr().err


def test_a_journal_that_its_server_deletes_meanwhile_is_empty(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = lambda _: iter([("lance-0", "d", folder)])  # noqa: E731
    monkeypatch.setattr("fletcher.delivery.journal.root.journal_folders", gone)
    assert main(["journal", "status"]) == 0
    assert "empty" in capsys.readouterr().out


def test_the_journal_of_another_home(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(folder)
    monkeypatch.setenv("FLETCHER_HOME", str(folder))
    assert main(["journal", "status", "--home", str(folder.parents[2])]) == 0
    assert "10 rows" in capsys.readouterr().out


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
    assert "damaged in 1 place" in capsys.readouterr().out


def test_verify_names_the_rows_that_are_damaged_and_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(folder, retention_s=3600)
    assert main(["journal", "verify"]) == 0
    assert "2 files, 20 rows: all right" in capsys.readouterr().out
    (waiting,) = folder.glob("*.arrow")
    whole = waiting.read_bytes()
    waiting.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    lock = lock_journal(folder.parents[1])
    assert main(["journal", "verify"]) == 1
    lock.close()
    said = capsys.readouterr().out
    assert "u:10-19" in said
    assert "a server uses this journal" in said
    assert main(["journal", "verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["damaged"], found["served"]) == (True, False)
    damage = [one["damage"] for one in found["files"]]
    assert damage[0] == []
    assert damage[1][0]["rows"] == ["u:10-19"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_half_a_group_at_the_end_is_no_damage(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(folder)
    (waiting,) = folder.glob("*.arrow")
    waiting.write_bytes(waiting.read_bytes() + b"\xff\xff\xff\xff\x00\x01\x00\x00half")
    assert main(["journal", "verify"]) == 0
    said = capsys.readouterr().out
    assert "12 bytes of a group that was not written completely" in said
    journal = Journal(folder, JournalSpace(1 << 30), segment_bytes=1, retention_s=lambda: 0.0)
    assert len(journal.recover()) == 1
    assert main(["journal", "verify", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [(one["state"], one["torn_bytes"]) for one in files] == [("waits", 0), ("torn", 12)]


def test_replay_makes_sent_rows_wait_behind_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(folder, retention_s=3600)
    lock = lock_journal(folder.parents[1])
    assert main(["journal", "replay"]) == 2
    assert "another server" in capsys.readouterr().err
    lock.close()
    assert main(["journal", "replay"]) == 0
    assert capsys.readouterr().out.startswith("1 files wait again")
    groups = Journal(
        folder, JournalSpace(1 << 30), segment_bytes=1, retention_s=lambda: 0.0
    ).recover()
    assert [group.info.first for group in groups] == [10, 0]


def test_notes_of_what_is_stored_are_no_file_of_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(folder)
    (folder / ".groups.unsent.tmp").write_text("u:0-9\n")  # whose writer was killed
    journal = Journal(folder, JournalSpace(1 << 30), segment_bytes=1, retention_s=lambda: 0.0)
    (waiting,) = journal.recover()
    waiting.segment.note_settled(waiting)
    waiting.segment.write_notes()
    SettledGroups(folder).add_keys(["u:20-29"])
    assert main(["journal", "verify"]) == 0
    assert "1 files, 10 rows: all right" in capsys.readouterr().out


def leave_rejected(folder: Path) -> list[str]:
    """Two groups that a store refused; returns their names."""
    journal = Journal(folder, JournalSpace(1 << 30), segment_bytes=1, retention_s=lambda: 0.0)
    journal.recover()
    for first in (0, 10):
        batch = pa.record_batch([pa.array(range(first, first + 10), pa.int64())], schema=SCHEMA)
        info = GroupInfo("u.0a1b", first, first + 9)
        (group,) = journal.append_groups([(info, batch)], SCHEMA)
        journal.rejected.add_group(group, "not this")
        journal.settle_group(group)
    journal.close()
    return sorted(f"lance-0/d/{path.name}" for path in folder.glob("*.rejected"))


def test_refused_rows_are_listed_sent_again_or_dropped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["journal", "rejected", "list"]) == 0
    assert "no store has refused rows" in capsys.readouterr().out
    first, second = leave_rejected(folder)
    assert main(["journal", "rejected", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["files"]
    assert [(one["name"], one["rows"], one["uploads"]) for one in found] == [
        (first, 10, ["u.0a1b"]),
        (second, 10, ["u.0a1b"]),
    ]
    assert main(["journal", "rejected", "drop", first]) == 0
    assert main(["journal", "rejected", "resend", "all"]) == 0
    assert [path.suffix for path in folder.iterdir()] == [".arrow"]
    (waiting,) = Journal(
        folder, JournalSpace(1 << 30), segment_bytes=1, retention_s=lambda: 0.0
    ).recover()
    assert (waiting.info.first, waiting.settled) == (10, False)


@pytest.mark.parametrize("names", [[], ["lance-0/d/none.rejected"], ["../../x"]])
@pytest.mark.parametrize("action", ["resend", "drop"])
def test_only_listed_files_of_refused_rows_are_handled(
    folder: Path, capsys: pytest.CaptureFixture[str], action: str, names: list[str]
) -> None:
    leave_rejected(folder)
    before = sorted(folder.iterdir())
    assert main(["journal", "rejected", action, *names]) == 2
    assert "FILE" in capsys.readouterr().err or names
    assert sorted(folder.iterdir()) == before


def test_refused_rows_are_left_alone_while_a_server_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_rejected(folder)
    lock = lock_journal(folder.parents[1])
    try:
        assert main(["journal", "rejected", "drop", "all"]) == 2
        assert "another server uses the journal" in capsys.readouterr().err
        assert main(["journal", "rejected", "list"]) == 0
    finally:
        lock.close()
