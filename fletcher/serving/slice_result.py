"""Output of one row slice, its errors, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fletcher.pipeline.assembly import Output
from fletcher.pipeline.input.row_slice import RowSlice

# A report of a thousand errors must not grow with the ids sent.
_MAX_ID_CHARACTERS = 1024

RowRanges = list[tuple[int, int]]


class SliceResult:
    """Output of one row slice; its memory counts until the next result.

    Attributes:
        row_slice: The input.
        batch: Output rows.
        errors: By row of the slice, why it has no vector.
        ranges: Rows that were claimed, as first and last offsets in the upload; None: all.
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
        """The output row at which a row of the slice begins."""
        return self._output.first_row(row)

    def failed_ids(self) -> dict[int, str | int | None]:
        """Ids of the rows in `errors`; text is cut after its first 1,024 characters."""
        ids = {row: identifier.as_py() for row, identifier in self._output.ids().items()}
        return {
            row: one[:_MAX_ID_CHARACTERS] if isinstance(one, str) else one
            for row, one in ids.items()
        }

    def error_reports(self, limit: int) -> list[dict[str, Any]]:
        """The first `limit` errors, as they cross the wire."""
        ids, row_first = self.failed_ids(), self.row_slice.row_first
        return [
            {"row": row_first + row, "id": ids[row], "code": error.code, "message": error.message}
            for row, error in sorted(self.errors.items())[:limit]
        ]

    def hold(self) -> Callable[[], None]:
        """Count the memory until the returned function is called, on any thread."""
        release, self._release = self._release, None
        assert release is not None
        return release

    def release_unheld(self) -> None:
        """Give the memory back, unless `hold` was called."""
        if self._release is not None:
            self.hold()()
