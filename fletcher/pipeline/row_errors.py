"""Rows of a batch that cannot be embedded, and why."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fletcher.core.batches import Int64Array
from fletcher.errors import (
    FletcherError,
    InvalidCommandError,
    RowTooLargeError,
    UnavailableError,
)
from fletcher.pipeline.input.arrays import null_mask


def ends_call(errors: dict[int, FletcherError], *, abort: bool) -> FletcherError | None:
    """The error of a row that ends its call, if there is one.

    Args:
        errors: By row.
        abort: Whether any does. One that passes always does: the row is sent again later, where a
            row that was reported as failed would stay without its vector.
    """
    passing = (error for error in errors.values() if isinstance(error, UnavailableError))
    first = errors[min(errors)] if errors and abort else None
    return next(passing, first)


class RowErrors:
    """Which rows of a batch cannot be embedded; as masks, for they may be millions."""

    def __init__(self, rows: pa.RecordBatch, sizes: Int64Array, max_row_bytes: int) -> None:
        self._no_text = null_mask(rows.column("text"))
        sizes[self._no_text] = 0  # a null may cover bytes
        self._sizes = sizes
        self._max_row_bytes = max_row_bytes
        self._no_id = null_mask(rows.column("id")) if "id" in rows.schema.names else None

    def first_between(self, first: int, last: int) -> int | None:
        """The first of rows first to last, the last not included, that has an error."""
        rows = slice(first, last)
        failed = self._no_text[rows] | (self._sizes[rows] > self._max_row_bytes)
        if self._no_id is not None:
            failed |= self._no_id[rows]
        return first + int(failed.argmax()) if failed.any() else None

    def between(self, first: int, last: int) -> dict[int, FletcherError]:
        """Errors of rows first to last, the last not included, counted from the first."""
        errors: dict[int, FletcherError] = {}
        rows = slice(first, last)
        for row in np.flatnonzero(self._no_text[rows]).tolist():
            errors[row] = InvalidCommandError("`text` is null", field="text")
        for row in np.flatnonzero(self._sizes[rows] > self._max_row_bytes).tolist():
            errors[row] = RowTooLargeError(
                f"`text` has {self._sizes[first + row]} bytes, at most {self._max_row_bytes} are "
                "accepted",
                field="text",
                allowed=[f"<= {self._max_row_bytes} bytes"],
            )
        if self._no_id is not None:
            for row in np.flatnonzero(self._no_id[rows]).tolist():
                errors[row] = InvalidCommandError(
                    "`id` is null; give every row an id, or leave the column out", field="id"
                )
        return errors
