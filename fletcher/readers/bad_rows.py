"""Lines of files that cannot be read, and the file that lists them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fletcher.errors import ConfigError, FletcherError

# Called with a file's name, a line's number from 1, its bytes, and why it cannot be read.
OnBadLine = Callable[[str, int, bytes, FletcherError], None]


def fail_on_bad_line(_file: str, _line: int, _data: bytes, error: FletcherError) -> None:
    """Raise the error of the line."""
    raise error from None


def ignore_bad_line(_file: str, _line: int, _data: bytes, _error: FletcherError) -> None:
    """Leave the line out."""


class RejectedLines:
    r"""Lines that are left out, and an optional file that lists them. Not thread-safe.

    The file is created at the first line, and never replaces another one. Each line of it is a JSON
    object with `file`, `row` (the line's number), `id` (null), `code`, `reason` and `line`. Bytes
    of `line` that are not UTF-8 are written as `\xNN`.

    Attributes:
        num_lines: Number of lines that were left out.
    """

    def __init__(self, path: Path | None) -> None:
        """Check the path.

        Raises:
            ConfigError: The file exists, or its folder does not.
        """
        if path is not None and (path.exists() or path.is_symlink()):
            raise ConfigError(
                f"`rejects` is {str(path)!r}, which exists; name a new file", field="rejects"
            )
        if path is not None and not path.parent.is_dir():
            raise ConfigError(
                f"`rejects` is {str(path)!r}, whose folder does not exist; create it first",
                field="rejects",
            )
        self.num_lines = 0
        self._path = path
        self._last: dict[str, int] = {}  # by file, the last line that was left out

    def add_line(self, file: str, line: int, data: bytes, error: FletcherError) -> None:
        """Note a line. A line that is read again is noted once.

        Raises:
            ConfigError: The file of rejected lines cannot be written.
        """
        if line <= self._last.get(file, 0):
            return
        self._last[file] = line
        self.num_lines += 1
        if self._path is None:
            return
        shown = {
            "file": file,
            "row": line,
            "id": None,
            "code": error.code,
            "reason": error.message,
            "line": data.decode(errors="backslashreplace"),
        }
        try:
            with self._path.open("x" if self.num_lines == 1 else "a", encoding="utf-8") as out:
                out.write(json.dumps(shown) + "\n")
        except OSError as failure:
            raise ConfigError(
                f"`rejects` is {str(self._path)!r}, which cannot be written: {failure.strerror}",
                field="rejects",
            ) from None
