"""Parser of docstrings, from which the help of commands and options is taken."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def split_docstring(docstring: str | None, section: str) -> tuple[str, dict[str, str]]:
    """The text before a section such as `Args`, and the section's entries by name."""
    text, _, entries = inspect.cleandoc(docstring or "").partition(f"\n{section}:\n")
    return text.strip(), {name: " ".join(one.split()) for name, one in _ENTRY.findall(entries)}
