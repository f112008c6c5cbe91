import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fletcher.util.locks import FileLock, NameLock

HOLD = """
import sys
from pathlib import Path
from fletcher.util.locks import FileLock, NameLock
lock = FileLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
HOLD_NAME = HOLD.replace("FileLock(Path(sys.argv[1]))", "NameLock(sys.argv[1:])")


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


def test_one_lock_at_a_time_even_in_one_process(path):
    lock = FileLock(path)
    with pytest.raises(BlockingIOError, match=r"\.lock is locked"):
        FileLock(path)
    lock.release()
    lock.release()
    with FileLock(path):
        pass
    with FileLock(path):
        pass


def test_a_refused_lock_leaves_no_descriptor_and_the_holder_its_lock(path):
    with FileLock(path):
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            with pytest.raises(BlockingIOError):
                FileLock(path)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_killed_process_loses_its_lock(path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            FileLock(path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        FileLock(path).release()
    finally:
        holder.kill()
        holder.communicate()


def test_a_child_process_does_not_inherit_the_lock(path):
    lock = FileLock(path)
    child = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    )
    try:
        assert child.stdout.readline() == b"up\n"
        lock.release()
        FileLock(path).release()
    finally:
        child.communicate(b"\n")


def test_waiting_takes_the_lock_when_it_is_released(path):
    held = FileLock(path)
    taken = threading.Event()

    def take():
        with FileLock(path, wait=True):
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not taken.wait(0.1)
    held.release()
    thread.join(10)
    assert taken.is_set()


def test_a_new_file_gets_its_mode_and_a_file_of_others_keeps_its_content(path):
    FileLock(path, mode=0o600).release()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("kept")
    FileLock(path).release()
    assert path.read_text() == "kept"


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "no" / ".lock")


def test_whoever_waits_for_a_removed_lock_excludes_those_who_come_later(path, monkeypatch):
    # A lock on the removed file would not: the next one would lock a new file.
    held = FileLock(path)
    opened, taken, done = threading.Event(), threading.Event(), threading.Event()
    real_open = os.open

    def note_open(*arguments):
        file = real_open(*arguments)
        opened.set()
        return file

    def take():
        with FileLock(path, wait=True):
            taken.set()
            done.wait(10)

    thread = threading.Thread(target=take)
    with monkeypatch.context() as noting:
        noting.setattr("fletcher.util.locks.os.open", note_open)
        thread.start()
        assert opened.wait(10)
    held.remove()
    assert taken.wait(10)
    with pytest.raises(BlockingIOError):
        FileLock(path)
    done.set()
    thread.join(10)
    FileLock(path).remove()
    assert not path.exists()
    held.remove()


def test_a_lock_file_that_cannot_be_removed_stays_and_is_unlocked(path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError

    lock = FileLock(path)
    with monkeypatch.context() as failing:
        failing.setattr(Path, "unlink", fail)
        lock.remove()
    FileLock(path).release()


def test_a_name_has_one_lock_at_a_time_even_in_one_process():
    lock = NameLock(["test a", "test b"])
    for names in (["test a"], ["test c", "test b"]):
        with pytest.raises(BlockingIOError, match=r"test [ab] is locked"):
            NameLock(names)
    NameLock(["test c"]).release()  # a refused lock holds no name
    lock.release()
    lock.release()
    again = NameLock(["test a"])
    NameLock(["test b"]).release()
    del again  # its holder forgot it
    NameLock(["test a"]).release()


def test_a_killed_process_loses_its_names():
    argv = [sys.executable, "-c", HOLD_NAME, "test killed"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(BlockingIOError):
                NameLock(["test killed"])
        finally:
            holder.kill()
        holder.wait()
        NameLock(["test killed"]).release()


def test_programs_that_the_holder_starts_do_not_hold_its_names():
    with subprocess.Popen(["sleep", "60"], close_fds=False) as before:
        lock = NameLock(["test child"])
        with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
            lock.release()
            NameLock(["test child"]).release()
            child.kill()
        before.kill()
