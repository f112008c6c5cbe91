"""Errors of single rows, and the decision which of them end a call."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fletcher.core.batches import BoolArray, Int64Array
from fletcher.core.encodings import null_mask
from fletcher.errors import FletcherError, InvalidCommandError, RowTooLargeError, UnavailableError
from fletcher.pipeline.input.arrays import large_utf8, text_offsets


def ends_call(errors: dict[int, FletcherError], *, abort: bool) -> FletcherError | None:
    """Returns the row error that ends the call, if there is one.

    A retryable error always ends the call, so that the client sends the row again later. If the row
    were reported as failed, it would stay without a vector. With `abort` any error ends the call.
    """
    retryable = (error for error in errors.values() if isinstance(error, UnavailableError))
    first = errors[min(errors)] if errors and abort else None
    return next(retryable, first)


class RowErrors:
    """Rows of a batch that cannot be embedded.

    Kept as masks, because there may be millions of such rows.

    Args:
        sizes: int64 [num_rows], bytes of each text. Changed in place: nulls get size 0.
        max_row_bytes: Most bytes of a text.
    """

    def __init__(self, rows: pa.RecordBatch, sizes: Int64Array, max_row_bytes: int) -> None:
        self._no_text = null_mask(rows.column("text"))
        sizes[self._no_text] = 0  # offsets of a null may span bytes
        self._sizes = sizes
        self._max_row_bytes = max_row_bytes
        self._no_id = _no_id(rows.column("id")) if "id" in rows.schema.names else None

    def first_between(self, first: int, last: int) -> int | None:
        """Returns the first row with an error, from `first` to `last` (exclusive)."""
        rows = slice(first, last)
        failed = self._no_text[rows] | (self._sizes[rows] > self._max_row_bytes)
        if self._no_id is not None:
            failed |= self._no_id[rows]
        return first + int(failed.argmax()) if failed.any() else None

    def between(self, first: int, last: int) -> dict[int, FletcherError]:
        """Returns the errors of rows `first` to `last` (exclusive).

        Keys are row numbers relative to `first`.
        """
        errors: dict[int, FletcherError] = {}
        rows = slice(first, last)
        for row in np.flatnonzero(self._no_text[rows]).tolist():
            errors[row] = InvalidCommandError(
                "`text` is null, expected a text; an empty one has a vector, too", field="text"
            )
        for row in np.flatnonzero(self._sizes[rows] > self._max_row_bytes).tolist():
            errors[row] = RowTooLargeError(
                f"`text` has {self._sizes[first + row]} bytes, expected at most "
                f"{self._max_row_bytes}; send a shorter one, or raise --max-row-bytes",
                field="text",
                allowed=[f"<= {self._max_row_bytes} bytes"],
            )
        if self._no_id is not None:
            for row in np.flatnonzero(self._no_id[rows]).tolist():
                errors[row] = InvalidCommandError(
                    "`id` is null or empty, expected a value; give every row an id, or leave the "
                    "column out",
                    field="id",
                )
        return errors


def _no_id(ids: pa.Array) -> BoolArray:
    """Rows without an id. An empty id is none: such rows replace each other."""
    missing = null_mask(ids)
    if pa.types.is_integer(ids.type):
        return missing
    return np.asarray(missing | (np.diff(text_offsets(large_utf8(ids))) == 0))
