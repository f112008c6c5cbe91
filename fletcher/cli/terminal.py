"""Text for a terminal: safe to print, measured in columns, with optional colour."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.text import Text

# Tables for a pipe or a file are as wide as their cells.
_UNBOUNDED_COLUMNS = 10_000


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream gets colour: only a terminal, unless the environment tells.

    See https://no-color.org and https://force-color.org.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Columns of the terminal; 100 without one."""
    return shutil.get_terminal_size((100, 24)).columns


def printable(text: object) -> str:
    """One line of text without control characters, which could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def say(line: str) -> None:
    """Prints a line that is not a result, to standard error."""
    print(printable(line), file=sys.stderr, flush=True)


def print_json(value: object, indent: int | None = None) -> None:
    """Prints JSON, on one line without `indent`."""
    print(json.dumps(value, ensure_ascii=False, indent=indent, default=str))


def cut(text: str, width: int) -> str:
    """The text in at most `width` columns, with `…` at the end if it is cut."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…"


def padded(text: str, width: int) -> str:
    """The text, cut or filled with spaces to take `width` columns."""
    from rich.cells import set_cell_size

    return set_cell_size(cut(text, width), width)


def columns(text: str) -> int:
    """Columns that a text takes on a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


def styled(text: object, style: str) -> Text:
    """A printable cell of a table with a style such as `red` or `bold`."""
    from rich.text import Text

    return Text(printable(text), style=style)


def grouped(rows: Iterable[Sequence[object]]) -> Iterator[Sequence[object]]:
    """The rows, without a first cell that is that of the row before."""
    for before, row in itertools.pairwise([("",), *rows]):
        yield ("", *row[1:]) if row[0] == before[0] else row


def print_table(
    rows: Iterable[Sequence[object]], *, header: Sequence[str] = (), right: Sequence[int] = ()
) -> None:
    """Prints rows in aligned columns, those of `right` on the right.

    Cells are made printable; those of `styled` keep their style.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(one if isinstance(one, Text) else printable(one) for one in row))
    if not table.row_count and not header:
        return  # rich prints an empty line
    for index, column in enumerate(table.columns):
        # A narrow terminal breaks the last column into lines; nothing is cut.
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
