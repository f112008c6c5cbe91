"""A simulated power cut: everything that was not synced is lost.

A process that called `record_syncs` notes each fsync: of a file its length, of a folder its names.
`lose_power` reverts folders to what these notes guarantee by POSIX: a file that was not synced is
empty or short, a name in a folder that was not synced is missing, and a removed or renamed file is
back.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GRAVEYARD = "removed"


def record_syncs(notes: Path) -> None:
    """Note this process's fsyncs from now on, instead of carrying them out.

    Args:
        notes: File for the notes; a folder beside it keeps removed files.
    """
    graveyard = notes.parent / GRAVEYARD
    graveyard.mkdir(exist_ok=True)
    file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    unlink = os.unlink

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        status = os.fstat(number)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(number) as entries:
                names = {entry.name: entry.inode() for entry in entries}
            note: dict[str, Any] = {"inode": status.st_ino, "names": names}
        else:
            note = {"inode": status.st_ino, "size": status.st_size}
        os.write(file, json.dumps(note).encode() + b"\n")

    def bury(path: Any, **more: Any) -> None:
        if str(path).endswith((".arrow", ".settled")):
            grave = graveyard / str(Path(path).stat().st_ino)
            if not grave.exists():
                os.link(path, grave)
        unlink(path, **more)

    os.fsync = os.fdatasync = fsync
    os.unlink = bury


def lose_power(notes: Path, folders: Sequence[Path]) -> list[str]:
    """Undo what processes that have ended did not sync.

    Args:
        notes: As given to `record_syncs`; rewritten, because what remains is on the disk.
        folders: Folders to revert; their own names stay.

    Returns:
        Descriptions of what was undone.
    """
    sizes: dict[int, int] = {}
    names: dict[int, dict[str, int]] = {}
    for line in notes.read_text().splitlines() if notes.exists() else ():
        note = json.loads(line)
        if "names" in note:
            names[note["inode"]] = note["names"]
        else:
            sizes[note["inode"]] = note["size"]
    graveyard = notes.parent / GRAVEYARD
    undone: list[str] = []

    def revert(folder: Path) -> None:
        safe = names.get(folder.stat().st_ino, {})
        present = {path.name: path for path in folder.iterdir() if not path.is_symlink()}
        where = {path.stat().st_ino: path for path in present.values()}
        for name, inode in safe.items():
            if name in present:
                continue
            origin = where.get(inode, graveyard / str(inode))
            if origin.exists():
                undone.append(f"{folder / name} is back")
                os.link(origin, folder / name)
                present[name] = folder / name
        for name, path in sorted(present.items()):
            if safe.get(name) != path.stat().st_ino:
                undone.append(f"{path} is gone")
                _remove(path)
            elif path.is_dir():
                revert(path)
            else:
                size = path.stat().st_size
                kept = sizes.get(path.stat().st_ino, 0)
                if kept < size:
                    undone.append(f"{path} is cut from {size} to {kept}")
                    os.truncate(path, kept)

    for folder in folders:
        revert(folder)
    if graveyard.exists():
        for path in graveyard.iterdir():
            path.unlink()
    notes.unlink(missing_ok=True)
    with notes.open("w") as file:
        for folder in folders:
            for path in [folder, *folder.rglob("*")]:
                if path.is_symlink():
                    continue
                status = path.stat()
                note: dict[str, Any] = {"inode": status.st_ino, "size": status.st_size}
                if path.is_dir():
                    present_now = {one.name: one.lstat().st_ino for one in path.iterdir()}
                    note = {"inode": status.st_ino, "names": present_now}
                file.write(json.dumps(note) + "\n")
    return undone


def _remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _remove(inner)
        path.rmdir()
    else:
        path.unlink()
