"""The sections of docstrings that are help."""

from __future__ import annotations

from fletcher.util.docstrings import split_docstring


def test_entries_of_a_section_are_read_by_name() -> None:
    """Text
    of two lines.

    Args:
        one: Short: with a colon.
        two: Long, over
            two lines.
    """
    function = test_entries_of_a_section_are_read_by_name
    text, entries = split_docstring(function.__doc__, "Args")
    assert text == "Text\nof two lines."
    assert entries == {"one": "Short: with a colon.", "two": "Long, over two lines."}


def test_a_docstring_without_the_section_has_no_entries() -> None:
    assert split_docstring("Text.", "Args") == ("Text.", {})
    assert split_docstring(None, "Args") == ("", {})
