"""`fletcher journal`: what waits on this machine's disk for its stores."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fletcher.config import fletcher_home
from fletcher.errors import ConfigError

if TYPE_CHECKING:
    from fletcher.delivery.journal import Segment

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Adds `journal` and its own commands."""
    parser = subparsers.add_parser(
        "journal",
        help="show and replay rows that wait for their stores",
        description="The journal of this machine's server: FLETCHER_HOME/journal.",
    )
    commands = parser.add_subparsers(dest="journal_command", metavar="COMMAND", required=True)
    status = commands.add_parser(
        "status", help="list files and rows; reads every byte and compares checksums"
    )
    status.add_argument("--json", action="store_true", help="print JSON, for machines")
    commands.add_parser(
        "replay",
        help="let the next start of the server send again what was sent or refused",
        description="Makes rows wait again that were sent to a store which may have lost them, or "
        "that a store refused. The server must be stopped; its next start sends them. What the "
        "store holds under its batch_key is not stored twice.",
    )


def run(args: argparse.Namespace) -> int:
    """Shows or replays; 1 where something is damaged."""
    root = fletcher_home() / "journal"
    return _replay(root) if args.journal_command == "replay" else _status(root, as_json=args.json)


def _status(root: Path, *, as_json: bool) -> int:
    from fletcher.delivery.journal import DAMAGED, journals, read_segment

    files = []
    for store, dataset, folder in journals(root):
        for path in sorted(folder.iterdir()):
            segment = None if path.suffix == DAMAGED else read_segment(path)
            files.append(_describe(store, dataset, path, segment))
    damaged = any(one["state"] == "damaged" or one["damaged_groups"] for one in files)
    if as_json:
        print(json.dumps({"files": files, "damaged": damaged}))
    elif not files:
        print("the journal is empty: nothing waits for a store")
    for one in () if as_json else files:
        note = f", {one['damaged_groups']} groups damaged" if one["damaged_groups"] else ""
        print(
            f"{one['state']:<8} {one['rows']:>10,} rows {one['bytes']:>13,} bytes  "
            f"{one['dataset']}  {one['store']}/{one['file']}{note}"
        )
    return 1 if damaged else 0


def _describe(store: str, dataset: str, path: Path, segment: Segment | None) -> dict[str, Any]:
    from fletcher.delivery.journal import DAMAGED, REJECTED, SENT

    states = {SENT: "sent", REJECTED: "refused", DAMAGED: "damaged"}
    state = "damaged" if segment is None else states.get(path.suffix, "waits")
    groups = [] if segment is None else segment.groups
    return {
        "state": state,
        "dataset": dataset,
        "store": store,
        "file": path.name,
        "rows": sum(group.info.last - group.info.first + 1 for group in groups),
        "uploads": sorted({group.info.upload_id for group in groups}),
        "bytes": path.stat().st_size,
        "damaged_groups": 0 if segment is None else segment.num_damaged,
    }


def _replay(root: Path) -> int:
    import os

    from fletcher.delivery.journal import journals, lock_journal, revive

    if not root.is_dir():
        raise ConfigError(f"there is no journal in {str(root)!r}", field="home")
    lock = lock_journal(root)
    try:
        num_files = sum(revive(folder) for _, _, folder in journals(root))
    finally:
        os.close(lock)
    print(f"{num_files} files wait again; the next start of the server sends them")
    return 0
