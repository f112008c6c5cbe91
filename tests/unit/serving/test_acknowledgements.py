"""Order and content of acknowledgements."""

from __future__ import annotations

from fletcher.core.ranges import RangeSet
from fletcher.serving.store_session import AckQueue


class Upload:
    """Rows that may be acknowledged, and counts that tell when they were asked for."""

    def __init__(self) -> None:
        self.safe = RangeSet()
        self.acks = AckQueue("u", self.safe.covers)

    def counts(self) -> dict[str, int]:
        return {"rows_received": 99, "rows_durable": self.safe.prefix}


def test_nothing_is_due_before_its_rows_are_safe() -> None:
    upload = Upload()
    assert not upload.acks.is_due
    upload.acks.append_batch(0, 0, 9)
    upload.safe.add_range(0, 8)
    assert not upload.acks.is_due
    assert upload.acks.next_ack(upload.counts) is None
    upload.safe.add_range(9, 9)
    assert upload.acks.is_due
    assert upload.acks.next_ack(upload.counts) == {
        "type": "ack",
        "upload_id": "u",
        "batch_id": 0,
        "row_first": 0,
        "row_last": 9,
        "rows_received": 99,
        "rows_durable": 10,
    }
    assert upload.acks.next_ack(upload.counts) is None


def test_batches_are_acknowledged_in_the_order_of_receipt() -> None:
    upload = Upload()
    for batch_id, first in ((7, 0), (8, 10), (9, 20)):
        upload.acks.append_batch(batch_id, first, first + 9)
    upload.safe.add_range(10, 29)  # the first batch takes longer than the others
    assert not upload.acks.is_due
    upload.safe.add_range(0, 9)
    ack = upload.acks.next_ack(upload.counts)
    assert ack is not None
    assert (ack["batch_id"], ack["row_first"], ack["row_last"]) == (9, 0, 29)
    assert not upload.acks.is_due


def test_one_acknowledgement_ends_where_the_next_batch_is_not_safe() -> None:
    upload = Upload()
    for batch_id in range(3):
        upload.acks.append_batch(batch_id, batch_id * 10, batch_id * 10 + 9)
    upload.safe.add_range(0, 19)
    first = upload.acks.next_ack(upload.counts)
    upload.safe.add_range(20, 29)
    second = upload.acks.next_ack(upload.counts)
    assert first is not None
    assert second is not None
    assert (first["row_first"], first["row_last"], first["rows_durable"]) == (0, 19, 20)
    assert (second["row_first"], second["row_last"], second["rows_durable"]) == (20, 29, 30)


def test_a_batch_sent_again_is_acknowledged_again() -> None:
    upload = Upload()
    upload.safe.add_range(0, 9)
    for _ in range(2):
        upload.acks.append_batch(0, 0, 9)
        ack = upload.acks.next_ack(upload.counts)
        assert ack is not None
        assert (ack["row_first"], ack["row_last"]) == (0, 9)


def test_a_batch_without_rows_is_acknowledged_in_its_turn() -> None:
    # A client that waits for an acknowledgement of each batch waited for ever.
    upload = Upload()
    upload.acks.append_batch(0, 0, -1)
    ack = upload.acks.next_ack(upload.counts)
    assert ack is not None
    assert (ack["batch_id"], ack["row_first"], ack["row_last"]) == (0, 0, -1)
    upload.acks.append_batch(1, 0, 9)
    upload.acks.append_batch(2, 10, 9)
    assert not upload.acks.is_due
    upload.safe.add_range(0, 9)
    ack = upload.acks.next_ack(upload.counts)
    assert ack is not None
    assert (ack["batch_id"], ack["row_first"], ack["row_last"]) == (2, 0, 9)
