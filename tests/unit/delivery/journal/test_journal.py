"""Segments on disk: synced groups are recovered from damaged and torn files."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fletcher.delivery.journal import segment as segments
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.root import JournalSpace, lock_journal
from fletcher.delivery.journal.segment import Damage, GroupInfo, Segment, read_segment
from fletcher.errors import ConfigError, JournalFullError, StoreUnavailableError

SCHEMA = pa.schema(
    {"id": pa.utf8(), "vector": pa.list_(pa.field("item", pa.float16()), 4), "n": pa.int32()},
    metadata={"fletcher.model": "m@1"},
)


def rows(first: int, num_rows: int, *, nulls: tuple[int, ...] = ()) -> pa.RecordBatch:
    flat = pa.array(np.arange(4 * num_rows, dtype=np.float16) + first)
    mask = pa.array(np.isin(np.arange(num_rows), nulls)) if nulls else None
    vectors = pa.FixedSizeListArray.from_arrays(flat, type=SCHEMA.field("vector").type, mask=mask)
    ids = [f"row {n}" for n in range(first, first + num_rows)]
    numbers = pa.array([None if n % 3 == 0 else n for n in range(num_rows)], pa.int32())
    return pa.record_batch([ids, vectors, numbers], schema=SCHEMA)


def info(first: int, num_rows: int, **fields: Any) -> GroupInfo:
    return GroupInfo("u", first, first + num_rows - 1, **fields)


@pytest.fixture(autouse=True)
def _files_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Journals that a test leaves open stand for killed processes."""
    made: list[Journal] = []
    construct = Journal.__init__

    def remember(self: Journal, *arguments: Any, **options: Any) -> None:
        construct(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(Journal, "__init__", remember)
    yield
    for one in made:
        if one._file is not None:
            one._file.close()


def journal(folder: Path, **options: Any) -> Journal:
    retention_s = options.pop("retention_s", 0.0)
    fields = {"segment_bytes": 1 << 20, "retention_s": lambda: retention_s, **options}
    return Journal(folder, JournalSpace(1 << 30), **fields)


def fill(folder: Path, num_groups: int = 5, **options: Any) -> Journal:
    one = journal(folder, **options)
    for n in range(num_groups):
        one.append_groups([(info(10 * n, 10), rows(10 * n, 10))], SCHEMA)
    return one


def test_what_was_appended_is_recovered_in_order(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.append_groups(
        [
            (info(0, 3, failed=(1,)), rows(0, 3, nulls=(1,))),
            (info(3, 5, upsert=True), rows(0, 8).slice(3)),
        ],
        SCHEMA,
    )
    # No close: the process was killed.
    groups = journal(tmp_path).recover()
    assert [group.info for group in groups] == [
        info(0, 3, failed=(1,)),
        info(3, 5, upsert=True),
    ]
    assert groups[0].read_batch().equals(rows(0, 3, nulls=(1,)))
    assert groups[1].read_batch().equals(rows(0, 8).slice(3))
    assert groups[0].schema.metadata == SCHEMA.metadata


def test_rows_that_are_several_chunks_are_recovered(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.append_groups([(info(0, 2), rows(0, 7)), (info(2, 1), rows(7, 1))], SCHEMA)
    groups = journal(tmp_path).recover()
    assert [(group.info, group.read_batch().num_rows) for group in groups] == [
        (info(0, 2), 7),
        (info(2, 1), 1),
    ]


def test_a_segment_goes_when_all_its_groups_are_stored(tmp_path: Path) -> None:
    one = fill(tmp_path, 3)
    groups = one._segments[-1].groups
    for group in groups[:2]:
        one.settle_group(group)
    one.close()
    assert len(list(tmp_path.glob("*.arrow"))) == 1
    one.settle_group(groups[2])
    assert list(tmp_path.iterdir()) == []
    assert one.num_bytes == 0


def test_segments_are_rotated_and_counted(tmp_path: Path) -> None:
    space = JournalSpace(1 << 30)
    one = Journal(tmp_path, space, segment_bytes=2000, retention_s=lambda: 0.0)
    for n in range(20):
        one.append_groups([(info(n, 1), rows(n, 1))], SCHEMA)
    files = list(tmp_path.glob("*.arrow"))
    assert len(files) > 2
    assert space.used_bytes == sum(path.stat().st_size for path in files) == one.num_bytes
    groups = journal(tmp_path).recover()
    assert [group.info.first for group in groups] == list(range(20))


def test_another_schema_begins_another_segment(tmp_path: Path) -> None:
    one = journal(tmp_path)
    one.append_groups([(info(0, 1), rows(0, 1))], SCHEMA)
    other = SCHEMA.with_metadata({"fletcher.model": "other@2"})
    one.append_groups([(info(1, 1), rows(0, 1).replace_schema_metadata(other.metadata))], other)
    models = [group.schema.metadata[b"fletcher.model"] for group in journal(tmp_path).recover()]
    assert models == [b"m@1", b"other@2"]


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1))
def test_a_torn_tail_is_cut_and_whole_groups_before_it_stay(
    cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    one = fill(folder)
    ends = [group.offset for group in one._segments[-1].groups[1:]] + [one.num_bytes]
    (path,) = folder.glob("*.arrow")
    size = int(cut * path.stat().st_size)
    os.truncate(path, size)
    recovered = journal(folder)
    groups = recovered.recover()
    whole = sum(end <= size for end in ends)
    assert [group.info.first for group in groups] == [10 * n for n in range(whole)]
    for group in groups:
        assert group.read_batch().equals(rows(group.info.first, 10))
    # It goes on from there.
    recovered.append_groups([(info(100, 10), rows(100, 10))], SCHEMA)
    again = journal(folder).recover()
    assert [group.info.first for group in again] == [10 * n for n in range(whole)] + [100]


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_makes_wrong_rows(
    where: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    fill(folder, 3)
    (path,) = folder.glob("*.arrow")
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(bytes(data))
    for group in journal(folder).recover():
        assert group.read_batch().equals(rows(group.info.first, 10))
        assert group.info.upload_id == "u"


def test_one_damaged_group_does_not_take_those_behind_it(tmp_path: Path) -> None:
    one = fill(tmp_path, 3)
    segment = one._segments[-1]
    middle = segment.groups[1].offset
    data = bytearray(segment.path.read_bytes())
    # The last bytes before the third group are the second one's body.
    data[segment.groups[2].offset - 8] ^= 0xFF
    segment.path.write_bytes(bytes(data))
    found = read_segment(segment.path)
    assert isinstance(found, Segment)
    (damage,) = found.damage
    assert (damage.offset, damage.groups) == (middle, (info(10, 10),))
    assert [group.info.first for group in found.groups] == [0, 20]
    recovered = journal(tmp_path)
    for group in recovered.recover():
        recovered.settle_group(group)
    assert [path.suffix for path in tmp_path.iterdir()] == [".damaged"]


@pytest.mark.parametrize("place", [0, 4, 8, 40])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_groups_behind_an_unreadable_header_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: int, place: int
) -> None:
    one = fill(tmp_path, 3)
    (segment,) = one._segments
    (first,) = read(segment.path).groups[:1]
    offset = segment.groups[lost].offset if lost else first.offset
    flip(segment.path, offset + place, 0x55)
    groups = journal(tmp_path).recover()
    assert [group.info.first // 10 for group in groups] == [n for n in range(3) if n != lost]
    for group in groups:
        assert group.read_batch().equals(rows(group.info.first, 10))
    assert f"u:{10 * lost}-{10 * lost + 9}" in caplog.text


def test_a_segment_without_its_beginning_is_read_by_another_ones_schema(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 4, segment_bytes=1)
    paths = sorted(tmp_path.glob("*.arrow"))
    for place in range(0, 64, 4):
        flip(paths[1], place, 0xA5)
    recovered = journal(tmp_path)
    groups = recovered.recover()
    assert [group.info.first for group in groups] == [0, 10, 20, 30]
    assert paths[1].name in caplog.text
    for group in groups:
        assert group.read_batch().equals(rows(group.info.first, 10))
        recovered.settle_group(group)
    assert [path.name for path in tmp_path.iterdir()] == [f"{paths[1].stem}.damaged"]


def test_what_cannot_be_read_by_any_schema_is_set_aside_and_its_rows_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 2)
    (path,) = tmp_path.glob("*.arrow")
    for place in range(0, 64, 4):
        flip(path, place, 0xA5)
    assert isinstance(read_segment(path), Damage)
    assert journal(tmp_path).recover() == []
    assert [one.suffix for one in tmp_path.iterdir()] == [".damaged"]
    assert "u:0-9, u:10-19" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["000000000009.arrow", "000000000000.settled"])
def test_what_is_no_file_is_named_and_left_alone(tmp_path: Path, name: str, make: Any) -> None:
    """A server that met a named pipe never started."""
    fill(tmp_path, 2)
    make(tmp_path / name)
    with pytest.raises(StoreUnavailableError, match="not a regular file"):
        journal(tmp_path).recover()
    (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}.aside")
    assert [group.info.first for group in journal(tmp_path).recover()] == [0, 10]


@pytest.mark.parametrize("seed", range(30))
def test_bytes_changed_anywhere_lose_only_what_they_hit_and_never_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    chance = random.Random(seed)
    fill(tmp_path, 12, segment_bytes=chance.choice([1, 4000, 1 << 20]))
    paths = sorted(tmp_path.glob("*.arrow"))
    groups = {path: read(path).groups for path in paths}
    hit: set[int] = set()
    for _ in range(chance.randint(1, 4)):
        path = chance.choice(paths)
        size = chance.choice([1, 1, 8, 512])
        place = chance.randrange(path.stat().st_size)
        hit |= {
            group.info.first
            for group in groups[path]
            if place < group.offset + group.num_bytes and group.offset < place + size
        }
        data = bytearray(path.read_bytes())
        data[place : place + size] = chance.randbytes(len(data[place : place + size]))
        path.write_bytes(bytes(data))
    found = [group.info.first for group in journal(tmp_path).recover()]
    assert found == sorted(set(found))
    missing = set(range(0, 120, 10)) - set(found)
    if len(paths) > 1:  # else a lost schema loses the only segment
        assert missing <= hit
    for path in paths if missing else ():
        assert any(path.with_suffix(end).exists() for end in (".arrow", ".damaged", ".torn"))
    assert bool(missing) <= ("journal:" in caplog.text)


def flip(path: Path, place: int, bits: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(bytes(data))


def read(path: Path) -> Segment:
    segment = read_segment(path)
    assert isinstance(segment, Segment)
    return segment


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xff\xff\xff\x10\x00"])
def test_files_that_are_no_segments_are_set_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "000000000007.arrow").write_bytes(content)
    one = journal(tmp_path)
    assert one.recover() == []
    one.append_groups([(info(0, 1), rows(0, 1))], SCHEMA)
    assert (tmp_path / "000000000008.arrow").exists()
    assert not (tmp_path / "000000000007.arrow").exists()


def test_a_full_disk_takes_nothing_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fill(tmp_path, 2)

    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fletcher.delivery.journal.journal.os.fsync", no_room)
    with pytest.raises(JournalFullError):
        one.append_groups([(info(20, 10), rows(20, 10))], SCHEMA)
    monkeypatch.undo()
    one.append_groups([(info(30, 10), rows(30, 10))], SCHEMA)
    groups = journal(tmp_path).recover()
    assert [group.info.first for group in groups] == [0, 10, 30]


def test_a_disk_without_room_for_another_file_is_full_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fill(tmp_path, 1, segment_bytes=1)

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("Path.open", "sync_path"):
        monkeypatch.setattr(f"fletcher.delivery.journal.journal.{name}", no_room)
        with pytest.raises(JournalFullError):
            one.append_groups([(info(10, 10), rows(10, 10))], SCHEMA)
        monkeypatch.undo()
    one.append_groups([(info(20, 10), rows(20, 10))], SCHEMA)
    assert [group.info.first for group in journal(tmp_path).recover()] == [0, 20]
    assert len(list(tmp_path.iterdir())) == 2


def test_sent_segments_are_kept_for_stores_that_are_not_durable(tmp_path: Path) -> None:
    one = fill(tmp_path, 2, retention_s=3600.0)
    groups = list(one._segments[-1].groups)
    one.close()
    for group in groups:
        one.settle_group(group)
    (kept,) = tmp_path.iterdir()
    assert kept.suffix == ".sent"
    assert journal(tmp_path, retention_s=3600.0).recover() == []
    os.utime(kept, (1, 1))
    later = journal(tmp_path, retention_s=3600.0)
    later.recover()
    (group,) = later.append_groups([(info(0, 10), rows(0, 10))], SCHEMA)
    later.close()
    later.settle_group(group)
    assert not kept.exists()


def test_rejected_groups_are_kept_apart(tmp_path: Path) -> None:
    one = fill(tmp_path, 1)
    (group,) = one._segments[-1].groups
    one.rejected.add_group(group, "no such column")
    one.close()
    one.settle_group(group)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".rejected"
    found = read(path)
    assert found.groups[0].read_batch().equals(rows(0, 10))


def test_refused_groups_of_an_upload_whose_id_ends_alike_are_kept(tmp_path: Path) -> None:
    one = journal(tmp_path)
    for name in ("u", "a-u"):
        (group,) = one.append_groups([(GroupInfo(name, 0, 9), rows(0, 10))], SCHEMA)
        one.rejected.add_group(group, "not this")
    one.rejected.drop_replaced("u", lambda _first, _last: True)
    (kept,) = tmp_path.glob("*.rejected")
    assert kept.stem.endswith("-a-u-0-9")


def test_room_comes_back_when_segments_go(tmp_path: Path) -> None:
    space = JournalSpace(500)
    one = Journal(tmp_path, space, segment_bytes=1, retention_s=lambda: 0.0)
    (first,) = one.append_groups([(info(0, 10), rows(0, 10))], SCHEMA)
    one.close()
    assert not space.wait_for_room(0.01)
    waited = threading.Thread(target=space.wait_for_room, args=(30,))
    waited.start()
    one.settle_group(first)
    waited.join(10)
    assert not waited.is_alive()
    assert space.used_bytes == 0


def firsts(folder: Path) -> list[int]:
    return [group.info.first for group in journal(folder).recover() if not group.settled]


def test_what_was_settled_does_not_come_back_after_a_kill(tmp_path: Path) -> None:
    # It was known in memory alone: sent again, it replaced what had come after it.
    one = fill(tmp_path, 4)
    first, second, third, _ = one._segments[-1].groups
    one.settle_group(first)
    one.settle_group(third)
    again = journal(tmp_path)
    assert [group.settled for group in again.recover()] == [True, False, True, False]
    assert [group.info.first for group in again.waiting_groups()] == [10, 30]
    one.settle_group(second)
    assert firsts(tmp_path) == [30]


@pytest.mark.parametrize("end", [b"\1", bytes(8), bytes(16) + b"\1"])
def test_notes_that_were_cut_off_are_mended_before_more_is_noted(
    tmp_path: Path, end: bytes
) -> None:
    one = fill(tmp_path, 3)
    (segment,) = one._segments
    one.settle_group(segment.groups[0])
    with segment.notes.open("ab") as file:
        file.write(end)
    again = journal(tmp_path)
    _, second, _ = again.recover()
    again.settle_group(second)
    assert firsts(tmp_path) == [20]


def test_a_note_that_could_not_be_written_goes_with_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = fill(tmp_path, 3)
    (segment,) = one._segments
    segment.notes.mkdir()
    one.settle_group(segment.groups[0])
    assert "cannot be written" in caplog.text
    segment.notes.rmdir()
    one.settle_group(segment.groups[1])
    assert firsts(tmp_path) == [20]


def test_a_segment_stays_until_its_last_group_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another thread may delete it as soon as nothing in it waits.
    one = journal(tmp_path)
    (group,) = one.append_groups([(info(0, 10, upsert=True), rows(0, 10))], SCHEMA)
    one.close()
    sync_notes = Journal.sync_notes

    def swept(self: Journal, before: Segment | None = None) -> None:
        self.sweep()
        sync_notes(self, before)

    monkeypatch.setattr(Journal, "sync_notes", swept)
    one.settle_group(group)
    assert list(tmp_path.iterdir()) == []


def test_a_segment_that_could_not_be_deleted_is_deleted_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # It was forgotten, with the room that it takes and its notes, which later ones' deletion syncs.
    one = journal(tmp_path, segment_bytes=1)
    for pair in [0, 20, 40]:
        groups = [(info(first, 10), rows(first, 10)) for first in (pair, pair + 10)]
        one.append_groups(groups, SCHEMA)
    first, second, third = one._segments
    num_bytes = one.num_bytes
    first.notes.mkdir()
    for group in [first.groups[0], *second.groups]:
        one.settle_group(group)
    assert "cannot be deleted" in caplog.text
    assert one.num_bytes == num_bytes
    first.notes.rmdir()
    one.sweep()
    assert one._segments == [first, third]
    assert not second.path.exists()
    assert firsts(tmp_path) == [10, 40, 50]


@pytest.mark.parametrize("retention_s", [0.0, 3600.0])
def test_a_deletion_that_failed_half_way_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retention_s: float
) -> None:
    one = fill(tmp_path, 1, retention_s=retention_s)
    one.close()
    with monkeypatch.context() as failing:
        failing.setattr("fletcher.delivery.journal.journal.sync_path", fails(errno.EIO))
        one.settle_group(one._segments[0].groups[0])
    assert one.num_bytes
    one.sweep()
    assert one.num_bytes == 0
    assert [path.suffix for path in tmp_path.iterdir()] == ([".sent"] if retention_s else [])


