"""Repair of LanceDB tables after a power loss.

A commit is acknowledged once all its files are synced. A power loss before that may leave a
truncated manifest, or a complete manifest that names a truncated file. Lance then refuses the
table, or fails when it reads the rows. The table's previous version is complete, and the sender
sends the unacknowledged rows again.

Only such versions are set aside, and only by a writer. A file beside the table names the newest
synced version. If that version or an older one lacks a file, another cause than a power loss
damaged the table, and the newer versions may hold rows that were acknowledged. The table is then
refused and nothing is renamed. If the note is missing or unreadable, all versions count as
synced; tables of other programs have no note.

The layout is Lance's: https://lance.org/format/table/. A manifest file ends with the manifest's
offset, the format's version and a magic number. Data files also end with the magic number.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import struct
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from fletcher.errors import StoreUnavailableError
from fletcher.util.durable import make_folder, sync_path

log = logging.getLogger(__name__)

_MAGIC = b"LANC"
_FOOTER = struct.Struct("<QHH4s")
_HINT = "latest_version_hint.json"
_NEWEST_FIRST = 1 << 63  # numbers in file names from here on count down
_TORN = ".torn"
_SYNCED = "_fletcher_synced"

# Files that an earlier check found complete: size and modification time by path.
WholeFiles = dict[str, tuple[int, int]]


class WholeVersion(NamedTuple):
    """The newest complete version of a table, and the incomplete newer ones.

    Attributes:
        manifest: Manifest of the complete version; None if the table has none.
        torn: Manifests of newer versions, each with its defect.
    """

    manifest: Path | None
    torn: list[tuple[Path, str]]


def find_whole_version(folder: Path, whole: WholeFiles | None = None) -> WholeVersion:
    """Find the version to use. Changes nothing.

    `folder` is the table's folder `NAME.lance`. Files in `whole` that have not changed are not
    opened: for 5,000 files this takes 0.03 s of processor time instead of 0.12 s.

    Raises:
        StoreUnavailableError: The table is damaged, but not by a power loss.
    """
    versions = _newest_first(folder / "_versions")
    synced = _read_synced(folder)
    torn: list[tuple[Path, str]] = []
    for number, manifest in versions:
        reason = find_defect(manifest, folder, whole=whole)
        if not reason:
            return WholeVersion(manifest, torn)
        if synced is None or number <= synced:
            raise StoreUnavailableError(
                f"dataset `{folder.stem}` is damaged: {reason}, and rows that were stored before "
                "need it; put that file back, or delete the dataset",
                field="dataset",
            )
        torn.append((manifest, reason))
    return WholeVersion(None, torn)


def set_torn_versions_aside(folder: Path, whole: WholeFiles | None = None) -> int:
    """Rename manifests of a table's newest incomplete versions; return their number.

    The arguments are those of `find_whole_version`. The caller holds the table's lock.

    Raises:
        StoreUnavailableError: As `find_whole_version`; nothing is renamed.
    """
    torn = find_whole_version(folder, whole).torn
    for manifest, reason in torn:
        log.error("%s is incomplete, using an earlier version: %s", manifest, reason)
        manifest.rename(manifest.with_suffix(_TORN))
    if torn:
        (folder / "_versions" / _HINT).unlink(missing_ok=True)
        sync_path(folder / "_versions")
    return len(torn)


def newest_version(folder: Path) -> tuple[int, Path | None]:
    """Number and manifest of a table's newest version; 0 and None if it has none."""
    versions = _newest_first(folder / "_versions")
    return versions[0] if versions else (0, None)


def written_at(folder: Path) -> dt.datetime | None:
    """Time of a table's newest version; None if it has none."""
    manifest = newest_version(folder)[1]
    if manifest is None:
        return None
    with contextlib.suppress(FileNotFoundError):  # the table is being deleted
        return dt.datetime.fromtimestamp(manifest.stat().st_mtime, dt.UTC)
    return None


def prepare_table(folder: Path) -> None:
    """Make the folder of a new table, with a note that no version is synced.

    `folder` is the table's folder `NAME.lance`.
    """
    make_folder(folder)
    note_synced(folder, 0)
    for path in (folder / _SYNCED, folder):
        sync_path(path)


