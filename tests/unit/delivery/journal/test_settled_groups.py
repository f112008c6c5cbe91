"""Settled groups of which the store cannot tell are remembered over a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fletcher.delivery.journal import settled_groups as settled_groups_module
from fletcher.delivery.journal.settled_groups import SettledGroups
from fletcher.errors import StoreUnavailableError
from tests.doubles.stores import MemoryStore
from tests.unit.delivery.dedupe.test_index import SCHEMA, delivering, options, send, stored, wait


def test_ranges_are_found_by_upload(tmp_path: Path) -> None:
    one = SettledGroups(tmp_path)
    assert one.ranges_of("u") == []
    one.add_keys(["u:0-9", "u:20-29"])
    one.add_keys(["u:10-19", "other:0-4"])
    assert SettledGroups(tmp_path).ranges_of("u") == [(0, 29)]
    assert SettledGroups(tmp_path).ranges_of("other") == [(0, 4)]
    one.clear()
    one.clear()
    assert one.ranges_of("u") == []


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    SettledGroups(tmp_path).add_keys(["u:0-9"])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b"u:10\xff")
    SettledGroups(tmp_path).add_keys(["u:20-29"])
    assert SettledGroups(tmp_path).ranges_of("u") == [(0, 9), (20, 29)]


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled_groups_module, "_MAX_BYTES", 2000)
    monkeypatch.setattr(settled_groups_module, "_KEPT_UPLOADS", 10)
    one = SettledGroups(tmp_path)
    for number in range(100):
        one.add_keys([f"steady:{number}-{number}", f"u{number}:0-9"])
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 2200
    assert one.ranges_of("steady") == [(0, 99)]
    assert one.ranges_of("u99") == [(0, 9)]
    assert one.ranges_of("u0") == []


def test_a_file_that_cannot_be_shortened_stays_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # What was noted and synced went again, and was noted once more each time.
    monkeypatch.setattr(settled_groups_module, "_MAX_BYTES", 0)
    one = SettledGroups(tmp_path)
    (tmp_path / ".groups.unsent.tmp").mkdir()
    one.add_keys(["u:0-9"])
    one.add_keys(["u:20-29"])
    assert "cannot be shortened" in caplog.text
    assert one.ranges_of("u") == [(0, 9), (20, 29)]


@pytest.mark.parametrize("durability", ["journal", "store"])
def test_a_client_finds_its_dropped_rows_durable_after_a_restart(
    tmp_path: Path, durability: str
) -> None:
    # It was told that they were, then that they were not: a conflict, though nothing was lost.
    store = MemoryStore()
    again = options("again", durability=durability)
    with delivering(store, tmp_path) as delivery:
        first, sink = delivery.open_upload(options("first"), SCHEMA)
        send(sink, first, 0, ("a", "1"), ("b", "2"))
        wait(first)
        upload, sink = delivery.open_upload(again, SCHEMA)
        send(sink, upload, 0, ("a", "1"), ("b", "3"))
        wait(upload)
        assert delivery.flush(30)
        assert upload.counts()["rows_durable"] == 2
    with delivering(store, tmp_path) as delivery:
        assert delivery.upload_status(again)["rows_durable"] == 2
        upload, sink = delivery.open_upload(again, SCHEMA)
        assert upload.claim_rows(0, 1) == []
        assert (upload.counts()["rows_stored"], upload.counts()["rows_durable"]) == (0, 2)
        send(sink, upload, 2, ("c", "4"))
        wait(upload)
        assert stored(delivery, store) == [("a", "1"), ("b", "2"), ("c", "4")]


@pytest.mark.parametrize("durability", ["journal", "store"])
def test_rows_that_were_all_replaced_are_not_wanted_again_after_a_restart(
    tmp_path: Path, durability: str
) -> None:
    # Their key went with them; sent again, they would have replaced the newer ones.
    store = MemoryStore()
    again = options("again", dedupe="off", mode="upsert", durability=durability)
    with delivering(store, tmp_path) as delivery:
        upload, sink = delivery.open_upload(again, SCHEMA)
        send(sink, upload, 0, ("a", "old"), ("b", "old"))
        wait(upload)
        assert delivery.flush(30)
    store.batches["d"].clear()
    with delivering(store, tmp_path) as delivery:
        assert delivery.upload_status(again)["rows_durable"] == 2
        upload, _ = delivery.open_upload(again, SCHEMA)
        assert upload.claim_rows(0, 1) == []


def test_keys_belong_to_one_incarnation(tmp_path: Path) -> None:
    one = SettledGroups(tmp_path)
    one.add_keys(["u:0-4"])  # of a dataset of an earlier release
    one.incarnation = "first"
    one.add_keys(["u:5-9"])
    one.add_keys_of("second", ["v:0-0"])
    one.add_keys(["u:10-10"])
    assert one.ranges_of("u", "") == [(0, 4)]
    assert one.ranges_of("u", "first") == [(5, 10)]
    assert one.ranges_of("v", "first") == []
    assert one.ranges_of("v", "second") == [(0, 0)]
    assert one.ranges_of("u") == [(0, 10)]
    assert one.all_keys() == ["v:0-0", "u:0-10"]


@pytest.mark.parametrize("replaced", [True, False])
def test_a_dataset_that_is_emptied_forgets_them(tmp_path: Path, replaced: bool) -> None:
    store = MemoryStore()
    with delivering(store, tmp_path) as delivery:
        for upload_id in ("first", "again"):
            upload, sink = delivery.open_upload(options(upload_id), SCHEMA)
            send(sink, upload, 0, ("a", "1"))
            wait(upload)
            assert delivery.flush(30)
            delivery.close_upload(upload, sink)
        if replaced:
            terms = options("new", mode="overwrite")
            upload, sink = delivery.open_upload(terms, SCHEMA)
            upload.announce_total(0)
            delivery.complete_upload(terms, upload, sink)
        else:
            store.delete_dataset("d")
            store.open_writer("d", store.schemas["d"], "append")
    with delivering(store, tmp_path) as delivery:
        assert delivery.upload_status(options("again"))["rows_durable"] == 0


def test_they_are_not_acknowledged_before_that_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    seen: list[int] = []
    add = SettledGroups.add_keys

    def fails_once(self: SettledGroups, keys: Any) -> None:
        seen.append(upload.counts()["rows_durable"])
        if len(seen) == 1:
            raise OSError(28, "No space left on device")
        add(self, keys)

    monkeypatch.setattr(SettledGroups, "add_keys", fails_once)
    with delivering(store, tmp_path) as delivery:
        first, sink = delivery.open_upload(options("first"), SCHEMA)
        send(sink, first, 0, ("a", "1"))
        wait(first)
        upload, sink = delivery.open_upload(options("again", durability="store"), SCHEMA)
        send(sink, upload, 0, ("a", "2"))
        wait(upload)
        assert upload.failure is None
    assert seen == [0, 0]


def test_a_file_that_cannot_be_read_now_is_a_passing_fault(tmp_path: Path) -> None:
    """A client that asked for its upload was told of an internal failure, and gave up."""
    (tmp_path / "groups.unsent").mkdir()
    for read in (lambda: SettledGroups(tmp_path).ranges_of("u"), SettledGroups(tmp_path).all_keys):
        with pytest.raises(StoreUnavailableError, match="disk fails"):
            read()
