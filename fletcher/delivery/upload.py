"""The state of each upload: its received, settled and failed rows.

An upload outlives its connections. A client that lost its connection asks which rows are durable
and sends the other rows. If some of these rows are still pending from the earlier connection, they
are not taken in twice.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fletcher.core.owner import plain_id
from fletcher.core.ranges import RangeSet
from fletcher.errors import FletcherError, UploadConflictError
from fletcher.stores.base import WriteMode
from fletcher.stores.staging import staged_name

MAX_ERRORS = 100
# The name of the store, the name of the dataset, and the upload id.
UploadKey = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class UploadTerms:
    """Settings that are the same for all connections of an upload.

    Attributes:
        durability: When rows are acknowledged. `journal`: once they are journaled or stored.
            `store`: once they are stored. `memory`: once they are received; such rows never count
            as durable.
        mode: How rows are written to the store. `upsert` replaces stored rows with the same id.
            `overwrite` writes to a staged dataset, which replaces the dataset at the end.
        dedupe_by: Key by which duplicates are found and dropped: `id`, `text` or `delta`, which
            compares texts and the carried columns that it names.
            None keeps duplicates.
        fingerprint: Settings that must match when the upload is continued. None if the upload was
            found in the journal; its next connection then sets the fingerprint.
    """

    durability: str
    mode: Literal[WriteMode, "overwrite"] = "append"
    dedupe_by: str | None = None
    fingerprint: tuple[Any, ...] | None = ()


class SettledRanges(NamedTuple):
    """Rows that need not be sent again, as sorted, inclusive ranges (first, last)."""

    stored: list[tuple[int, int]]
    not_stored: list[tuple[int, int]]  # settled rows that the store cannot report


class Upload:
    """One upload. Thread-safe.

    Attributes:
        upload_id: Its id in journal and stores, see `core.owner`.
        changed: Notified whenever rows are taken in, acknowledged or settled, and when the upload
            fails.
        failure: The error that ended the upload; None while it has not failed.
        lost: Whether it ended because its dataset was deleted or replaced.
        connections: Number of connections that feed the upload; guarded by `UploadRegistry`.
        stored_as: Name of the dataset that has the upload's rows.
        incarnation: The dataset's incarnation when the upload was opened. For an upload found in
            the journal: when its first rows were stored. None before that; empty if the dataset has
            no incarnation or was deleted at once.
    """

    def __init__(
        self, dataset: str, upload_id: str, terms: UploadTerms, settled: SettledRanges | None = None
    ) -> None:
        self.dataset = dataset
        self.upload_id = upload_id
        self.terms = terms
        self.changed = threading.Condition(threading.RLock())
        self.failure: FletcherError | None = None
        self.lost = False
        self.connections = 0
        staged = terms.mode == "overwrite"
        self.stored_as = staged_name(dataset, upload_id) if staged else dataset
        self.incarnation: str | None = None
        stored, not_stored = settled or SettledRanges([], [])
        self._settled = RangeSet(stored)
        self._rows_stored = self._settled.count
        for one in not_stored:
            self._settled.add_range(*one)
        # Acknowledged rows. A row is acknowledged when it is in the journal or in the store.
        self._secured = RangeSet(self._settled.ranges())
        self._claimed = RangeSet(self._settled.ranges())
        # Failed rows, and the number of duplicates by the first row of their group. Both cover only
        # rows that are not secured: a client that resumes the upload sends those again.
        self._failing = RangeSet()
        self._duplicates: dict[int, int] = {}
        self._successor: Upload | None = None
        self._rows_failed = 0
        self._rows_deduplicated = 0
        self._errors: list[dict[str, Any]] = []
        self._announced: int | None = None

    @property
    def upsert(self) -> bool:
        return self.terms.mode == "upsert"

    @property
    def dedupe_by(self) -> str | None:
        return self.terms.dedupe_by

    def claim_rows(self, first: int, last: int) -> list[tuple[int, int]]:
        """Take rows in; return the ranges of those that were not taken in before."""
        with self.changed:
            new = self._claimed.missing(first, last)
            num_new = sum(one_last - one_first + 1 for one_first, one_last in new)
            self._rows_deduplicated += last - first + 1 - num_new
            self._claimed.add_range(first, last)
            self.changed.notify_all()
            return new

    def settle_rows(self, first: int, last: int, *, stored: int) -> None:
        """Note that rows are settled. `stored`: number of them that the store got."""
        with self.changed:
            self._secure(first, last)
            if not self._settled.covers(first, last):  # else an earlier call counted them
                self._rows_stored += stored
            self._settled.add_range(first, last)
            self.changed.notify_all()
            successor = self._successor
        if successor is not None:
            successor.settle_rows(first, last, stored=stored)

    def secure_rows(self, first: int, last: int) -> None:
        """Note that the rows `first` to `last` are in the journal, and acknowledge them."""
        with self.changed:
            self._secure(first, last)
            self.changed.notify_all()
            successor = self._successor
        if successor is not None:
            successor.secure_rows(first, last)

    def report_failed_row(self, row: int, row_id: Any, error: FletcherError) -> None:
        with self.changed:
            self._rows_failed += 1
            self._failing.add_range(row, row)
            if len(self._errors) < MAX_ERRORS:
                self._errors.append({"row": row, "id": row_id, **_brief(error)})

    def note_duplicates(self, first: int, num_rows: int) -> None:
        """Set a group's number of duplicates, which count once it is journaled or stored."""
        with self.changed:
            self._duplicates[first] = num_rows

    def fail(self, error: FletcherError, refused: tuple[int, int] | None = None) -> None:
        """End the upload. Its client may later send the unacknowledged rows again.

        `refused`: rows, first and last, that the store refused. They are not durable any more.
        """
        with self.changed:
            if refused is not None:
                self._secured.remove_range(*refused)
            self.failure = self.failure or error
            self._claimed = RangeSet(self._secured.ranges())
            self.changed.notify_all()
            successor = self._successor
        if successor is not None and refused is not None:
            successor.fail(error, refused)

    def lose_rows(self, error: FletcherError) -> None:
        """End the upload, because its settled rows are gone.

        Its client may send them again. Rows that wait in the journal stay durable: they are stored
        in the dataset of that name.
        """
        with self.changed:
            self.failure = self.failure or error
            self.lost, self.incarnation = True, None
            self.forget_settled()

    def forget_settled(self) -> None:
        """Forget settled rows of a lost upload, which may be in a dataset that is gone."""
        with self.changed:
            waiting = [gap for one in self._secured.ranges() for gap in self._settled.missing(*one)]
            self._secured, self._claimed = RangeSet(waiting), RangeSet(waiting)
            self._settled, self._rows_stored = RangeSet(), 0
            self.changed.notify_all()

    def note_replaced(self, incarnation: str | None) -> None:
        """Note that the upload's staged dataset replaced its dataset."""
        with self.changed:
            self.stored_as, self.incarnation = self.dataset, incarnation
            self.changed.notify_all()

    def announce_total(self, num_rows: int) -> None:
        with self.changed:
            self._announced = num_rows

    def covers(self, first: int, last: int) -> bool:
        """Whether all rows from `first` to `last` may be acknowledged."""
        with self.changed:
            return self._secured.covers(first, last)

    @property
    def in_flight(self) -> int:
        """Number of rows that are taken in and not yet acknowledged."""
        with self.changed:
            return self._claimed.count - self._secured.count

    @property
    def pending(self) -> int:
        """Number of rows that are taken in and not yet settled, also journaled ones."""
        with self.changed:
            return self._claimed.count - self._settled.count

    @property
    def complete(self) -> bool:
        """Whether exactly the announced rows are acknowledged and in effect."""
        return self.whole and self.stored_as == self.dataset

    @property
    def whole(self) -> bool:
        """Whether exactly the announced rows, from row 0 on, are acknowledged."""
        with self.changed:
            return self._announced is not None and (
                self._announced == self._claimed.count == self._secured.prefix
            )

    def counts(self) -> dict[str, int]:
        """The totals `rows_*` that each acknowledgement carries."""
        with self.changed:
            return {
                "rows_received": self._claimed.count,
                "rows_stored": self._rows_stored,
                "rows_failed": self._rows_failed,
                "rows_durable": 0 if self.terms.durability == "memory" else self._secured.prefix,
            }

    def summary(self, model: str) -> dict[str, Any]:
        """The summary, which is the last message of a call."""
        with self.changed:
            errors = list(self._errors)
            if self.failure is not None:
                errors.insert(0, {"row": None, "id": None, **_brief(self.failure)})
            return {
                "type": "summary",
                "upload_id": plain_id(self.upload_id),
                "complete": self.complete and self.failure is None,
                **self.counts(),
                "rows_deduplicated": self._rows_deduplicated,
                "model": model,
                "errors": errors,
                "errors_truncated": self._rows_failed > len(self._errors),
            }

    def status(self) -> dict[str, Any]:
        """The answer to the action `upload_status`."""
        with self.changed:
            durable = [] if self.terms.durability == "memory" else self._secured.ranges()
            return {
                "rows_durable": self.counts()["rows_durable"],
                "ranges": [list(one) for one in durable],
                "complete": self.complete,
            }

    def hand_over_to(self, successor: Upload) -> None:
        """Continue this failed or lost upload as `successor`; settled rows keep counting.

        The successor's rows come from the store, which was asked a moment ago. More rows of this
        upload may have settled since. Rows that the store has, but that did not settle here, count
        as stored, as they do after a restart.
        """
        with self.changed, successor.changed:
            found = sum(
                gap_last - gap_first + 1
                for first, last in successor._settled.ranges()
                for gap_first, gap_last in self._settled.missing(first, last)
            )
            for first, last in self._settled.ranges():
                successor.settle_rows(first, last, stored=0)
            for first, last in self._secured.ranges():
                successor.secure_rows(first, last)
            successor._rows_stored = self._rows_stored + found
            successor._rows_deduplicated = self._rows_deduplicated
            successor._rows_failed = self._rows_failed - self._failing.count
            successor._errors = [
                one for one in self._errors if not self._failing.covers(one["row"], one["row"])
            ]
            self._successor = successor

    def adopt_terms(self, terms: UploadTerms) -> None:
        """Set the terms of an upload that was found in the journal.

        Raises:
            UploadConflictError: Either the journaled rows or the new rows replace rows with the
                same id, but not both.
        """
        with self.changed:
            if (terms.mode == "upsert") != self.upsert:
                raise terms_conflict(self.dataset, self.upload_id)
            self.terms = terms

    def settle_found(self, settled: SettledRanges) -> None:
        """Settle rows that had settled before this upload was found in the journal."""
        with self.changed:
            for first, last in settled.stored:
                for new in self._settled.missing(first, last):
                    self.settle_rows(*new, stored=new[1] - new[0] + 1)
            for first, last in settled.not_stored:
                self.settle_rows(first, last, stored=0)

    def _secure(self, first: int, last: int) -> None:
        self._claimed.add_range(first, last)  # matters only if the upload failed meanwhile
        self._secured.add_range(first, last)
        self._failing.remove_range(first, last)
        self._rows_deduplicated += self._duplicates.pop(first, 0)


def terms_conflict(dataset: str, upload_id: str) -> UploadConflictError:
    return UploadConflictError(
        f"upload {plain_id(upload_id)!r} into `{dataset}` was begun with another schema, model, "
        "mode, dedupe or durability; finish it as begun, or choose another `upload_id`",
        field="upload_id",
    )


def _brief(error: FletcherError) -> dict[str, str]:
    return {"code": error.code, "message": error.message}