def note_synced(folder: Path, version: int) -> None:
    """Note that a version and all older ones are on disk.

    The note is not synced itself: an older note makes the repair look at more versions, which are
    complete.
    """
    with contextlib.suppress(OSError):
        file = os.open(folder / _SYNCED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(file, f"{version:020d}".encode(), 0)
        finally:
            os.close(file)


def is_noted_synced(folder: Path, version: int) -> bool:
    """Whether a version is noted as being on disk."""
    return version > 0 and _read_synced(folder) == version


def _read_synced(folder: Path) -> int | None:
    try:
        return int((folder / _SYNCED).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _newest_first(versions: Path) -> list[tuple[int, Path]]:
    """Version numbers and manifests of a table."""
    numbered = []
    for path in versions.glob("*.manifest"):
        if path.stem.isdecimal():
            number = int(path.stem)
            numbered.append(((1 << 64) - 1 - number if number >= _NEWEST_FIRST else number, path))
    return sorted(numbered, reverse=True)


def find_defect(
    manifest: Path, folder: Path, known: Container[str] = (), *, whole: WholeFiles | None = None
) -> str:
    """The defect of a version, with its file's name; empty if the version is complete.

    Args:
        known: Paths of files that are known to be complete.
        whole: Files that an earlier check found complete. Only files that changed since are opened.
            Updated to this version's files.
    """
    data = manifest.read_bytes()
    try:
        offset, _, _, magic = _FOOTER.unpack(data[-_FOOTER.size :])
        if magic != _MAGIC:
            return f"_versions/{manifest.name} is truncated"
        (length,) = struct.unpack_from("<I", data, offset)
        message = _Manifest.FromString(data[offset + 4 : offset + 4 + length])
    except (struct.error, OverflowError, DecodeError):
        return f"_versions/{manifest.name} is truncated"
    if message.base_paths:  # a clone, whose files are in another table's folder
        return ""
    before = whole or {}
    found: WholeFiles = {}
    for path, is_lance in _files(message):
        file = f"{folder}/{path}"
        if file in known:
            continue
        try:
            status = os.stat(file)  # noqa: PTH116 - takes a third of the time of Path.stat
            found[file] = stamp = (status.st_size, status.st_mtime_ns)
            if before.get(file) != stamp and not _is_whole(file, is_lance=is_lance):
                return f"{path} is truncated"
        except FileNotFoundError:
            return f"{path} is missing"
    if whole is not None:
        whole.clear()
        whole.update(found)
    return ""


def _is_whole(file: str, *, is_lance: bool) -> bool:
    with Path(file).open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - len(_MAGIC)))
        return size > 0 and (not is_lance or opened.read() == _MAGIC)


def _files(manifest: Any) -> Iterator[tuple[str, bool]]:
    """Files of a version's rows, and whether each ends with Lance's magic number."""
    for fragment in manifest.fragments:
        for file in fragment.files:
            yield f"data/{file.path}", True
        if fragment.HasField("deletion_file"):
            deleted = fragment.deletion_file
            kind = "bin" if deleted.file_type else "arrow"
            yield f"_deletions/{fragment.id}-{deleted.read_version}-{deleted.id}.{kind}", False


# The part of Lance's `table.proto` that names files: (field, number, type) by message.
_MESSAGES = {
    "DataFile": [("path", 1, "string")],
    "DeletionFile": [("file_type", 1, "int32"), ("read_version", 2, "uint64"), ("id", 3, "uint64")],
    "Fragment": [
        ("id", 1, "uint64"),
        ("files", 2, "DataFile"),
        ("deletion_file", 3, "DeletionFile"),
    ],
    "BasePath": [("id", 1, "uint32")],
    "Manifest": [("fragments", 2, "Fragment"), ("base_paths", 18, "BasePath")],
}
_REPEATED = ("files", "fragments", "base_paths")


def _manifest_type() -> Any:
    proto = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="lance_files.proto", package="lance_files", syntax="proto3"
    )
    for message, fields in _MESSAGES.items():
        added = file.message_type.add(name=message)
        for name, number, kind in fields:
            label = proto.LABEL_REPEATED if name in _REPEATED else proto.LABEL_OPTIONAL
            field = added.field.add(name=name, number=number, label=label)
            if kind in _MESSAGES:
                field.type, field.type_name = proto.TYPE_MESSAGE, f".lance_files.{kind}"
            else:
                field.type = proto.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("lance_files.Manifest"))


_Manifest = _manifest_type()
