import errno
import os
from pathlib import Path

import pytest

from fletcher.util import durable
from fletcher.util.durable import atomic_path, make_folder, sync_path, write_atomically


@pytest.fixture
def synced(monkeypatch):
    """Paths in the order in which they were synced."""
    paths = []
    fsync = os.fsync

    def record(file):
        paths.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    return paths


def test_a_write_replaces_the_whole_file_and_is_synced(tmp_path, synced):
    path = tmp_path / "a.json"
    write_atomically(path, "längst")
    write_atomically(path, b"short")
    assert path.read_bytes() == b"short"
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert synced == [str(tmp_path / ".a.json.tmp"), str(tmp_path)] * 2


def test_a_file_has_its_name_only_after_its_content_is_synced(tmp_path, monkeypatch):
    path = tmp_path / "a"
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    write_atomically(path, b"x")
    assert seen == [False, True]


@pytest.mark.parametrize("unique", [False, True])
def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, unique):
    path = tmp_path / "a"
    write_atomically(path, "old")

    def fail():
        with atomic_path(path, unique=unique) as temporary:
            temporary.write_text("new")
            raise ValueError("disk")

    with pytest.raises(ValueError, match="disk"):
        fail()
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_writers_without_a_lock_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "a"
    with atomic_path(path, unique=True) as one, atomic_path(path, unique=True) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "no" / "a", b"x")


def test_folders_are_made_with_their_parents_and_synced(tmp_path, synced):
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [str(tmp_path.parent), str(tmp_path), str(tmp_path / "a")]
    synced.clear()
    make_folder(tmp_path / "a" / "b")
    assert synced == [str(tmp_path / "a")]


def test_a_path_that_is_missing_cannot_be_synced(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync_path(tmp_path / "no")


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename = Path.rename

    def full(self: Path, other: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.ENOSPC, "full")
        return rename(self, other)

    monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="full"):
        durable.put_in_place(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "target"
