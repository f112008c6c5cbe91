"""Manifest of a job: JSON lines, to which each change is appended and synced."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from fletcher.errors import ConfigError
from fletcher.jobs.records import (
    VERSION,
    ChecksumRecord,
    Fragment,
    JobRecord,
    Record,
    SchemaRecord,
    StampsRecord,
    State,
    StateRecord,
)
from fletcher.util.closing import Closing
from fletcher.util.durable import sync_path, write_atomically
from fletcher.util.locks import FileLock

MANIFEST = "manifest.jsonl"
# Folder of the jobs' folders in the folder of a store, and in the home folder.
STORE_JOBS, HOME_JOBS = ".jobs", "jobs"
_LOCK = ".lock"
_PID = ".pid"  # of the process that has the lock
_GONE = ("replaced", "deleted")
# A manifest with more lines than this, and more than twice as many as it needs, is rewritten.
_MIN_LINES = 1000
_decoder = msgspec.json.Decoder(Record)


def now() -> str:
    """The time in UTC, ISO 8601 with seconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


class JobState:
    """Content of a manifest: the job, its fragments and their states.

    Attributes:
        job: The job; None before it was begun.
        fragments: All fragments that were ever planned, by number.
        states: The newest state of each fragment.
        checksums: The newest checksums of fragments.
        schemas: Schemas by reading options.
        num_lines: Number of lines that were read or written.
    """

    def __init__(self) -> None:
        self.job: JobRecord | None = None
        self.fragments: dict[int, Fragment] = {}
        self.states: dict[int, StateRecord] = {}
        self.checksums: dict[int, ChecksumRecord] = {}
        self.schemas: list[SchemaRecord] = []
        self.num_lines = 0

    def take(self, record: Record) -> None:
        """Apply a record."""
        self.num_lines += 1
        if isinstance(record, JobRecord):
            self.job = record
        elif isinstance(record, Fragment):
            self.fragments[record.id] = record
            self.states.setdefault(record.id, StateRecord(fragment=record.id, state="pending"))
        elif isinstance(record, StateRecord):
            self.states[record.fragment] = record
            if record.state != "done":
                self.checksums.pop(record.fragment, None)
        elif isinstance(record, ChecksumRecord):
            self.checksums[record.fragment] = record
        elif isinstance(record, StampsRecord):
            self.fragments[record.fragment].files = record.files
        else:
            self.schemas = [one for one in self.schemas if one.reading != record.reading]
            self.schemas.append(record)

    def state(self, fragment: Fragment) -> State:
        """The state of a fragment."""
        return self.states[fragment.id].state

    def current(self) -> list[Fragment]:
        """Fragments that no newer ones replace, in the order of planning."""
        return [one for one in self.fragments.values() if self.state(one) not in _GONE]

    def schema(self, reading: dict[str, Any]) -> str | None:
        """The schema of earlier files with the same reading options."""
        return next((one.schema for one in self.schemas if one.reading == reading), None)

    def records(self) -> Iterable[Record]:
        """The fewest records that say the same."""
        if self.job is not None:
            yield self.job
        yield from self.schemas
        yield from self.fragments.values()
        yield from self.states.values()
        yield from self.checksums.values()


def read_manifest(folder: Path) -> JobState:
    """The state of the job in a folder, which another process may be changing.

    Raises:
        ConfigError: The folder has no manifest, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"`job` is {str(folder)!r}, whose {MANIFEST} cannot be read: {error.strerror}",
            field="job",
        ) from None
    return _parsed(path, content)[0]


def running_process(folder: Path) -> int | None:
    """The process that runs the job in a folder; None: nobody does."""
    try:
        FileLock(folder / _LOCK).release()
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError):
            return int((folder / _PID).read_text())
    except OSError:
        pass
    return None


def _parsed(path: Path, content: bytes) -> tuple[JobState, int]:
    """The state, and the number of bytes of whole lines."""
    state = JobState()
    whole = content.rfind(b"\n") + 1  # a crash may cut the last line
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            record = _decoder.decode(line)
            if isinstance(record, JobRecord) and record.version > VERSION:
                raise ValueError(f"it has version {record.version}, expected at most {VERSION}")
            state.take(record)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{path}: line {number} cannot be read: {error}; repair the line, or move the "
                "file away to begin the job anew",
                field="job",
            ) from None
    return state, whole


class Manifest(Closing):
    """A job's manifest, open for writing by one process. Not thread-safe.

    Attributes:
        folder: Folder of the manifest.
        state: What it says.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the manifest in a folder.

        Raises:
            ConfigError: Another process runs the job, or the manifest cannot be read or written.
        """
        self.folder = folder
        path = folder / MANIFEST
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / _LOCK)
            (folder / _PID).write_text(str(os.getpid()))
        except BlockingIOError:
            raise ConfigError(
                f"the job in {folder} is running in another process; wait for its end, or stop it",
                field="job",
            ) from None
        except OSError as error:
            raise _unusable(folder, error) from None
        try:
            content = path.read_bytes() if path.exists() else b""
            self.state, whole = _parsed(path, content)
            needed = sum(1 for _ in self.state.records())
            if self.state.num_lines > max(_MIN_LINES, 2 * needed):
                self._rewrite(path)
            self._file = path.open("ab", buffering=0)
            if whole < len(content) and self._file.tell() == len(content):
                self._file.truncate(whole)
            if not content:
                sync_path(folder)
        except OSError as error:
            self._lock.release()
            raise _unusable(folder, error) from None
        except BaseException:
            self._lock.release()
            raise

    def append(self, *records: Record) -> None:
        """Write records, and sync them to disk.

        Raises:
            ConfigError: The disk fails.
        """
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        try:
            if self._file.write(lines) != len(lines):
                raise OSError(None, "it is cut short, so the disk may be full")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unusable(self.folder, error) from None
        for record in records:
            self.state.take(record)

    def set_state(self, fragment: Fragment, state: State, **counts: Any) -> None:
        """Write a new state of a fragment."""
        self.append(StateRecord(fragment=fragment.id, state=state, at=now(), **counts))

    def close(self) -> None:
        """Let others run the job. Idempotent."""
        self._file.close()
        self._lock.release()

    def _rewrite(self, path: Path) -> None:
        lines = [msgspec.json.encode(record) + b"\n" for record in self.state.records()]
        write_atomically(path, b"".join(lines))
        self.state.num_lines = len(lines)


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"`job` is {str(folder)!r}, which cannot be used: {error.strerror}", field="job"
    )
