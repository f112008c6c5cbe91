"""Rules of prose that a program can check, see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.unit.code_shape import ROOT, modules

MAX_FIRST_LINE = 80
# A docstring begins with a noun phrase or an imperative; predicates may begin with "Whether".
CLAUSE = re.compile(r"(What|Who|Where|How|Which|When|Why)\b")
# Phrases that are no plain English.
PHRASES = re.compile(
    r"\b(of (its|their) own|to be had|that passes|of before|goes before|go before|which is none"
    r"|in the house|of the house)\b"
)
SOURCES = modules()
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    if path.name != "glossary.md"  # names the phrases not to use
]


def test_docstrings_begin_with_a_short_noun_phrase_or_imperative() -> None:
    wrong = [
        place for place, line in _first_lines() if len(line) > MAX_FIRST_LINE or CLAUSE.match(line)
    ]
    assert wrong == []


def test_phrases_are_plain_english() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {found[0]}"
        for path in (*SOURCES.values(), *DOCUMENTS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := PHRASES.search(line))
    ]
    assert wrong == []


def _first_lines() -> Iterator[tuple[str, str]]:
    """Place and first line of every docstring."""
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield f"{module}:{getattr(node, 'lineno', 1)}", text.splitlines()[0]
