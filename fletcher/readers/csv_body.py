"""Rows of a CSV file as bytes, up to the first row that pyarrow would misread."""

from __future__ import annotations

import codecs
import io
import re

# A CSV row must fit into one block. The server accepts rows of up to 16 MiB by default.
CSV_BLOCK_BYTES = 32 << 20
_SHOWN_BYTES = 60


class CsvBody:
    r"""File object for `pyarrow.csv`: the rest of a stream, and one more row.

    pyarrow drops a closing quote that has text after it: `"a \"b\" c"` would become `a \b\" c"`.
    The stream therefore ends before such a row, and before a row that is too long. No read ends
    between CR and LF, because pyarrow would drop the LF, even within quotes. The stream begins with
    a byte-order mark, because pyarrow drops one: without it, it would be that of the first value.

    Attributes:
        problem: Fault of the row before which the stream ended early; None if there is none.
    """

    closed = False

    def __init__(
        self, rest: bytes, stream: io.BufferedReader, row: bytes, delimiter: str, *, quoted: bool
    ) -> None:
        self.problem: str | None = None
        self._carry = rest  # an unfinished row
        self._stream = stream
        self._last_row = row
        self._ended = False
        self._ready = b""
        self._start = codecs.BOM_UTF8
        quote = b'"' if quoted else b"(?!)"
        limits = rb"\r\n" + re.escape(delimiter.encode())
        in_quotes = quote + rb'[^"]*+(?:""[^"]*+)*+"'
        plain = b"[^" + (b'"' if quoted else b"") + limits + b"][^" + limits + b"]*+"
        value = b"(?:" + in_quotes + b"|" + plain + b")?+"
        row_of_values = value + b"(?:" + re.escape(delimiter.encode()) + value + b")*+"
        self._row = re.compile(row_of_values)
        # A CR at the very end may be half of a CRLF.
        self._rows = re.compile(b"(?:" + row_of_values + rb"(?:\n|\r\n|\r(?=[^\n])))*+")

    def read(self, size: int) -> bytes:
        while not self._ready and not self._ended:
            self._ready = self._next_rows(size)
            if self._ready:
                self._ready, self._start = self._start + self._ready, b""
        data, self._ready = self._ready[:size], self._ready[size:]
        if len(data) > 1 and data.endswith(b"\r") and self._ready:
            data, self._ready = data[:-1], b"\r" + self._ready
        return data

    def _next_rows(self, size: int) -> bytes:
        """The next whole rows; empty if the next row is not complete yet."""
        more = self._stream.read(size)
        data = self._carry + more
        end = _end(self._rows, data, 0)
        whole = _end(self._row, data, end)
        if whole < len(data) and data[whole : whole + 1] not in b'"\r\n':
            shown = data[end : whole + _SHOWN_BYTES].splitlines()[0].decode(errors="replace")
            self.problem = (
                f"has text after a closing quote: {shown[-2 * _SHOWN_BYTES :]!r}; expected quotes "
                'inside of values to be doubled, as in "a ""b"" c"'
            )
        elif len(data) - end > CSV_BLOCK_BYTES:
            self.problem = f"has more than {CSV_BLOCK_BYTES >> 20} MiB"
        self._carry = data[end:]
        if self.problem is not None or not more:
            self._ended = True
            return data[:end] if self.problem is not None else data + self._last_row
        return data[:end]


def _end(pattern: re.Pattern[bytes], data: bytes, start: int) -> int:
    match = pattern.match(data, start)
    assert match is not None  # both patterns also match zero bytes
    return match.end()
