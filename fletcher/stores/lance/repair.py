"""Repair of LanceDB tables after a power loss.

A commit is acknowledged once all its files are synced. A power loss before that may leave a
truncated manifest, or a complete manifest that names a truncated file. Lance then refuses the
table, or fails when it reads the rows. The table's previous version is complete, and the sender
sends the unacknowledged rows again.

The layout is Lance's: https://lance.org/format/table/. A manifest file ends with the manifest's
offset, the format's version and a magic number. Data files also end with the magic number.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from fletcher.util.durable import sync_path

log = logging.getLogger(__name__)

_MAGIC = b"LANC"
_FOOTER = struct.Struct("<QHH4s")
_HINT = "latest_version_hint.json"
_NEWEST_FIRST = 1 << 63  # numbers in file names from here on count down
_TORN = ".torn"


def set_torn_versions_aside(folder: Path) -> int:
    """Rename manifests of a table's newest incomplete versions; return their number.

    `folder` is the table's folder `NAME.lance`. The caller holds the table's lock.
    """
    num_torn = 0
    for manifest in _newest_first(folder / "_versions"):
        reason = _torn(manifest, folder)
        if not reason:
            break
        log.error("%s is incomplete, using an earlier version: %s", manifest, reason)
        manifest.rename(manifest.with_suffix(_TORN))
        num_torn += 1
    if num_torn:
        (folder / "_versions" / _HINT).unlink(missing_ok=True)
        sync_path(folder / "_versions")
    return num_torn


def _newest_first(versions: Path) -> list[Path]:
    numbered = []
    for path in versions.glob("*.manifest"):
        if path.stem.isdecimal():
            number = int(path.stem)
            numbered.append((-number if number < _NEWEST_FIRST else number - (1 << 64), path))
    return [path for _, path in sorted(numbered)]


def _torn(manifest: Path, folder: Path) -> str:
    """The defect of a version; empty for a complete one."""
    data = manifest.read_bytes()
    try:
        offset, _, _, magic = _FOOTER.unpack(data[-_FOOTER.size :])
        if magic != _MAGIC:
            return "it is truncated"
        (length,) = struct.unpack_from("<I", data, offset)
        message = _Manifest.FromString(data[offset + 4 : offset + 4 + length])
    except (struct.error, OverflowError, DecodeError):
        return "it is truncated"
    for path, is_lance in _files(message):
        file = folder / path
        try:
            size = file.stat().st_size
            with file.open("rb") as opened:
                opened.seek(max(0, size - len(_MAGIC)))
                end = opened.read()
        except FileNotFoundError:
            return f"{path} is missing"
        if not size or (is_lance and end != _MAGIC):
            return f"{path} is truncated"
    return ""


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
    "Manifest": [("fragments", 2, "Fragment")],
}
_REPEATED = ("files", "fragments")


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
