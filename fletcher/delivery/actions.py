"""Actions of a committer and a journal writer, and the outcomes of the actions.

A queue decides under its thread's lock; the thread acts without it and reports the outcome.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import pyarrow as pa

from fletcher.delivery.groups import Group, Rows
from fletcher.errors import FletcherError, StoreUnavailableError
from fletcher.stores.base import WriteMode


@dataclass(frozen=True, slots=True)
class Opening:
    """A request to prepare the dataset; a caller that stops waiting cancels `ready`."""

    schema: pa.Schema
    mode: WriteMode
    ready: Future[None] = field(default_factory=Future)
    requested: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until then (`time.monotonic`), unless something changes."""

    until: float


@dataclass(frozen=True, slots=True)
class Open:
    """Prepare the dataset."""

    opening: Opening


@dataclass(frozen=True, slots=True)
class Append:
    """Store groups of one kind; `full`: more rows wait behind them."""

    groups: list[Group]
    full: bool


@dataclass(frozen=True, slots=True)
class Reject:
    """Fail a group that the store refused for good."""

    group: Group
    error: FletcherError


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail the uploads of rows and release them; `in_doubt`: the store may hold some."""

    rows: list[Rows]
    error: FletcherError
    in_doubt: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Release rows of failed uploads; `in_doubt`: the store may hold some."""

    rows: list[Rows]
    in_doubt: bool


@dataclass(frozen=True, slots=True)
class Rest:
    """Offer to end. Outcome: whether the offer was taken."""


@dataclass(frozen=True, slots=True)
class Write:
    """Journal groups of one schema with one sync."""

    rows: list[Rows]


@dataclass(frozen=True, slots=True)
class CloseSegment:
    """End the open journal segment; `flush`: make room by sending journaled rows."""

    flush: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread; all that waits is given up."""

    rows: list[Rows]
    openings: tuple[Opening, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """The store has the first groups of an append; `slow_down`: it asked for a rest."""

    num_groups: int
    seconds: float
    slow_down: bool = False


@dataclass(frozen=True, slots=True)
class Unavailable:
    """An append failed with a retryable error; its first `num_groups` are in doubt."""

    num_groups: int
    seconds: float
    error: FletcherError


@dataclass(frozen=True, slots=True)
class Refused:
    """The store refused the first `num_groups` of an append, or one of them, for good."""

    num_groups: int
    error: FletcherError


@dataclass(frozen=True, slots=True)
class Unwritten:
    """Rows are not in the journal; `retryable`: they may be later."""

    rows: list[Rows]
    error: FletcherError
    retryable: bool


def shutting_down() -> StoreUnavailableError:
    """Error for rows and requests that are given up by `Stop`, or come after it."""
    return StoreUnavailableError("the server is shutting down")
