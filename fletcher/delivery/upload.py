"""The ledger of one upload: which rows were taken in, which are settled, and how it went.

An upload outlives the connections that feed it: a client that lost its connection asks what is
durable and sends the rest, and rows that are still on their way from the earlier connection are not
taken in twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from fletcher.delivery.ranges import RangeSet
from fletcher.errors import FletcherError

MAX_ERRORS = 100


class Upload:
    """Thread-safe; `changed` is notified whenever rows settle or the upload fails.

    Args:
        dataset: Where its rows go.
        upload_id: Its name.
        fingerprint: What all its connections must agree on.
        durable: Rows that are stored count as durable (`durability: store`).
        upsert: Its rows replace those of the same id.
        stored: Row ranges that the store holds already.
    """

    def __init__(
        self,
        dataset: str,
        upload_id: str,
        *,
        fingerprint: tuple[Any, ...],
        durable: bool,
        upsert: bool = False,
        stored: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.dataset = dataset
        self.upload_id = upload_id
        self.fingerprint = fingerprint
        self.upsert = upsert
        self.changed = threading.Condition(threading.RLock())
        self.failure: FletcherError | None = None
        self.connections = 0
        self._durable = durable
        self._claimed = RangeSet(stored)
        self._settled = RangeSet(stored)
        self._rows_stored = self._settled.count
        self._rows_failed = 0
        self._rows_deduplicated = 0
        self._errors: list[dict[str, Any]] = []
        self._announced: int | None = None

    def claim(self, first: int, last: int) -> list[tuple[int, int]]:
        """Takes rows in, and returns those parts that were not taken in before."""
        with self.changed:
            new = self._claimed.missing(first, last)
            self._claimed.add(first, last)
            self.changed.notify_all()
            return new

    def settle(self, first: int, last: int, *, stored: int) -> None:
        """Rows first..last are done: `stored` of them are in the store, the others failed."""
        with self.changed:
            self._claimed.add(first, last)  # no news, unless the upload failed meanwhile
            self._settled.add(first, last)
            self._rows_stored += stored
            self.changed.notify_all()

    def report(self, row: int, row_id: Any, error: FletcherError) -> None:
        """Notes why a row has no vector."""
        with self.changed:
            self._rows_failed += 1
            if len(self._errors) < MAX_ERRORS:
                self._errors.append(
                    {"row": row, "id": row_id, "code": error.code, "message": error.message}
                )

    def fail(self, error: FletcherError) -> None:
        """The upload cannot go on; its unsettled rows may be sent again later."""
        with self.changed:
            self.failure = self.failure or error
            for first, last in self._unsettled():
                self._claimed.remove(first, last)
            self.changed.notify_all()

    def announce(self, num_rows: int) -> None:
        """The client says how many rows the whole upload has."""
        with self.changed:
            self._announced = num_rows

    def covers(self, first: int, last: int) -> bool:
        """Whether rows first..last are settled."""
        with self.changed:
            return self._settled.covers(first, last)

    @property
    def in_flight(self) -> int:
        """Rows taken in and not settled."""
        with self.changed:
            return self._claimed.count - self._settled.count

    @property
    def complete(self) -> bool:
        """The client said how many rows there are, and just these are settled."""
        with self.changed:
            return self._announced is not None and (
                self._announced == self._claimed.count == self._settled.prefix
            )

    def counts(self) -> dict[str, int]:
        """The cumulative `rows_*` of acknowledgements."""
        with self.changed:
            return {
                "rows_received": self._claimed.count,
                "rows_stored": self._rows_stored,
                "rows_failed": self._rows_failed,
                "rows_durable": self._settled.prefix if self._durable else 0,
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
                "ranges": [list(one) for one in self._settled.ranges()] if self._durable else [],
                "complete": self.complete,
            }

    def settled_ranges(self) -> list[tuple[int, int]]:
        """Inclusive ranges of rows that are done."""
        with self.changed:
            return self._settled.ranges()

    def _unsettled(self) -> list[tuple[int, int]]:
        return [
            gap
            for first, last in self._claimed.ranges()
            for gap in self._settled.missing(first, last)
        ]


def _brief(error: FletcherError) -> dict[str, str]:
    return {"code": error.code, "message": error.message}
