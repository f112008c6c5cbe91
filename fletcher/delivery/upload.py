"""The ledger of one upload: which rows were taken in, which are settled, and how it went.

An upload outlives the connections that feed it: a client that lost its connection asks what is
durable and sends the rest, and rows that are still on their way from the earlier connection are not
taken in twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from fletcher.core.ranges import RangeSet
from fletcher.errors import FletcherError, UploadConflictError

MAX_ERRORS = 100


class Upload:
    """Thread-safe; `changed` is notified whenever rows settle or the upload fails.

    Args:
        dataset: Where its rows go.
        upload_id: Its name.
        fingerprint: What all its connections must agree on; None: it was found in the journal, and
            the next connection says.
        durability: When its rows are acknowledged: `journal` (journaled or stored), `store`
            (stored), `memory` (as received; they never count as durable).
        upsert: Its rows replace those of the same id.
        known_by: It leaves out rows that the dataset holds, known by `id`, `text` or both
            (`delta`); None: it does not.
        stored: Row ranges that the store holds already.
        unsent: Row ranges that are settled, and of which the store cannot tell.
    """

    def __init__(
        self,
        dataset: str,
        upload_id: str,
        *,
        fingerprint: tuple[Any, ...] | None,
        durability: str,
        upsert: bool = False,
        dedupe_by: str | None = None,
        stored: Iterable[tuple[int, int]] = (),
        unsent: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.dataset = dataset
        self.upload_id = upload_id
        self.fingerprint = fingerprint
        self.upsert = upsert
        self._durability = durability
        self.dedupe_by = dedupe_by
        self.changed = threading.Condition(threading.RLock())
        self.failure: FletcherError | None = None
        self.connections = 0
        self._settled = RangeSet(stored)
        rows_stored = self._settled.count
        for one in unsent:
            self._settled.add_range(*one)
        # What was acknowledged: rows in the journal or in the store, whichever comes first.
        self._secured = RangeSet(self._settled.ranges())
        self._claimed = RangeSet(self._settled.ranges())
        # Of rows that are not secured, which a resume sends again: those that failed, and by a
        # group's first row how many of it are duplicates.
        self._failing = RangeSet()
        self._dropping: dict[int, int] = {}
        self._successor: Upload | None = None
        self._rows_stored = rows_stored
        self._rows_failed = 0
        self._rows_deduplicated = 0
        self._errors: list[dict[str, Any]] = []
        self._announced: int | None = None

    def claim_rows(self, first: int, last: int) -> list[tuple[int, int]]:
        """Takes rows in, and returns those parts that were not taken in before."""
        with self.changed:
            new = self._claimed.missing(first, last)
            num_new = sum(one_last - one_first + 1 for one_first, one_last in new)
            self._rows_deduplicated += last - first + 1 - num_new
            self._claimed.add_range(first, last)
            self.changed.notify_all()
            return new

    def settle_rows(self, first: int, last: int, *, stored: int) -> None:
        """Rows first..last are done: `stored` of them are in the store, the others failed."""
        with self.changed:
            self._keep(first, last)
            if not self._settled.covers(first, last):  # else the store told so already
                self._rows_stored += stored
            self._settled.add_range(first, last)
            self.changed.notify_all()
            successor = self._successor
        if successor is not None:
            successor.settle_rows(first, last, stored=stored)

    def secure_rows(self, first: int, last: int) -> None:
        """Rows first..last are in the journal: they will reach the store whatever dies."""
        with self.changed:
            self._keep(first, last)
            self.changed.notify_all()
            successor = self._successor
        if successor is not None:
            successor.secure_rows(first, last)

    def report_failed_row(self, row: int, row_id: Any, error: FletcherError) -> None:
        """Notes why a row has no vector."""
        with self.changed:
            self._rows_failed += 1
            self._failing.add_range(row, row)
            if len(self._errors) < MAX_ERRORS:
                self._errors.append(
                    {"row": row, "id": row_id, "code": error.code, "message": error.message}
                )

    def note_duplicates(self, first: int, num_rows: int) -> None:
        """So many rows of the group that begins at `first` are duplicates, if it is secured so."""
        with self.changed:
            self._dropping[first] = num_rows

    def fail(self, error: FletcherError) -> None:
        """The upload cannot go on; rows that were not acknowledged may be sent again later."""
        with self.changed:
            self.failure = self.failure or error
            for first, last in self._unsecured():
                self._claimed.remove_range(first, last)
            self.changed.notify_all()

    def announce_total(self, num_rows: int) -> None:
        """The client says how many rows the whole upload has."""
        with self.changed:
            self._announced = num_rows

    def covers(self, first: int, last: int) -> bool:
        """Whether rows first..last may be acknowledged."""
        with self.changed:
            return self._secured.covers(first, last)

    @property
    def in_flight(self) -> int:
        """Rows taken in and not acknowledged."""
        with self.changed:
            return self._claimed.count - self._secured.count

    @property
    def pending(self) -> int:
        """Rows taken in and not settled: on their way, if only from the journal, or refused."""
        with self.changed:
            return self._claimed.count - self._settled.count

    @property
    def journaled(self) -> bool:
        """Its rows go through the journal."""
        return self._durability == "journal"

    @property
    def _durable(self) -> bool:
        return self._durability != "memory"

    @property
    def complete(self) -> bool:
        """The client said how many rows there are, and just these are settled."""
        with self.changed:
            return self._announced is not None and (
                self._announced == self._claimed.count == self._secured.prefix
            )

    def counts(self) -> dict[str, int]:
        """The cumulative `rows_*` of acknowledgements."""
        with self.changed:
            return {
                "rows_received": self._claimed.count,
                "rows_stored": self._rows_stored,
                "rows_failed": self._rows_failed,
                "rows_durable": self._secured.prefix if self._durable else 0,
            }

    def summary(self, model: str) -> dict[str, Any]:
        """The last message of a call."""
        with self.changed:
            errors = list(self._errors)
            if self.failure is not None:
                errors.insert(0, {"row": None, "id": None, **_brief(self.failure)})
            return {
                "type": "summary",
                "upload_id": self.upload_id,
                "complete": self.complete and self.failure is None,
                **self.counts(),
                "rows_deduplicated": self._rows_deduplicated,
                "model": model,
                "errors": errors,
                "errors_truncated": self._rows_failed > len(self._errors),
            }

    def status(self) -> dict[str, Any]:
        """The answer to `upload_status`."""
        with self.changed:
            return {
                "rows_durable": self.counts()["rows_durable"],
                "ranges": [list(one) for one in self._secured.ranges()] if self._durable else [],
                "complete": self.complete,
            }

    def hand_over_to(self, successor: Upload) -> None:
        """This upload failed and is resumed as `successor`, which is new: what is safe counts on.

        The store was asked for the successor's rows a moment ago, and more may have settled since.
        What it holds beside those that settled here counts as it does after a restart.
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

    def begin(
        self,
        fingerprint: tuple[Any, ...],
        *,
        durability: str,
        upsert: bool,
        dedupe_by: str | None,
    ) -> None:
        """An upload known from the journal alone is resumed, and its client says what it is.

        Raises:
            UploadConflictError: Its journaled rows replace those of the same id, or do not, and
                the ones to come are meant otherwise.
        """
        with self.changed:
            if upsert != self.upsert:
                raise conflict(self.dataset, self.upload_id)
            self._durability = durability
            self.dedupe_by = dedupe_by
            self.fingerprint = fingerprint

    def found(self, stored: Iterable[tuple[int, int]], unsent: Iterable[tuple[int, int]]) -> None:
        """Rows that turn out to be settled, of an upload known from the journal alone."""
        with self.changed:
            for first, last in stored:
                for new in self._settled.missing(first, last):
                    self.settle_rows(*new, stored=new[1] - new[0] + 1)
            for first, last in unsent:
                self.settle_rows(first, last, stored=0)

    def _keep(self, first: int, last: int) -> None:
        self._claimed.add_range(first, last)  # no news, unless the upload failed meanwhile
        self._secured.add_range(first, last)
        self._failing.remove_range(first, last)
        self._rows_deduplicated += self._dropping.pop(first, 0)

    def _unsecured(self) -> list[tuple[int, int]]:
        return [
            gap
            for first, last in self._claimed.ranges()
            for gap in self._secured.missing(first, last)
        ]


def conflict(dataset: str, upload_id: str) -> UploadConflictError:
    """That an upload is in progress, and not as the command says."""
    return UploadConflictError(
        f"upload {upload_id!r} into `{dataset}` was begun with another schema, model, mode, "
        "dedupe or durability; finish it as begun, or choose another `upload_id`",
        field="upload_id",
    )


def _brief(error: FletcherError) -> dict[str, str]:
    return {"code": error.code, "message": error.message}
