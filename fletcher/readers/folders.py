"""Search of folders for input files; everything that is left out is named."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from fletcher.errors import InvalidCommandError
from fletcher.readers.files import COMPRESSED, SUFFIXES, format_of
from fletcher.readers.source_files import LocalFile

MAX_KINDS = 5  # maximum number of suffixes or paths that a notice lists

# Folders with files that are not all current: a table format keeps deleted rows for a while.
TABLE_MARKS = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
_ICEBERG = ("metadata", "data")
# Descriptions in a folder that Hugging Face's `save_to_disk` wrote.
_HUGGING_FACE = ("dataset_info.json", "state.json", "dataset_dict.json")
Notice = Callable[[str], None]


def files_below(
    folder: Path, notice: Notice, excluded: Sequence[Path] = (), *, every: bool = False
) -> list[LocalFile]:
    """The input files in a folder and its subfolders, sorted by path.

    Hidden files and the contents of hidden folders are left out. Links to files are followed, links
    to folders are not.

    Args:
        folder: The folder.
        notice: Called with a message about what is left out.
        excluded: Folders inside to leave out, such as that of a store.
        every: Take files of unknown formats, too.

    Raises:
        InvalidCommandError: A folder cannot be read, or has no file to read.
    """
    walk = _Walk(folder, [one.resolve() for one in excluded])
    walk.search(folder)
    found = []
    for file in sorted(walk.files):
        if every or format_of(file.name):
            found.append(LocalFile.at_path(file))
        else:
            walk.unknown[file.suffix.lower()] += 1
    for line in walk.notices():
        notice(line)
    if not found:
        raise no_files(f"the folder {folder}")
    return found


def no_files(where: str) -> InvalidCommandError:
    """The error of a place without input files."""
    return InvalidCommandError(
        f"{where} holds no file to read; expected names that end in {', '.join(SUFFIXES)}, each "
        f"also with {', '.join(COMPRESSED)}"
    )


class _Walk:
    """The regular files below a folder, and what is left out."""

    def __init__(self, top: Path, excluded: Sequence[Path]) -> None:
        self.files: list[Path] = []
        self.unknown: Counter[str] = Counter()
        self._top = top
        self._excluded = excluded
        self._left_out: dict[str, list[str]] = {}

    def search(self, folder: Path) -> None:
        """Search a folder with its subfolders. Raises InvalidCommandError if unreadable."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InvalidCommandError(
                f"cannot read the folder {folder}: {error.strerror}"
            ) from None
        names = {entry.name for entry in entries}
        self._refuse_tables(folder, names)
        listed = _hugging_face_files(folder, names)
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                self._leave_out("are hidden; name one to read it", path)
            elif entry.is_dir(follow_symlinks=False):
                if path.suffix == ".lance" or path.resolve() in self._excluded:
                    self._leave_out("belong to a store", path)
                else:
                    self.search(path)
            elif entry.is_symlink() and not path.exists():
                self._leave_out("are links to nowhere", path)
            elif entry.is_dir():
                self._leave_out("are links to folders; name one to read it", path)
            elif not entry.is_file():
                self._leave_out("are no regular files", path)
            elif listed is not None and entry.name not in listed:
                self._leave_out("are no data of the Hugging Face dataset", path)
            else:
                self.files.append(path)

    def notices(self) -> list[str]:
        """A message for each reason to leave paths out."""
        lines = []
        for reason, paths in self._left_out.items():
            shown = paths[:MAX_KINDS] + (["others"] if len(paths) > MAX_KINDS else [])
            lines.append(f"skipped in {self._top}: {', '.join(shown)}: {reason}")
        if self.unknown:
            lines.append(_unknown_files(self._top, self.unknown))
        return lines

    def _leave_out(self, reason: str, path: Path) -> None:
        self._left_out.setdefault(reason, []).append(str(path.relative_to(self._top)))

    @staticmethod
    def _refuse_tables(folder: Path, names: set[str]) -> None:
        kinds = [kind for mark, kind in TABLE_MARKS.items() if mark in names]
        if names.issuperset(_ICEBERG) and any((folder / "metadata").glob("*.metadata.json")):
            kinds.append("an Iceberg table")
        if kinds:
            raise table_refusal(f"the folder {folder}", kinds[0])


def table_refusal(where: str, kind: str) -> InvalidCommandError:
    """The error for the folder of a table format."""
    return InvalidCommandError(
        f"{where} is {kind}, whose files also hold deleted and replaced rows; export its current "
        "rows to Parquet, or name the files to read"
    )


def _hugging_face_files(folder: Path, names: set[str]) -> set[str] | None:
    """The files with the rows of a Hugging Face dataset; None: the folder is none.

    `state.json` lists them. Other Arrow files are caches. Without a list, all but the descriptions
    hold rows.
    """
    marks = names.intersection(_HUGGING_FACE)
    if not marks:
        return None
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {str(one["filename"]) for one in state["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        arrow = any(name.endswith(".arrow") for name in names)
        return names - marks if arrow or "dataset_dict.json" in marks else None


def _unknown_files(folder: Path, unknown: Counter[str]) -> str:
    number = unknown.total()
    kinds = [f"{count} {kind or 'without a suffix'}" for kind, count in unknown.most_common()]
    shown = kinds[:MAX_KINDS] + (["others"] if len(kinds) > MAX_KINDS else [])
    return (
        f"{number:,} {'file' if number == 1 else 'files'} of unknown kind in {folder} "
        f"{'is' if number == 1 else 'are'} skipped ({', '.join(shown)}); "
        "to read such a file, name it and give --format"
    )
