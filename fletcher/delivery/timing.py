"""Waits, pauses and poll intervals of delivery."""

from __future__ import annotations

from dataclasses import dataclass

from fletcher.util.backoff import Backoff

_RETRY = Backoff(first_s=0.1, longest_s=10.0, jitter=1.0)


@dataclass(frozen=True, slots=True)
class DeliveryTiming:
    """Waits, pauses and poll intervals of delivery, in seconds.

    Attributes:
        retry: Pauses between attempts to reach an unavailable store.
        opening_timeout_s: How long a connection that opens an upload waits for the dataset to be
            prepared, and for another connection that opens the same upload.
        committer_linger_s: Idle time after which a committer offers to end.
        decision_wait_s: How long a committer waits for the right to decide which rows are
            duplicates. A journal writer holds that right for one or two syncs.
        segment_idle_s: Idle time after which the open segment is closed, to free the disk space of
            its stored groups. A shorter time makes more files. With a longer one, stored groups
            take space from other datasets for longer.
        journal_poll_s: Time between two attempts to write to a full journal.
        flush_poll_s: Poll interval while a flush waits.
        close_timeout_s: How long closing a sink waits for the committer's last append.
    """

    retry: Backoff = _RETRY
    opening_timeout_s: float = 60.0
    committer_linger_s: float = 5.0
    decision_wait_s: float = 0.2
    segment_idle_s: float = 1.0
    journal_poll_s: float = 0.2
    flush_poll_s: float = 0.02
    close_timeout_s: float = 30.0
