"""Plan of a job: fragments that are known, new, or replaced."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fletcher.core.line_range import LineRange
from fletcher.errors import InvalidCommandError
from fletcher.jobs.cutting import Piece, cut_lines, has_lines
from fletcher.jobs.manifest import JobState
from fletcher.jobs.records import FileRecord, Fragment, fragment_name
from fletcher.readers.files import InputFile
from fletcher.readers.sources import find_files

# If there are at least MIN_SMALL_FILES new files of at most SMALL_BYTES, they share fragments. So
# thousands of small files do not take one commit each.
SMALL_BYTES = 64 << 10
MIN_SMALL_FILES = 16
SHARED_BYTES = 4 << 20
SHARED_FILES = 5000


@dataclass(slots=True)
class PlannedFragment:
    """A fragment of the input.

    Attributes:
        files: The input files; one unless they are small.
        stamps: The same files, as the manifest describes them.
        lines: The lines of the only file; None: all of the files.
        content: SHA-256 in hex of the bytes.
        known: The manifest's fragment with these bytes; None: a new one.
        replaces: Numbers of the fragments that a new one replaces.
        contents: SHA-256 in hex of each file, if there are several.
    """

    files: list[InputFile]
    stamps: tuple[FileRecord, ...]
    lines: LineRange | None
    content: str
    known: Fragment | None = None
    replaces: tuple[int, ...] = ()
    contents: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name for messages."""
        return fragment_name(self.files[0].name, len(self.files), self.lines)

    def rows_done(self, state: JobState) -> int | None:
        """Number of rows that are stored; None: the fragment is not done."""
        if self.known is None or state.state(self.known) != "done":
            return None
        return state.states[self.known.id].rows

    @property
    def is_whole_file(self) -> bool:
        """Whether the fragment is all of one file."""
        whole = self.lines is None or (self.lines.start, self.lines.stop) == (0, self.files[0].size)
        return whole and len(self.files) == 1

    @property
    def parts(self) -> list[InputFile]:
        """The files to read, with the lines to read."""
        return self.files if self.lines is None else [self.files[0].part(self.lines)]


@dataclass(slots=True)
class Plan:
    """Fragments of the input.

    Attributes:
        fragments: The fragments, in the order of sending.
        replaced: Fragments whose rows are deleted once those that replace them are done.
        lost: Paths of files that no longer exist, and whose rows are among the deleted ones.
    """

    fragments: list[PlannedFragment] = field(default_factory=list)
    replaced: list[Fragment] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def unfinished(self, state: JobState, limit: int | None = None) -> list[PlannedFragment]:
        """Fragments that are not done, among those with the first `limit` rows."""
        left = limit
        found = []
        for one in self.fragments:
            if left is not None and left <= 0:
                break
            rows = one.rows_done(state)
            if rows is None:
                found.append(one)
            elif left is not None:
                left -= rows
        return found


