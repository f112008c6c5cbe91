"""Actions of a committer and a journal writer, and the outcomes of the actions.

A queue chooses an action while its thread holds a lock. The thread carries out the action without
the lock and reports the outcome to the queue.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fletcher.delivery.groups import Group, Rows, SentGroups
from fletcher.errors import FletcherError, RequestError, StoreUnavailableError
from fletcher.stores.base import WriteMode


@dataclass(frozen=True, slots=True)
class Staged:
    """A staged dataset that is to replace the committer's dataset.

    `settled_keys` are the batch keys of its settled groups (see `SettledGroups`).
    """

    name: str
    incarnation: str
    settled_keys: list[str]


@dataclass(frozen=True, slots=True)
class Opening:
    """A request to prepare the dataset, to replace it, or to delete rows of it.

    A caller that stops waiting cancels `ready`.

    Attributes:
        schema: Schema of the rows for which the dataset is prepared.
        mode: How they will be written.
        staged: The staged dataset that replaces the dataset.
        former: Upload whose rows are deleted.
        ready: Ends with the number of deleted rows, or with None.
        requested: Time of the request (`time.monotonic`).
    """

    schema: pa.Schema | None = None
    mode: WriteMode = "append"
    staged: Staged | None = None
    former: str | None = None
    ready: Future[Any] = field(default_factory=Future)
    requested: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until the time `until` (`time.monotonic`) or the next change."""

    until: float


@dataclass(frozen=True, slots=True)
class Open:
    """Prepare the dataset as `opening` requests."""

    opening: Opening


@dataclass(frozen=True, slots=True)
class Append:
    """Store groups of one kind. `full`: more rows wait after these groups."""

    groups: list[Group]
    full: bool


@dataclass(frozen=True, slots=True)
class Settle:
    """Settle groups that the store has or, with `error`, refused for good.

    Outcome: the groups that could not be settled, which are tried again. If the groups cannot be
    confirmed, it is Unavailable or Failed.

    Attributes:
        sent: The groups if they are not confirmed yet.
        ready_at: Earliest time of the action.
    """

    groups: list[Group]
    error: RequestError | None = None
    sent: SentGroups | None = None
    ready_at: float = -math.inf

    @property
    def delays_appends(self) -> bool:
        """Whether it must precede later appends.

        Rows that replace others must be settled after those. While rows with marked duplicates are
        not settled, no other thread may mark any.
        """
        return self.error is None and (
            self.sent is None or any(group.decided or group.upsert for group in self.groups)
        )


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail the uploads of some rows and release these rows.

    `in_doubt`: the store may hold some of the rows.
    """

    rows: list[Rows]
    error: FletcherError
    in_doubt: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Release rows of failed uploads. `in_doubt`: the store may hold some of them."""

    rows: list[Rows]
    in_doubt: bool


@dataclass(frozen=True, slots=True)
class Rest:
    """Offer to end the committer. Outcome: whether it ends."""


@dataclass(frozen=True, slots=True)
class Write:
    """Write groups of one schema to the journal, with one sync for all."""

    rows: list[Rows]


@dataclass(frozen=True, slots=True)
class CloseSegment:
    """Close the open journal segment.

    `flush`: also send journaled rows now, to make room in the journal.
    """

    flush: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread, and give up the waiting rows and openings."""

    rows: list[Rows]
    openings: tuple[Opening, ...] = ()


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Acknowledgement of the first groups of an append, after `seconds`."""

    sent: SentGroups
    seconds: float


@dataclass(frozen=True, slots=True)
class Unavailable:
    """An append failed with a retryable error.

    The store may hold the first `num_groups` groups.
    """

    num_groups: int
    seconds: float
    error: FletcherError


@dataclass(frozen=True, slots=True)
class Failed:
    """An append failed with an error of an unknown kind, such as a MemoryError.

    The store may hold the first `num_groups` groups. `error` is for clients.
    """

    num_groups: int
    seconds: float
    error: FletcherError


@dataclass(frozen=True, slots=True)
class Refused:
    """The store refused at least one of the first `num_groups` groups for good.

    `error` is the store's own: no other error is final.
    """

    num_groups: int
    error: RequestError


@dataclass(frozen=True, slots=True)
class Unwritten:
    """Rows could not be journaled. `retryable`: another attempt may succeed."""

    rows: list[Rows]
    error: FletcherError
    retryable: bool


def shutting_down() -> StoreUnavailableError:
    """Error for rows and requests that `Stop` gives up, or that arrive after it."""
    return StoreUnavailableError("the server is shutting down")


def unexpected_failure() -> StoreUnavailableError:
    """Error for clients after an error of an unknown kind."""
    return StoreUnavailableError(
        "storing fails in an unexpected way; the server's log has the cause", field="dataset"
    )
