"""Lines that cannot be read, left out and listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fletcher.errors import ConfigError, FletcherError, InvalidCommandError, InvalidUtf8Error
from fletcher.readers import open_source
from fletcher.readers.bad_rows import RejectedLines, ignore_bad_line

LINES = [
    b'{"id": "a", "text": "one"}',
    b'{"id": "b", "text": ',
    b'["c"]',
    b"",
    b'{"id": "d", "text": "\xff"}',
    b'{"id": "e", "id": "f", "text": "twice"}',
    b'{"id": "g", "text": "two"}',
]


def read(path: Path, column: str, **options: object) -> list[str]:
    source = open_source(path, on_bad_line=ignore_bad_line, **options)  # type: ignore[arg-type]
    return [value for batch in source.batches() for value in batch.column(column).to_pylist()]


def rejects_of(path: Path, out: Path, rounds: int = 1, **options: object) -> RejectedLines:
    rejected = RejectedLines(out)
    source = open_source(path, on_bad_line=rejected.add_line, **options)  # type: ignore[arg-type]
    for _ in range(rounds):
        list(source.batches())
    return rejected


def test_bad_json_lines_are_left_out_and_listed_once(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "rejects.jsonl"
    path.write_bytes(b"\n".join(LINES))
    rejected = rejects_of(path, out, rounds=2)
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [one["row"] for one in found] == [2, 3, 5, 6]
    assert [one["code"] for one in found] == [
        "invalid_command",
        "invalid_command",
        "invalid_utf8",
        "invalid_command",
    ]
    assert all(one["file"] == str(path) and str(path) in one["reason"] for one in found)
    assert found[0]["line"] == '{"id": "b", "text": '
    assert found[2]["line"] == '{"id": "d", "text": "\\xff"}'
    assert rejected.num_lines == 4
    assert read(path, "id") == ["a", "g"]


def test_a_line_is_reported_once_although_the_file_is_read_twice(tmp_path: Path) -> None:
    path, lines = tmp_path / "in.jsonl", []
    path.write_bytes(b"\n".join(LINES))
    source = open_source(path, on_bad_line=lambda _file, line, _data, _error: lines.append(line))
    list(source.batches())
    assert lines == [2, 3, 5, 6]


def test_bad_lines_of_plain_text_are_left_out(tmp_path: Path) -> None:
    path, out = tmp_path / "in.txt", tmp_path / "rejects.jsonl"
    path.write_bytes(b"one\ntw\xffo\nthree\n")
    assert read(path, "text") == ["one", "three"]
    assert rejects_of(path, out).num_lines == 1


def test_the_limit_counts_the_lines_that_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(LINES))
    assert read(path, "id", limit=2) == ["a", "g"]


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"text": "\xff"}', b'{"text": "a", "text": "b"}'])
def test_bad_lines_fail_by_default(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + bad)
    with pytest.raises((InvalidCommandError, InvalidUtf8Error), match="line 2"):
        open_source(path)


def test_a_file_of_bad_lines_alone_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"{\n{\n")
    assert read(path, "text") == []


def test_a_file_without_bad_lines_makes_no_rejects(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "rejects.jsonl"
    path.write_bytes(LINES[0])
    assert rejects_of(path, out).num_lines == 0
    assert not out.exists()


def test_rejects_never_replace_a_file(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "rejects.jsonl"
    path.write_bytes(b"\n".join(LINES))
    with pytest.raises(ConfigError, match="exists"):
        RejectedLines(path)
    with pytest.raises(ConfigError, match="does not exist"):
        RejectedLines(tmp_path / "none" / "rejects.jsonl")
    rejected = RejectedLines(out)
    out.write_text("kept")  # made by another program after the check
    with pytest.raises(ConfigError, match="cannot be written"):
        list(open_source(path, on_bad_line=rejected.add_line).batches())
    assert out.read_text() == "kept"


def test_without_a_file_lines_are_counted() -> None:
    rejected = RejectedLines(None)
    for line in (1, 2, 2):
        rejected.add_line("a", line, b"", FletcherError("bad"))
    assert rejected.num_lines == 2
