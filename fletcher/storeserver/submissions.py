"""Rows and calls that wait for a dataset's commit thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fletcher.stores.base import WriteMode

if TYPE_CHECKING:
    from fletcher.storeserver.group_committer import GroupCommitter


class CommitStream(Counter[str]):
    """Number of rows that one upload call sent, by batch key.

    Counted only for rows that the call sent without announcing groups.
    """


@dataclass
class SubmittedRows:
    """Rows that are committed together.

    Attributes:
        batches: The rows, in batches of one schema.
        mode: How the rows are written.
        whole: The batches hold all rows of their batch keys, so rows whose key is stored are a
            repeat. If False, the same call may send more rows with the same key.
        stream: Counts of the call that sent the rows.
        done: Future that returns the number of stored rows.
    """

    batches: list[pa.RecordBatch]
    mode: WriteMode
    whole: bool
    stream: CommitStream
    done: Future[int] = field(default_factory=Future)

    @property
    def num_rows(self) -> int:
        return sum(batch.num_rows for batch in self.batches)

    @property
    def num_bytes(self) -> int:
        return sum(batch.nbytes for batch in self.batches)


@dataclass
class SubmittedCall:
    """A function to call on the commit thread."""

    function: Callable[[GroupCommitter], Any]
    done: Future[Any] = field(default_factory=Future)
    num_rows = num_bytes = 0
