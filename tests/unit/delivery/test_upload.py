"""The state of one upload."""

from __future__ import annotations

import pytest

from fletcher.delivery.upload import SettledRanges, Upload, UploadTerms
from fletcher.errors import RequestError, StoreUnavailableError

AWAY = StoreUnavailableError("the store is out")
BAD = RequestError("`text` is null")


def upload(durability: str = "journal", stored: list[tuple[int, int]] | None = None) -> Upload:
    return Upload("d", "u", UploadTerms(durability), SettledRanges(stored or [], []))


def test_rows_are_pending_until_the_store_has_them() -> None:
    one = upload()
    one.claim_rows(0, 9)
    assert (one.in_flight, one.pending) == (10, 10)
    one.secure_rows(0, 9)
    assert (one.in_flight, one.pending) == (0, 10)
    one.settle_rows(0, 9, stored=9)
    assert (one.in_flight, one.pending) == (0, 0)


@pytest.mark.parametrize("found", [[], [(0, 9)], [(0, 19)], [(0, 29)]])
def test_what_settled_before_a_failure_counts_as_it_did(found: list[tuple[int, int]]) -> None:
    failed = upload("store")
    failed.claim_rows(0, 39)
    for row in (3, 35):
        failed.report_failed_row(row, row, BAD)
    failed.note_duplicates(10, 4)
    failed.settle_rows(0, 9, stored=9)
    failed.settle_rows(10, 19, stored=6)
    failed.fail(AWAY)
    resumed = upload("store", stored=found)
    failed.hand_over_to(resumed)
    there = 30 if (0, 29) in found else 20  # an answer that was lost
    assert resumed.counts() == {
        "rows_received": there,
        "rows_stored": 15 + there - 20,
        "rows_failed": 1,
        "rows_durable": there,
    }
    summary = resumed.summary("m")
    assert summary["rows_deduplicated"] == 4
    assert [one["row"] for one in summary["errors"]] == [3]


def test_only_rows_that_wait_outlive_the_loss_of_a_dataset() -> None:
    lost = upload()
    lost.claim_rows(0, 39)
    lost.secure_rows(0, 29)
    lost.settle_rows(0, 9, stored=10)
    lost.lose_rows(BAD)
    assert lost.status()["ranges"] == [[10, 29]]
    lost.settle_rows(10, 14, stored=5)  # perhaps in the dataset that is gone
    lost.forget_settled()
    lost.settle_rows(15, 19, stored=5)  # after the store was asked
    again = upload(stored=[])
    lost.hand_over_to(again)
    lost.settle_rows(20, 24, stored=5)
    assert again.claim_rows(0, 39) == [(0, 14), (30, 39)]
    assert again.counts()["rows_stored"] == 10


def test_rows_that_are_sent_again_fail_and_are_dropped_once() -> None:
    failed = upload()
    failed.claim_rows(0, 9)
    failed.report_failed_row(2, "x", BAD)
    failed.note_duplicates(0, 3)
    failed.fail(AWAY)
    resumed = upload()
    failed.hand_over_to(resumed)
    assert resumed.claim_rows(0, 9) == [(0, 9)]
    resumed.report_failed_row(2, "x", BAD)
    resumed.note_duplicates(0, 3)
    resumed.secure_rows(0, 9)
    resumed.settle_rows(0, 9, stored=6)
    summary = resumed.summary("m")
    assert (summary["rows_failed"], summary["rows_deduplicated"]) == (1, 3)
    assert len(summary["errors"]) == 1
    assert summary["rows_stored"] == 6


def test_what_becomes_of_a_failed_uploads_rows_counts_for_the_resumed_one() -> None:
    failed = upload()
    failed.claim_rows(0, 19)
    failed.secure_rows(0, 9)
    failed.fail(AWAY)
    resumed = upload()
    failed.hand_over_to(resumed)
    failed.secure_rows(10, 19)  # it was being journaled
    assert resumed.counts()["rows_durable"] == 20
    failed.settle_rows(0, 9, stored=10)
    assert resumed.counts()["rows_stored"] == 10
    assert resumed.pending == 10


def test_rows_of_a_failed_upload_are_taken_in_again_unless_they_are_acknowledged() -> None:
    one = upload()
    assert one.claim_rows(0, 9) == [(0, 9)]
    one.secure_rows(0, 3)
    one.fail(StoreUnavailableError("the store is out"))
    assert one.claim_rows(0, 9) == [(4, 9)]


def test_rows_that_are_settled_once_more_count_once() -> None:
    one = upload()
    one.claim_rows(0, 9)
    for _ in range(2):
        one.settle_rows(0, 9, stored=8)
    assert one.counts()["rows_stored"] == 8
    one.settle_rows(10, 11, stored=2)
    assert one.counts()["rows_stored"] == 10
