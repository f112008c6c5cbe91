"""`fletcher journal`: what waits on this machine's disk for its stores."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fletcher.cli.parser import add_options, read_config
from fletcher.errors import ConfigError

if TYPE_CHECKING:
    from fletcher.delivery.journal.segment import Damage, JournaledGroup, Segment

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Adds `journal` and its own commands."""
    parser = subparsers.add_parser(
        "journal",
        help="show, check and replay rows that wait for their stores",
        description="The journal of this machine's server: FLETCHER_HOME/journal.",
    )
    commands = parser.add_subparsers(dest="journal_command", metavar="COMMAND", required=True)
    status = commands.add_parser("status", help="list files, rows and what became of them")
    verify = commands.add_parser(
        "verify",
        help="check every file and say which rows are damaged",
        description="Compares checksums and row counts, and names the rows of what is damaged. "
        "Changes nothing, and may run beside a server. Exits with 1 where something is damaged.",
    )
    for command in (status, verify):
        command.add_argument("--json", action="store_true", help="print JSON, for machines")
    commands.add_parser(
        "replay",
        help="let the next start of the server send again what was sent or refused",
        description="Makes rows wait again that were sent to a store which may have lost them, or "
        "that a store refused. The server must be stopped; its next start sends them. What the "
        "store holds under its batch_key is not stored twice.",
    )
    for command in commands.choices.values():
        add_options(command, ("home",))


def run(args: argparse.Namespace) -> int:
    """Shows, checks or replays; 1 where something is damaged."""
    root = read_config(args, os.environ, ("home",)).config.home / "journal"
    try:
        if args.journal_command == "replay":
            return _replay(root)
        return _show(root, as_json=args.json, closely=args.journal_command == "verify")
    except PermissionError as error:
        raise ConfigError(
            f"the journal in {str(root)!r} cannot be read: {error.strerror}; run this as the user "
            "that the server runs as",
            field="home",
        ) from None


def _show(root: Path, *, as_json: bool, closely: bool) -> int:
    served = _is_served(root)
    files = list(_files(root))
    damaged = any(one["state"] == "damaged" or one["damage"] for one in files)
    if as_json:
        print(json.dumps({"files": files, "damaged": damaged, "served": served}))
        return 1 if damaged else 0
    if not files:
        print("the journal is empty: nothing waits for a store")
    for one in files:
        parts = len(one["damage"])
        print(
            f"{one['state']:<8} {one['rows']:>10,} rows {one['bytes']:>13,} bytes  "
            f"{one['dataset']}  {one['store']}/{one['file']}"
            + (f", damaged in {parts} {'place' if parts == 1 else 'places'}" if parts else "")
        )
        for line in _findings(one) if closely else ():
            print(f"         {line}")
    if closely and files:
        rows = sum(one["rows"] for one in files)
        verdict = "some are damaged" if damaged else "all right"
        print(f"{len(files)} files, {rows:,} rows: {verdict}")
        if served:
            print("a server uses this journal: what it is writing now may be missing here")
    return 1 if damaged else 0


def _findings(file: dict[str, Any]) -> Iterator[str]:
    for one in file["damage"]:
        rows = ", ".join(one["rows"]) or "rows unknown"
        yield f"damaged: {one['bytes']:,} bytes from {one['offset']:,} on: {rows}"
    if file["torn_bytes"]:
        yield f"{file['torn_bytes']:,} bytes of a group that was not written to its end"


def _files(root: Path) -> Iterator[dict[str, Any]]:
    from fletcher.delivery.journal.root import journal_folders
    from fletcher.delivery.journal.segment import (
        DAMAGED,
        REJECTED,
        SENT,
        TORN,
        WAITING,
        read_segments,
    )

    suffixes = (WAITING, SENT, REJECTED, DAMAGED, TORN)
    for store, dataset, folder in journal_folders(root):
        paths = (one for one in folder.iterdir() if one.suffix in suffixes)
        found = list(read_segments(paths))
        for path, segment in sorted(found, key=lambda one: one[0]):
            yield {"dataset": dataset, "store": store, **_describe(path, segment)}


def _describe(path: Path, segment: Segment | Damage) -> dict[str, Any]:
    from fletcher.delivery.journal.segment import DAMAGED, REJECTED, SENT, TORN, Damage

    states = {SENT: "sent", REJECTED: "refused", DAMAGED: "damaged", TORN: "torn"}
    state = states.get(path.suffix, "waits")
    groups: list[JournaledGroup] = []
    damage: list[Damage] = []
    torn: Damage | None = None
    if isinstance(segment, Damage):
        if state == "torn":
            torn = segment
        else:
            state, damage = "damaged", [segment]
    else:
        groups, damage, torn = segment.groups, segment.damage, segment.torn
    return {
        "state": state,
        "file": path.name,
        "rows": sum(group.info.num_rows for group in groups),
        "groups": len(groups),
        "uploads": sorted({group.info.upload_id for group in groups}),
        "bytes": segment.num_bytes,
        "torn_bytes": torn.num_bytes if torn is not None else 0,
        "damage": [
            {
                "offset": one.offset,
                "bytes": one.num_bytes,
                "rows": [str(info) for info in one.groups],
            }
            for one in damage
        ],
    }


def _is_served(root: Path) -> bool:
    from fletcher.delivery.journal.root import lock_journal

    if not (root / ".lock").exists():
        return False
    try:
        os.close(lock_journal(root))
    except ConfigError:
        return True
    return False


def _replay(root: Path) -> int:
    from fletcher.delivery.journal.root import journal_folders, lock_journal, revive_segments

    if not root.is_dir():
        raise ConfigError(f"there is no journal in {str(root)!r}", field="home")
    lock = lock_journal(root)
    try:
        num_files = sum(revive_segments(folder) for _, _, folder in journal_folders(root))
    finally:
        os.close(lock)
    print(f"{num_files} files wait again; the next start of the server sends them")
    return 0
