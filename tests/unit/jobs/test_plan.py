"""Plans: what is sent again when files change, and which rows are deleted."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from fletcher.jobs import cutting, plan
from fletcher.jobs.manifest import JobState
from fletcher.jobs.plan import Plan, Planner
from fletcher.jobs.records import Fragment, StampsRecord, StateRecord
from fletcher.readers.files import InputFile
from fletcher.readers.sources import find_files

READING = {"text": "text"}


class Folder:
    """A folder of input, a manifest's state, and the rows that a store would have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = JobState()
        self.stored: dict[int, list[bytes]] = {}  # lines by number of the fragment
        self._time = 10**18

    def write(self, name: str, data: str | bytes) -> None:
        path = self.path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        self._time += 10**9
        os.utime(path, ns=(self._time, self._time))

    def plan(self, **options: bool) -> Plan:
        return Planner(self.state, READING, **options).plan(find_files([self.path]))

    def run(self, **options: bool) -> tuple[list[str], list[int]]:
        """Carries a plan out; names of what was sent, and numbers of what was deleted."""
        found = self.plan(**options)
        sent = []
        for one in found.fragments:
            if one.known is not None:
                if one.known.files != one.stamps:
                    self.state.take(StampsRecord(fragment=one.known.id, files=one.stamps))
                continue
            number = len(self.state.fragments)
            self.state.take(
                Fragment(
                    id=number,
                    files=one.stamps,
                    lines=one.lines,
                    content=one.content,
                    reading=READING,
                    upload_id=f"u{number}",
                    replaces=one.replaces,
                    contents=one.contents,
                )
            )
            self.state.take(StateRecord(fragment=number, state="done"))
            parts = [Path(stamp.path).read_bytes() for stamp in one.stamps]
            if one.lines is not None:
                parts = [parts[0][one.lines.start : one.lines.stop]]
            self.stored[number] = [line for part in parts for line in part.splitlines()]
            sent.append(one.name.removeprefix(f"{self.path}/"))
        for old in found.replaced:
            self.state.take(StateRecord(fragment=old.id, state="deleted"))
            del self.stored[old.id]
        return sent, [one.id for one in found.replaced]

    def rows(self) -> list[bytes]:
        """Lines of the stored fragments that are current."""
        return sorted(line for lines in self.stored.values() for line in lines)

    def expected(self) -> list[bytes]:
        files = find_files([self.path])
        return sorted(line for one in files for line in Path(one.name).read_bytes().splitlines())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_files_that_did_not_change_are_not_read(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("a.txt", "one\n")
    folder.write("b.csv", "text\none\n")
    assert folder.run() == (["a.txt", "b.csv"], [])
    monkeypatch.setattr(InputFile, "content_hash", None)
    monkeypatch.setattr(plan, "cut_lines", None)
    assert folder.run() == ([], [])


def test_a_changed_file_replaces_its_former_self(folder: Folder) -> None:
    folder.write("a.csv", "text\none\n")
    folder.write("b.csv", "text\ntwo\n")
    folder.run()
    folder.write("a.csv", "text\nthree\n")
    assert folder.run() == (["a.csv"], [0])
    assert folder.run() == ([], [])


def test_a_new_time_alone_sends_nothing(folder: Folder) -> None:
    folder.write("a.csv", "text\none\n")
    folder.write("b.txt", "one\n")
    folder.run()
    folder.write("a.csv", "text\none\n")
    folder.write("b.txt", "one\n")
    assert folder.run() == ([], [])
    assert folder.plan().fragments[0].known == folder.state.fragments[0]


def test_content_that_changed_behind_the_same_stamp_is_found_on_demand(folder: Folder) -> None:
    folder.write("a.csv", "text\none\n")
    folder.run()
    folder._time -= 10**9
    folder.write("a.csv", "text\ntwo\n")
    assert folder.run() == ([], [])
    assert folder.run(verify_content=True) == (["a.csv"], [0])


def test_appended_lines_are_sent_alone(folder: Folder) -> None:
    folder.write("a.jsonl", "{}\n{}\n")
    folder.run()
    folder.write("a.jsonl", "{}\n{}\n{}\n")
    assert folder.run() == (["a.jsonl from line 3"], [])
    folder.write("a.jsonl", "{}\n{}\n{}\n{}\n")
    assert folder.run() == (["a.jsonl from line 4"], [])


def test_a_shorter_file_loses_its_end(folder: Folder) -> None:
    folder.write("a.txt", "one\n")
    folder.run()
    folder.write("a.txt", "one\ntwo\n")
    folder.run()
    folder.write("a.txt", "one\n")
    assert folder.run() == ([], [1])
    assert folder.rows() == [b"one"]


def test_an_empty_file_loses_all(folder: Folder) -> None:
    folder.write("a.txt", "one\n")
    folder.run()
    folder.write("a.txt", "")
    assert folder.run() == ([], [0])


def test_a_renamed_file_is_known(folder: Folder) -> None:
    folder.write("a.csv", "text\none\n")
    folder.run()
    (folder.path / "a.csv").rename(folder.path / "c.csv")
    assert folder.run() == ([], [])
    assert folder.state.fragments[0].files[0].path.endswith("c.csv")
    (folder.path / "c.csv").rename(folder.path / "a.csv")
    assert folder.run(holds_paths=True) == (["a.csv"], [])


def test_a_copy_is_another_file(folder: Folder) -> None:
    folder.write("a.csv", "text\none\n")
    folder.run()
    folder.write("b.csv", "text\none\n")
    assert folder.run() == (["b.csv"], [])


def test_a_file_that_is_gone_keeps_its_rows(folder: Folder) -> None:
    folder.write("a.csv", "text\none\n")
    folder.write("b.csv", "text\ntwo\n")
    folder.run()
    (folder.path / "a.csv").unlink()
    assert folder.run() == ([], [])


def test_small_files_share_a_fragment(folder: Folder) -> None:
    for number in range(40):
        folder.write(f"{number:02}.txt", f"{number}\n")
    assert folder.run() == (["00.txt and 39 more files"], [])
    folder.write("new.txt", "new\n")
    assert folder.run() == (["new.txt"], [])
    folder.write("07.txt", "changed\n")
    assert folder.run() == (["00.txt and 39 more files"], [0])
    assert folder.rows() == folder.expected()


def test_small_files_that_were_renamed_are_known(folder: Folder) -> None:
    for number in range(40):
        folder.write(f"{number:02}.txt", f"{number:02}\n")
    folder.run()
    (folder.path / "07.txt").rename(folder.path / "new.txt")
    assert folder.run() == ([], [])
    assert folder.run() == ([], [])
    folder.write("new.txt", "changed\n")
    assert folder.run() == (["00.txt and 39 more files"], [0])
    assert folder.rows() == folder.expected()
    (folder.path / "below").mkdir()
    for path in folder.path.glob("*.txt"):
        path.rename(folder.path / "below" / f"moved-{path.name}")
    (folder.path / "below" / "moved-03.txt").unlink()
    assert folder.run() == ([], [])
    (folder.path / "below" / "moved-04.txt").rename(folder.path / "05.txt")
    assert folder.run(holds_paths=True) == (["05.txt"], [])


def test_small_copies_are_other_files(folder: Folder) -> None:
    for number in range(20):
        folder.write(f"{number:02}.txt", "the same\n")
    folder.run()
    folder.write("copy.txt", "the same\n")
    assert folder.run() == (["copy.txt"], [])
    (folder.path / "05.txt").rename(folder.path / "moved.txt")
    assert folder.run() == ([], [])
    assert folder.rows() == folder.expected()


def test_files_beside_a_changed_one_are_sent_although_they_are_not_given(folder: Folder) -> None:
    for number in range(20):
        folder.write(f"{number:02}.txt", f"{number}\n")
    folder.run()
    (folder.path / "19.txt").unlink()
    folder.write("07.txt", "changed\n")
    found = Planner(folder.state, READING).plan(find_files([folder.path / "07.txt"]))
    paths = [stamp.path for one in found.fragments for stamp in one.stamps]
    assert len(paths) == 19
    assert found.lost == [str(folder.path / "19.txt")]
    assert [one.id for one in found.replaced] == [0]


def test_other_reading_options_are_other_rows(folder: Folder) -> None:
    folder.write("a.csv", "text,title\none,two\n")
    folder.run()
    found = Planner(folder.state, {"text": "title"}).plan(find_files([folder.path]))
    assert [one.known for one in found.fragments] == [None]
    assert found.replaced == []


def test_random_changes_end_with_the_rows_of_the_files(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SHARED_FILES", 7)
    monkeypatch.setattr(plan, "SMALL_BYTES", 60)
    monkeypatch.setattr(plan, "MIN_SMALL_FILES", 4)
    monkeypatch.setattr(cutting, "FRAGMENT_BYTES", 50)
    monkeypatch.setattr(plan, "cut_lines", lambda file, known: cutting.cut_lines(file, known, 50))
    chance = random.Random(7)
    for number in range(25):
        folder.write(f"{number:02}.txt", f"{number}\n" * chance.randrange(1, 30))
    for _ in range(200):
        for _ in range(chance.randrange(1, 6)):
            name = f"{chance.randrange(25):02}.txt"
            lines = "".join(f"{chance.randrange(10**9)}\n" for _ in range(chance.randrange(1, 20)))
            known = folder.path / name
            if known.exists() and chance.random() < 0.4:
                folder.write(name, known.read_text() + lines)
            elif known.exists() and chance.random() < 0.3:
                folder.write(name, known.read_bytes()[: chance.randrange(100)])
            else:
                folder.write(name, lines)
        folder.run()
        assert folder.rows() == folder.expected()
        assert folder.run() == ([], [])
