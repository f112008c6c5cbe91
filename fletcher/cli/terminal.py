"""Text for a terminal: made safe to print, measured in columns, coloured."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.text import Text

# Width limit of a table that goes to a pipe or a file, so that its cells are never wrapped.
_UNBOUNDED_COLUMNS = 10_000


def wants_colour(stream: TextIO) -> bool:
    """Whether to print colour to a stream.

    By default only terminals get colour. NO_COLOR (https://no-color.org) and FORCE_COLOR
    (https://force-color.org) turn colour off and on for every stream.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Width of the terminal in columns; 100 if there is no terminal."""
    return shutil.get_terminal_size((100, 24)).columns


def printable(text: object) -> str:
    """The text as one line, without characters that could control the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def counted(number: int | None, what: str = "") -> str:
    """A number with its unit as text, such as `1,000 rows`; `unknown rows` for None."""
    return f"{'unknown' if number is None else f'{number:,}'} {what}".rstrip()


def index_share(rows: int | None, indexed: int | None) -> str:
    """Number of a dataset's rows, and the share that the store's index has."""
    if rows is None or indexed is None:
        return f"{counted(rows, 'rows')}, {counted(indexed)} indexed"
    return f"{rows:,} rows, {indexed:,} indexed ({min(indexed / max(rows, 1), 1):.0%})"


def say(line: str) -> None:
    """Print a message to standard error, which keeps it apart from the results."""
    print(printable(line), file=sys.stderr, flush=True)


def print_json(value: object, indent: int | None = None) -> None:
    """Print a value as JSON; on one line unless `indent` is given.

    Times become ISO 8601 text, and bytes become hexadecimal digits. Characters that standard output
    cannot encode are escaped, such as those of a file's name that is not UTF-8.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=_as_text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, default=_as_text)
    print(text)


def _as_text(value: object) -> str:
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else str(value)


def cut(text: str, width: int) -> str:
    """The text, shortened to `width` columns if it is wider; `…` marks the cut."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…"


def padded(text: str, width: int) -> str:
    """The text in exactly `width` columns: shortened, or filled up with spaces."""
    from rich.cells import set_cell_size

    return set_cell_size(cut(text, width), width)


def columns(text: str) -> int:
    """Number of columns that a text takes on a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


def styled(text: object, style: str) -> Text:
    """The text as a table cell, made printable, in a style such as `red` or `bold`."""
    from rich.text import Text

    return Text(printable(text), style=style)


def grouped(rows: Iterable[Sequence[object]]) -> Iterator[Sequence[object]]:
    """The rows; a first cell that repeats the one of the previous row is empty."""
    for before, row in itertools.pairwise([("",), *rows]):
        yield ("", *row[1:]) if row[0] == before[0] else row


def print_table(
    rows: Iterable[Sequence[object]], *, header: Sequence[str] = (), right: Sequence[int] = ()
) -> None:
    """Print rows in aligned columns.

    Columns whose index is in `right` are right-aligned. Cells are made printable. Cells made by
    `styled` keep their style.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(one if isinstance(one, Text) else printable(one) for one in row))
    if not table.row_count and not header:
        return  # rich would print an empty line
    for index, column in enumerate(table.columns):
        # On a narrow terminal the last column continues on further lines, so that no text is cut.
        column.no_wrap, column.overflow = index < len(table.columns) - 1, "fold"
        column.justify = "right" if index in right else "left"
    is_terminal = sys.stdout.isatty()
    console = Console(
        color_system="standard" if wants_colour(sys.stdout) else None,
        force_terminal=is_terminal,
        width=None if is_terminal else _UNBOUNDED_COLUMNS,
        highlight=False,
        markup=False,
        emoji=False,
    )
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())
