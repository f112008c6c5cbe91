"""Output of one row slice, its errors, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fletcher.pipeline.assembly import Output
from fletcher.pipeline.input.row_slice import RowSlice

# Longest id in an error report, which may list a thousand rows.
_MAX_ID_CHARACTERS = 1024

RowRanges = list[tuple[int, int]]


class SliceResult:
    """Output of one row slice, and the memory that the slice takes.

    The memory counts as used until the next result is requested; `hold` extends this.

    Attributes:
        row_slice: The row slice that was embedded.
        batch: Output rows.
        errors: Errors of rows without a vector, by the row's index in the slice.
        ranges: Claimed rows, as first and last offsets in the upload; None: all rows.
    """

    __slots__ = ("_output", "_release", "batch", "errors", "ranges", "row_slice")

    def __init__(
        self,
        row_slice: RowSlice,
        output: Output,
        ranges: RowRanges | None,
        release: Callable[[], None],
    ) -> None:
        self.row_slice = row_slice
        self.batch = output.batch
        self.errors = output.errors
        self.ranges = ranges
        self._output = output
        self._release: Callable[[], None] | None = release

    def place(self, row: int) -> int:
        """Index of the first output row of a row of the slice."""
        return self._output.first_row(row)

    def failed_ids(self) -> dict[int, str | int | None]:
        """Ids of the rows in `errors`; text ids are cut to 1,024 characters."""
        ids = {row: identifier.as_py() for row, identifier in self._output.ids().items()}
        return {
            row: one[:_MAX_ID_CHARACTERS] if isinstance(one, str) else one
            for row, one in ids.items()
        }

    def error_reports(self, limit: int) -> list[dict[str, Any]]:
        """The first `limit` errors, in their form on the wire."""
        ids, row_first = self.failed_ids(), self.row_slice.row_first
        return [
            {"row": row_first + row, "id": ids[row], "code": error.code, "message": error.message}
            for row, error in sorted(self.errors.items())[:limit]
        ]

    def hold(self) -> Callable[[], None]:
        """Keep the memory counted until the returned function is called.

        Any thread may call the function.
        """
        release, self._release = self._release, None
        assert release is not None
        return release

    def release_unheld(self) -> None:
        """Release the memory, unless `hold` was called."""
        if self._release is not None:
            self.hold()()
