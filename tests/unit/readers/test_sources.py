"""Files at paths, patterns and URIs: how they are listed, opened and told apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fletcher.errors import InvalidCommandError
from fletcher.readers import open_source
from fletcher.readers.sources import list_files


def names(spec: str | Path) -> list[str]:
    return [Path(file.name).name for file in list_files(spec)]


def make(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"text of {path}\n")


def test_a_local_file_is_opened_at_any_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789")
    (file,) = list_files(path)
    assert (file.name, file.size, file.version) == (str(path), 10, path.stat().st_mtime_ns)
    for offset, length, expected in (
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (8, 40, b"89"),
        (3, 0, b""),
        (40, 2, b""),
    ):
        with file.open(offset, length) as stream:
            assert stream.read() == expected


def test_a_changed_file_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    (file,) = list_files(path)
    assert file.stamp() == (file.size, file.version)
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file.stamp() == (3, 1)
    path.unlink()
    with pytest.raises(InvalidCommandError, match=r"cannot read .*a\.txt"):
        file.stamp()


def test_a_pattern_matches_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a.txt", "c.csv", ".hidden.txt", "sub/d.txt", "sub/deep/e.txt")
    assert names(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert names(tmp_path / "[bc].*") == ["b.txt", "c.csv"]
    assert names(tmp_path / "?.csv") == ["c.csv"]
    assert names(tmp_path / "*" / "*.txt") == ["d.txt"]
    assert names(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "d.txt", "e.txt"]
    assert names(tmp_path / "s*" / "**") == ["d.txt", "e.txt"]
    source = open_source(str(tmp_path / "*.txt"))
    assert [text for batch in source.batches() for text in batch["text"].to_pylist()] == [
        "text of a.txt",
        "text of b.txt",
    ]


def test_a_pattern_leaves_out_the_folder_of_a_store(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "store/b.txt", "store/deep/c.txt", "stores/d.txt")
    found = list_files(tmp_path / "**" / "*.txt", excluded=[tmp_path / "store"])
    assert [Path(file.name).name for file in found] == ["a.txt", "d.txt"]


def test_a_name_with_signs_of_a_pattern_is_a_name_if_it_exists(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt", "b*.txt", "bc.txt")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]
    assert names(tmp_path / "b*.txt") == ["b*.txt"]
    assert names(tmp_path / "a[1-9].txt") == ["a1.txt"]


@pytest.mark.parametrize("pattern", ["*.csv", "su*", "**/none"])
def test_a_pattern_without_a_file_is_an_error(tmp_path: Path, pattern: str) -> None:
    make(tmp_path, "a.txt", "sub/b.txt")
    with pytest.raises(InvalidCommandError, match="no file matches"):
        list_files(tmp_path / pattern)
