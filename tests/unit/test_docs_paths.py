"""Links, anchors and paths in the documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from fletcher.cli import root
from fletcher.telemetry.metrics import Instruments

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fletcher"
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    if path.name != "CHANGELOG.md"
)
# Folders of the package that are planned and named as such.
PLANNED = {"http/", "jobs/", "integrations/", "training/"}
REPOSITORY = ("fletcher/", "tests/", "scripts/", "benchmarks/", "examples/", "deploy/", "docs/")
FOLDERS = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        path = document.parent / target if target else document
        assert path.exists(), target
        if anchor and not target.endswith("/"):
            assert anchor in _anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [path for path in _paths(text) if not _exists(path)]
    assert missing == []


def test_metrics_are_documented() -> None:
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(fletcher\.[\w.]+)` \| (\S+) \| .* \| (.*?)\s*\|$", text, re.MULTILINE)
    assert sorted(rows) == sorted(
        (one.name, one.unit.strip("{}").replace("}/", "/"), ", ".join(one.labels))
        for one in Instruments().all()
    )


def test_every_folder_is_in_the_table_of_changes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## Find the place") : text.index("## Write code")]
    named = {path.split("/")[0] for path in _paths(table)}
    generated_or_plain = {"v1", "util"}
    assert FOLDERS - generated_or_plain - named == set()


def test_the_path_finder_sees_a_wrong_path() -> None:
    text = "`delivery/none.py` and `fletcher/none.py`, `pipeline/`, `scripts/test ARGUMENTS`"
    assert [path for path in _paths(text) if not _exists(path)] == [
        "delivery/none.py",
        "fletcher/none.py",
    ]


def _anchors(path: Path) -> set[str]:
    """GitHub's names of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def _paths(text: str) -> list[str]:
    """Code spans that name a file or folder of the repository, or one inside the package."""
    spans = re.findall(r"`([\w.]+/[\w./]*)(?: [^`]*)?`", text)
    return [
        span
        for span in spans
        if span.startswith(REPOSITORY) or span.split("/")[0] in FOLDERS or span in PLANNED
    ]


def _exists(path: str) -> bool:
    return path in PLANNED or (ROOT / path).exists() or (PACKAGE / path).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_command_lines_are_valid(document: Path) -> None:
    text = re.sub(r" \\\n\s*", " ", document.read_text(encoding="utf-8"))
    lines = re.findall(r"(?:^|[`$] |`|\| )(fletcher(?:-serve)? [^`#|\n]*)", text, re.MULTILINE)
    wrong = [line for line in lines if not _is_command(line)]
    assert wrong == []


def test_the_command_finder_sees_a_wrong_option() -> None:
    assert _is_command("fletcher ingest FILE --text body")
    assert not _is_command("fletcher ingest FILE --texts body")
    assert not _is_command("fletcher model made")


def _is_command(line: str) -> bool:
    """Whether a command line names a command, its subcommand, and options of it."""
    program, *words = line.split()
    command: click.Command = root
    if program == "fletcher-serve":
        words.insert(0, "serve")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words.pop(0))
        if found is None:
            return False
        command = found
    # With the settings of the root, as a command keeps the help option of its first context.
    context = click.Context(command, **root.context_settings)
    known = {option for param in command.get_params(context) for option in param.opts}
    return {word for word in words if word.startswith("--")} <= known