class Planner:
    """Comparison of input files with what a manifest says.

    Args:
        state: The manifest's state.
        reading: Options that decide rows.
        holds_paths: The rows hold paths, so that a file of another name has other rows.
        cuts_lines: Files of lines may be cut.
        verify_content: Hash all files, also those with the known size and time.
    """

    def __init__(
        self,
        state: JobState,
        reading: dict[str, Any],
        *,
        holds_paths: bool = False,
        cuts_lines: bool = True,
        verify_content: bool = False,
    ) -> None:
        self._state = state
        self._known = [one for one in state.current() if one.reading == reading]
        self._format = reading.get("format")
        self._holds_paths = holds_paths
        self._cuts_lines = cuts_lines
        self._verify_content = verify_content

    def plan(self, files: Sequence[InputFile]) -> Plan:
        """Plan the fragments of some files.

        Files whose size and time are known are not read.

        Raises:
            InvalidCommandError: A file cannot be read.
        """
        inputs = {file_record(file).path: file for file in files}
        stamps = {path: file_record(file) for path, file in inputs.items()}
        if not self._holds_paths:
            self._find_renamed(inputs, stamps)
        here = [one for one in self._known if any(file.path in inputs for file in one.files)]
        suspect = [one for one in here if self._may_differ(one, stamps)]
        changed = _paths(suspect)
        # A file of lines has several fragments, and one that is suspect makes the others so.
        suspect = [one for one in here if changed & _paths([one])]
        lost = []
        for path in sorted(changed - inputs.keys()):  # small files beside a changed one
            if (file := self._named(path)) is None:
                lost.append(path)
            else:
                inputs[path], stamps[path] = file, file_record(file)
        suspect_ids = {one.id for one in suspect}
        same = [one for one in here if one.id not in suspect_ids]
        rest = inputs.keys() - _paths(same)
        new = {path: (file, stamps[path]) for path, file in inputs.items() if path in rest}
        cut = list(self._cut(new, suspect))
        self._match(cut, suspect, inputs.keys())
        matched = {one.known.id for one in cut if one.known is not None}
        replaced = [one for one in suspect if one.id not in matched]
        former: dict[str, list[int]] = {}
        for one in replaced:
            for stamp in one.files:
                former.setdefault(stamp.path, []).append(one.id)
        for planned in cut:
            if planned.known is None:
                numbers = [old for stamp in planned.stamps for old in former.get(stamp.path, ())]
                planned.replaces = tuple(dict.fromkeys(numbers))
        kept = [
            PlannedFragment(
                [inputs[file.path] for file in one.files if file.path in inputs],
                one.files,
                one.lines,
                one.content,
                self._state.fragments[one.id],
            )
            for one in same
        ]
        return Plan(_in_order([*kept, *cut], list(inputs)), replaced, lost)

    def _find_renamed(
        self, inputs: Mapping[str, InputFile], stamps: Mapping[str, FileRecord]
    ) -> None:
        """Give files that share a known fragment, and have another name now, that name."""
        missing: dict[int | None, list[tuple[int, int]]] = {}
        for number, one in enumerate(self._known):
            for place, record in enumerate(one.files if one.contents else ()):
                if record.path not in inputs:
                    missing.setdefault(record.size, []).append((number, place))
        known = _paths(self._known)
        for path, file in inputs.items():
            places = missing.get(stamps[path].size, []) if path not in known else []
            digest = file.content_hash() if places else ""
            for number, place in places:
                one = self._known[number]
                old = one.files[place].path
                if one.contents[place] == digest and self._named(old) is None:
                    files = (*one.files[:place], stamps[path], *one.files[place + 1 :])
                    self._known[number] = msgspec.structs.replace(one, files=files)
                    places.remove((number, place))
                    break

    def _may_differ(self, fragment: Fragment, stamps: dict[str, FileRecord]) -> bool:
        """Whether a file of the input has another size or time.

        A fragment that has not been sent needs all its files.
        """
        is_done = self._state.state(fragment) == "done"
        return self._verify_content or any(
            stamps.get(one.path, one if is_done else None) != one for one in fragment.files
        )

    def _named(self, path: str) -> InputFile | None:
        """A file of the job that is not in the input; None: it is gone."""
        try:
            return find_files([path], self._format)[0]
        except InvalidCommandError:
            return None

    def _cut(
        self, files: dict[str, tuple[InputFile, FileRecord]], before: Sequence[Fragment]
    ) -> Iterator[PlannedFragment]:
        """Cut files that are new or may have changed; `before` has what they were."""
        pieces: dict[str, list[Piece]] = {}
        for old in before:
            if old.lines is not None:
                pieces.setdefault(old.files[0].path, []).append(Piece(old.lines, old.content))
        is_small = {
            path: record.size is not None and record.size <= SMALL_BYTES and path not in pieces
            for path, (_, record) in files.items()
        }
        shares = sum(is_small.values()) >= MIN_SMALL_FILES
        group: list[tuple[InputFile, FileRecord]] = []
        size = 0
        for path, (file, record) in files.items():
            if shares and is_small[path]:
                if group and (
                    size + (record.size or 0) > SHARED_BYTES or len(group) >= SHARED_FILES
                ):
                    yield _shared(group)
                    group, size = [], 0
                group.append((file, record))
                size += record.size or 0
            elif self._cuts_lines and has_lines(file):
                known = sorted(pieces.get(path, []), key=lambda one: one.lines.start)
                for piece in cut_lines(file, known):
                    yield PlannedFragment([file], (record,), piece.lines, piece.content)
            else:
                yield PlannedFragment([file], (record,), None, file.content_hash())
        if group:
            yield _shared(group)

    def _match(
        self, cut: Sequence[PlannedFragment], suspect: Sequence[Fragment], inputs: Set[str]
    ) -> None:
        """Find the known fragments of files that have not changed, or have another name."""
        here = {_identity(one.files, one.lines, one.content): one for one in suspect}
        elsewhere: dict[Any, list[Fragment]] = {}
        for one in () if self._holds_paths else self._known:
            if len(one.files) == 1 and one.files[0].path not in inputs:
                elsewhere.setdefault((one.lines, one.content), []).append(one)
        for planned in cut:
            identity = _identity(planned.stamps, planned.lines, planned.content)
            found = here.pop(identity, None)
            planned.known = None if found is None else self._state.fragments[found.id]
            if planned.known is None and len(planned.files) == 1:
                like = elsewhere.get((planned.lines, planned.content), [])
                renamed = [one for one in like if self._named(one.files[0].path) is None]
                if renamed:
                    planned.known = renamed[0]
                    like.remove(renamed[0])


def _in_order(fragments: list[PlannedFragment], paths: list[str]) -> list[PlannedFragment]:
    """The fragments in the order of their first files in the input."""
    place = {path: number for number, path in enumerate(paths)}
    last = len(place)

    def key(one: PlannedFragment) -> tuple[int, int]:
        first = min(place.get(stamp.path, last) for stamp in one.stamps)
        return first, one.lines.start if one.lines else 0

    return sorted(fragments, key=key)


def _paths(fragments: Sequence[Fragment]) -> set[str]:
    return {file.path for one in fragments for file in one.files}


def _identity(files: Sequence[FileRecord], lines: LineRange | None, content: str) -> Any:
    return tuple(sorted(one.path for one in files)), lines, content


def file_record(file: InputFile) -> FileRecord:
    """The record of a file as it was listed."""
    assert file.file is not None
    path = file.path
    name = file.name if path is None else os.path.abspath(path)  # noqa: PTH100 - links stay links
    return FileRecord(name, file.file.size, file.file.version)


def _shared(group: Sequence[tuple[InputFile, FileRecord]]) -> PlannedFragment:
    contents = tuple(file.content_hash() for file, _ in group)
    content = hashlib.sha256(bytes.fromhex("".join(contents))).hexdigest()
    stamps = tuple(record for _, record in group)
    return PlannedFragment([file for file, _ in group], stamps, None, content, contents=contents)
