"""Waits, pauses and poll intervals of delivery."""

from __future__ import annotations

from dataclasses import dataclass

from fletcher.util.backoff import Backoff

_RETRY = Backoff(first_s=0.1, longest_s=10.0, jitter=1.0)


@dataclass(frozen=True, slots=True)
class DeliveryTiming:
    """Waits, pauses and poll intervals of delivery, in seconds.

    Attributes:
        retry: Pauses between tries of an unavailable store.
        opening_timeout_s: Wait of a new upload for its dataset to be prepared, or for another
            connection that opens the same upload.
        committer_linger_s: Idle time after which a committer offers to end.
        decision_wait_s: Wait of a committer for the right to decide what is a duplicate. A journal
            writer holds that right for a sync or two.
        segment_idle_s: Idle time after which the open segment is closed, so that the room of its
            stored groups is given back. Shorter makes more files; longer takes room from other
            datasets.
        journal_poll_s: Time between two tries to write into a full journal.
        flush_poll_s: Poll interval while a flush waits.
        close_timeout_s: Wait for a committer's last append when its sink is closed.
    """

    retry: Backoff = _RETRY
    opening_timeout_s: float = 60.0
    committer_linger_s: float = 5.0
    decision_wait_s: float = 0.2
    segment_idle_s: float = 1.0
    journal_poll_s: float = 0.2
    flush_poll_s: float = 0.02
    close_timeout_s: float = 30.0
