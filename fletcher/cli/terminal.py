"""Text laid out for a terminal: safe to print, cut to the width that it takes there."""

from __future__ import annotations

import shutil
import sys
import unicodedata


def terminal_width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def printable(text: object) -> str:
    """One line of text without control characters: stored text must not steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def say(line: str) -> None:
    """What is no result, on standard error."""
    print(printable(line), file=sys.stderr, flush=True)


def cut(text: str, width: int) -> str:
    """The beginning of a text that takes at most `width` columns, `…` at the end if it is cut."""
    if columns(text) <= width:
        return text
    taken = 0
    for end, character in enumerate(text):
        taken += columns(character)
        if taken > width - 1:
            return text[:end].rstrip() + "…"
    return text


def padded(text: str, width: int) -> str:
    """The text, cut or filled with spaces to take `width` columns."""
    text = cut(text, width)
    return text + " " * (width - columns(text))


def columns(text: str) -> int:
    """Columns that a text takes on a terminal: East Asian wide characters two, combining none."""
    return sum(
        0
        if unicodedata.combining(character)
        else 2
        if unicodedata.east_asian_width(character) in "WF"
        else 1
        for character in text
    )
