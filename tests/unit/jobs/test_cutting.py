"""Files that are cut at line ends."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from fletcher.errors import InvalidCommandError
from fletcher.jobs.cutting import cut_lines, has_lines
from fletcher.readers.files import InputFile
from fletcher.readers.source_files import LocalFile


def input_file(path: Path, data: bytes, kind: str = "jsonl") -> InputFile:
    path.write_bytes(data)
    return InputFile(LocalFile.at_path(path), kind)  # type: ignore[arg-type]


def test_pieces_are_the_file(tmp_path: Path) -> None:
    chance = random.Random(1)
    for _ in range(100):
        ends = [b"\n", b"\r\n", b"\r"] if chance.random() < 0.5 else [b"\n"]
        lines = [b"x" * chance.randrange(9) + chance.choice(ends) for _ in range(50)]
        data = b"".join(lines) + b"y" * chance.randrange(3)
        file = input_file(tmp_path / "a", data)
        pieces = cut_lines(file, fragment_bytes=chance.randrange(1, 60))
        assert [one.lines.start for one in pieces] == [0, *(one.lines.stop for one in pieces[:-1])]
        assert pieces[-1].lines.stop == len(data)
        for piece in pieces:
            part = data[piece.lines.start : piece.lines.stop]
            assert hashlib.sha256(part).hexdigest() == piece.content
            assert part.endswith(b"\n") or piece.lines.stop == len(data)
            before = data[: piece.lines.start].decode()
            assert piece.lines.first_line == 1 + len(before.splitlines())


def test_appended_lines_leave_earlier_pieces_as_they_are(tmp_path: Path) -> None:
    data = b"".join(b"line %d\n" % number for number in range(100))
    before = cut_lines(input_file(tmp_path / "a", data), fragment_bytes=200)
    file = input_file(tmp_path / "a", data + b"and more\n")
    after = cut_lines(file, before, fragment_bytes=200)
    assert after[:-1] == before
    assert (after[-1].lines.start, after[-1].lines.first_line) == (len(data), 101)


@pytest.mark.parametrize("place", [0, 350, -2])
def test_a_change_makes_the_pieces_after_it_new(tmp_path: Path, place: int) -> None:
    data = bytearray(b"".join(b"line %d\n" % number for number in range(100)))
    before = cut_lines(input_file(tmp_path / "a", bytes(data)), fragment_bytes=200)
    data[place] = ord("?")
    after = cut_lines(input_file(tmp_path / "a", bytes(data)), before, fragment_bytes=200)
    changed = next(n for n, one in enumerate(before) if (place % len(data)) < one.lines.stop)
    assert after[:changed] == before[:changed]
    assert after[changed].lines.start == before[changed].lines.start
    assert after[changed].lines.first_line == before[changed].lines.first_line
    assert after[changed].content != before[changed].content


def test_a_line_that_goes_on_is_new(tmp_path: Path) -> None:
    before = cut_lines(input_file(tmp_path / "a", b"one\ntw"))
    (piece,) = cut_lines(input_file(tmp_path / "a", b"one\ntwo\nthree\n"), before)
    assert (piece.lines.start, piece.lines.stop) == (0, 14)
    assert cut_lines(input_file(tmp_path / "a", b"one\ntw"), before) == before


def test_a_shorter_file_keeps_its_beginning(tmp_path: Path) -> None:
    data = b"".join(b"line %d\n" % number for number in range(100))
    before = cut_lines(input_file(tmp_path / "a", data), fragment_bytes=200)
    after = cut_lines(input_file(tmp_path / "a", data[: before[2].lines.stop]), before)
    assert after == before[:3]
    assert cut_lines(input_file(tmp_path / "a", b""), before) == []


@pytest.mark.parametrize(
    ("start", "kind", "cut"),
    [
        (b'{"a": 1}\n', "jsonl", True),
        (b"\xef\xbb\xbf{}\n", "jsonl", True),
        (b"  [1]\n", "jsonl", False),
        (b"[a]\n", "text", True),
        (b"P*M\x18", "text", False),
        (b"PM", "text", True),
        (b"", "text", True),
        (b"\x1f\x8b\x08", "jsonl", False),
        (b"\xff\xfea\0", "text", False),
        (b"text\n", "csv", False),
        (b"ORC\x03", "jsonl", False),
        (b" " * 200 + b"[1]\n", "jsonl", False),
    ],
)
def test_only_files_of_lines_are_cut(tmp_path: Path, start: bytes, kind: str, cut: bool) -> None:
    assert has_lines(input_file(tmp_path / "a", start, kind)) is cut


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    file = input_file(tmp_path / "a", b"x\n")
    (tmp_path / "a").unlink()
    with pytest.raises(InvalidCommandError, match=r"cannot read .*a: No such file"):
        cut_lines(file)
