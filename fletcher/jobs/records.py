"""Records of a job's manifest, as its lines of JSON have them (docs/jobs.md)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from fletcher.core.line_range import LineRange

VERSION = 1
State = Literal["pending", "running", "done", "failed", "replaced", "deleted"]


class FileRecord(msgspec.Struct, frozen=True):
    """A file as it was when it was read.

    Attributes:
        path: Absolute path, or URI.
        size: Size in bytes.
        version: Time of the last change of a file on this machine, in nanoseconds since 1970. Of
            another file, a text that changes with the content, such as an ETag.
    """

    path: str
    size: int | None
    version: int | str | None


class JobRecord(msgspec.Struct, kw_only=True, tag="job", tag_field="type"):
    """The first line of a manifest.

    Attributes:
        version: Version of the manifest's format.
        job: Name of the job.
        dataset: Dataset that the rows are sent to.
        store: Address of the store, or the store's name on the server `server`.
        server: Address of the server that embeds; None: the command itself.
        options: Options that change vectors, as fields of EmbedCommand.
        model: The model as `name@hash`.
        command: Arguments of the command that began the job.
        folder: Working folder of that command.
        created: Time of the beginning, ISO 8601 in UTC.
    """

    version: int = VERSION
    job: str
    dataset: str
    store: str | None = None
    server: str | None = None
    options: dict[str, Any] = {}
    model: str = ""
    command: list[str] = []
    folder: str = ""
    created: str = ""


class Fragment(msgspec.Struct, kw_only=True, tag="fragment", tag_field="type", omit_defaults=True):
    """Rows that are sent as one upload.

    They are those of a file, of some lines of one, or of several small files.

    Attributes:
        id: Number of the fragment in the job, from 0.
        files: The files; one unless they are small.
        lines: The lines of the only file; None: all of the files.
        content: SHA-256 in hex of the bytes; of several files, of their digests.
        contents: SHA-256 in hex of each file, if there are several.
        reading: Options that decide rows, such as the text column.
        upload_id: Name of the upload.
        replaces: Fragments whose rows are deleted once all fragments that replace them are done.
    """

    id: int
    files: tuple[FileRecord, ...]
    lines: LineRange | None = None
    content: str
    reading: dict[str, Any]
    upload_id: str
    replaces: tuple[int, ...] = ()
    contents: tuple[str, ...] = ()


class StateRecord(
    msgspec.Struct, kw_only=True, tag="state", tag_field="type", omit_defaults=True, frozen=True
):
    """A new state of a fragment.

    Attributes:
        fragment: Number of the fragment.
        state: `pending` (not begun, or a part is stored), `running`, `done`, `failed` (the file
            cannot be read), `replaced` (newer fragments take its place) or `deleted`.
        rows: Number of rows that were sent.
        rows_stored: Number of rows that are stored.
        rows_failed: Number of rows without a vector.
        model: Model of the vectors, as the server tells it in a summary.
        error: Why it failed.
        at: Time of the change, ISO 8601 in UTC.
    """

    fragment: int
    state: State
    rows: int = 0
    rows_stored: int = 0
    rows_failed: int = 0
    model: str = ""
    error: str | None = None
    at: str = ""


class StampsRecord(
    msgspec.Struct, kw_only=True, tag="files", tag_field="type", omit_defaults=True, frozen=True
):
    """New stamps of a fragment's files, whose bytes are the same.

    Attributes:
        fragment: Number of the fragment.
        files: The files as they are now.
    """

    fragment: int
    files: tuple[FileRecord, ...]


class ChecksumRecord(
    msgspec.Struct, kw_only=True, tag="checksum", tag_field="type", omit_defaults=True, frozen=True
):
    """Checksums of a fragment's rows, as they were found in the store after the run.

    Attributes:
        fragment: Number of the fragment.
        rows: Number of rows.
        checksums: As of `Checksums.to_text`.
    """

    fragment: int
    rows: int
    checksums: str


class SchemaRecord(
    msgspec.Struct, kw_only=True, tag="schema", tag_field="type", omit_defaults=True, frozen=True
):
    """Types of the columns of all files that were read with some options.

    Attributes:
        reading: The options, as in Fragment, with the carried columns.
        schema: The schema as an Arrow IPC message, in base64.
    """

    reading: dict[str, Any]
    schema: str


Record = JobRecord | Fragment | StateRecord | StampsRecord | ChecksumRecord | SchemaRecord


def fragment_name(file: str, num_files: int, lines: LineRange | None) -> str:
    """Name of a fragment for messages; `file` is the name of its first file."""
    if num_files > 1:
        return f"{file} and {num_files - 1:,} more files"
    return file if lines is None else lines.name_in(file)