def test_a_torn_end_stays_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The server did not start.
    fill(tmp_path, 3)
    (path,) = tmp_path.glob("*.arrow")
    os.truncate(path, path.stat().st_size - 8)
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", fails(errno.ENOSPC))
        assert firsts(tmp_path) == [0, 10]
    assert "half a group" in caplog.text
    assert firsts(tmp_path) == [0, 10]
    assert len(list(tmp_path.glob("*.torn"))) == 1


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, JournalFullError), (errno.EIO, StoreUnavailableError)]
)
def test_a_disk_without_room_for_a_journal_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    monkeypatch.setattr(Path, "mkdir", fails(number))
    with pytest.raises(error):
        journal(tmp_path / "d")


def fails(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_segment_that_was_settled_by_a_killed_process_goes_when_the_store_is_there(
    tmp_path: Path,
) -> None:
    one = fill(tmp_path, 2)
    for group in one.waiting_groups():
        one.settle_group(group)
    asked: list[bool] = []

    def away() -> float:
        asked.append(True)
        raise StoreUnavailableError("away")

    space = JournalSpace(1 << 30)
    again = Journal(tmp_path, space, segment_bytes=1 << 20, retention_s=away)
    assert all(group.settled for group in again.recover())
    assert asked == []  # a server starts though its store is away
    again.sweep()
    assert asked == [True]
    assert len(list(tmp_path.glob("*.arrow"))) == 1
    again = journal(tmp_path)
    again.recover()
    again.sweep()
    assert list(tmp_path.iterdir()) == []
    assert space.used_bytes == 0


def test_notes_without_their_segment_are_removed(tmp_path: Path) -> None:
    (tmp_path / "000000000003.settled").write_bytes(bytes(8))
    one = journal(tmp_path)
    assert one.recover() == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_of_an_append_that_failed_in_any_way(tmp_path: Path) -> None:
    # After anything but an OSError the first group came to the disk with the next append.
    one = fill(tmp_path, 1)
    with pytest.raises(pa.ArrowInvalid):
        one.append_groups([(info(10, 10), rows(10, 10)), (info(20, 1), OTHER)], SCHEMA)
    one.append_groups([(info(30, 10), rows(30, 10))], SCHEMA)
    assert firsts(tmp_path) == [0, 30]


OTHER = pa.record_batch({"other": [1]})


def test_a_segment_that_is_deleted_while_it_is_read_is_not_taken_for_unsettled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fill(tmp_path, 2)
    segment = one._segments[0]
    for group in segment.groups:
        segment.note_settled(group)
    segment.write_notes()
    scan = segments._scan

    def scan_while_deleted(*arguments: Any) -> None:
        segment.path.unlink(missing_ok=True)
        segment.notes.unlink(missing_ok=True)
        scan(*arguments)

    monkeypatch.setattr(segments, "_scan", scan_while_deleted)
    found = read_segment(segment.path)
    assert isinstance(found, Segment)
    assert all(group.settled for group in found.groups)


def test_rows_are_not_journaled_while_a_failed_append_cannot_be_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its whole group came back at the next start, beside the same rows in groups of another extent.
    one = fill(tmp_path, 1)
    with monkeypatch.context() as failing:
        failing.setattr("fletcher.delivery.journal.journal.os.fsync", fails(errno.EIO))
        failing.setattr("fletcher.delivery.journal.journal.os.truncate", fails(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            one.append_groups([(info(10, 10), rows(10, 10))], SCHEMA)
    with monkeypatch.context() as failing:
        failing.setattr("fletcher.delivery.journal.journal.os.truncate", fails(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            one.append_groups([(info(10, 5), rows(10, 5))], SCHEMA)
        with pytest.raises(OSError, match="Input/output"):
            one.prepare_replacement()
    assert firsts(tmp_path) == [0, 10]  # of a process that ends now; no client sent the rows again
    one.append_groups([(info(10, 5), rows(10, 5))], SCHEMA)
    groups = journal(tmp_path).recover()
    assert [(group.info.first, group.info.last) for group in groups] == [(0, 9), (10, 14)]


@pytest.mark.parametrize("half", [False, True])
def test_an_append_to_a_deleted_journal_fails_and_the_next_one_makes_it_anew(
    tmp_path: Path, half: bool
) -> None:
    # Rows in files without a name were acknowledged as durable.
    folder = tmp_path / "journal"
    one = fill(folder, 1)
    lost = one._segments[0].groups[0]
    one.settle_group(lost)
    if half:
        (path,) = folder.glob("*.arrow")
        path.unlink()
    else:
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        one.append_groups([(info(10, 10), rows(10, 10))], SCHEMA)
    one.append_groups([(info(10, 10), rows(10, 10))], SCHEMA)
    one.sync_notes()
    assert firsts(folder) == [10]


def test_a_second_server_cannot_use_a_journal_whose_folder_was_deleted(tmp_path: Path) -> None:
    # The file of the only lock was deleted with the folder.
    root = tmp_path / "home" / "journal"
    lock = lock_journal(root)
    shutil.rmtree(root)
    with pytest.raises(ConfigError, match="another server uses the journal"):
        lock_journal(root)
    lock.close()
    lock_journal(root).close()
