"""Consecutive lines of a file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LineRange:
    """Some lines of a file that is neither compressed nor an array.

    Attributes:
        start: Offset of the first byte.
        stop: Offset after the last byte.
        first_line: Number of the first line, from 1.
    """

    start: int
    stop: int
    first_line: int

    def name_in(self, file: str) -> str:
        """Name of the lines for messages, after the name of their file."""
        return file if self.first_line == 1 else f"{file} from line {self.first_line:,}"
