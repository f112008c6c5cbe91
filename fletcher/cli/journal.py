"""`fletcher journal`: check and replay rows on disk that wait for their stores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fletcher.cli.command_line import Choice, CommandGroup
from fletcher.cli.options import ConfigFlags, config_options, json_option
from fletcher.cli.terminal import print_json, printable
from fletcher.errors import ConfigError, InvalidCommandError

if TYPE_CHECKING:
    from fletcher.delivery.journal.segment import Damage, JournaledGroup, Segment


cli = CommandGroup(
    name="journal",
    help="Show, check and replay rows that wait on this machine's disk for their stores.\n\n"
    "The journal is in the home folder, FLETCHER_HOME/journal.",
    sections={
        "Commands": {
            "status": "List files, rows and their state.",
            "verify": "Check every file and name damaged rows.",
            "replay": "Mark sent and refused rows to be sent again.",
            "rejected": "List, send again or drop rows that a store refused.",
        }
    },
)
cli.examples = ("fletcher journal status", "fletcher journal verify --json")


@cli.subcommand("status", "fletcher journal status")
@json_option()
@config_options("home")
def show_status(flags: ConfigFlags, as_json: bool) -> int:
    """List files, rows and their state. The exit status is 1 if something is damaged."""
    with _readable_root(flags) as root:
        return _show(root, as_json=as_json, closely=False)


@cli.subcommand("verify", "fletcher journal verify --json")
@json_option()
@config_options("home")
def verify_files(flags: ConfigFlags, as_json: bool) -> int:
    """Compare checksums and row counts, and name the rows of damaged parts.

    The command changes nothing, and a server may run at the same time. The exit status is 1 if
    something is damaged.
    """
    with _readable_root(flags) as root:
        return _show(root, as_json=as_json, closely=True)


@cli.subcommand("replay", "fletcher journal replay --home /var/lib/fletcher")
@config_options("home")
def replay_rows(flags: ConfigFlags) -> int:
    """Mark rows to be sent again that a store may have lost, or refused.

    The server must be stopped. It sends the rows after its next start. Rows that the store already
    holds under the same batch_key are not stored twice.
    """
    with _readable_root(flags) as root:
        return _replay(root)


@cli.subcommand(
    "rejected",
    "fletcher journal rejected list",
    "fletcher journal rejected resend all",
    "fletcher journal rejected drop lance-1a2b/notes/000000000004-nightly-0-999.rejected",
)
@click.argument(
    "action",
    type=Choice(("list", "resend", "drop")),
    metavar="list|resend|drop",
    help="What to do with the rows.",
)
@click.argument(
    "files", nargs=-1, metavar="[FILE|all]...", help="Files as `list` names them, or `all`."
)
@json_option()
@config_options("home")
def handle_rejected(flags: ConfigFlags, action: str, files: tuple[str, ...], as_json: bool) -> int:
    """List, send again or drop rows that a store refused for good.

    Such rows count in --max-journal, and their uploads are not complete. `list` names their files.
    `resend` and `drop` take these names, or `all`. Stop the server first. Its next start sends
    the rows of `resend`, except rows that are stored already. With `mode: upsert` these rows
    replace later rows with the same ids. A client can also send its rows again by resuming its
    upload.
    """
    with _readable_root(flags) as root:
        found = {f"{one['store']}/{one['dataset']}/{one['file']}": one for one in _rejected(root)}
        if action == "list":
            return _list_rejected(found, as_json=as_json)
        return _handle_rejected(root, action, _chosen(found, files))


@contextlib.contextmanager
def _readable_root(flags: ConfigFlags) -> Iterator[Path]:
    root = flags.resolve(("home",)).config.home / "journal"
    try:
        yield root
    except PermissionError as error:
        raise ConfigError(
            f"the journal in {str(root)!r} cannot be read: {error.strerror}; run this as the user "
            "of the server",
            field="home",
        ) from None


def _show(root: Path, *, as_json: bool, closely: bool) -> int:
    served = _is_served(root)
    files = list(_files(root))
    damaged = any(one["state"] == "damaged" or one["damage"] for one in files)
    if as_json:
        print_json({"files": files, "damaged": damaged, "served": served})
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
            print(f"         {printable(line)}")
    if closely and files:
        rows = sum(one["rows"] for one in files)
        verdict = "some are damaged" if damaged else "all right"
        print(f"{len(files)} files, {rows:,} rows: {verdict}")
        if served:
            print("a server uses this journal: rows that it writes now may be missing here")
    return 1 if damaged else 0


def _findings(file: dict[str, Any]) -> Iterator[str]:
    for one in file["damage"]:
        rows = ", ".join(one["rows"]) or "rows unknown"
        yield f"damaged: {one['bytes']:,} bytes from {one['offset']:,} on: {rows}"
    if file["torn_bytes"]:
        yield f"{file['torn_bytes']:,} bytes of a group that was not written completely"


def _files(root: Path) -> Iterator[dict[str, Any]]:
    from fletcher.delivery.journal import segment as files
    from fletcher.delivery.journal.root import journal_folders, paths_in

    states = {
        files.WAITING: "waits",
        files.SENT: "sent",
        files.REJECTED: "refused",
        files.DAMAGED: "damaged",
        files.TORN: "torn",
    }
    for store, dataset, folder in journal_folders(root):
        paths = (one for one in paths_in(folder) if one.suffix in states)
        for path, segment in sorted(files.read_segments(paths), key=lambda one: one[0]):
            described = _describe(segment, states[path.suffix])
            yield {"dataset": dataset, "store": store, "file": path.name, **described}


def _describe(segment: Segment | Damage, state: str) -> dict[str, Any]:
    from fletcher.delivery.journal.segment import Damage

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
        "rows": sum(group.info.num_rows for group in groups),
        "groups": len(groups),
        "uploads": sorted({group.info.upload_id for group in groups}),
        "bytes": segment.num_bytes,
        "torn_bytes": torn.num_bytes if torn is not None else 0,
        "damage": [
            {"offset": one.offset, "bytes": one.num_bytes, "rows": list(map(str, one.groups))}
            for one in damage
        ],
    }


def _is_served(root: Path) -> bool:
    from fletcher.delivery.journal.root import lock_journal

    if not (root / ".lock").exists():
        return False
    try:
        lock_journal(root).close()
    except ConfigError:
        return True
    return False


def _replay(root: Path) -> int:
    from fletcher.delivery.journal.root import journal_folders, lock_journal, revive_segments

    if not root.is_dir():
        raise ConfigError(f"there is no journal in {str(root)!r}; check --home", field="home")
    with lock_journal(root):
        num_files = sum(revive_segments(folder) for _, _, folder in journal_folders(root))
    print(f"{num_files} files wait again; the next start of the server sends them")
    return 0


def _rejected(root: Path) -> Iterator[dict[str, Any]]:
    return (one for one in _files(root) if one["file"].endswith(".rejected"))


def _list_rejected(found: dict[str, dict[str, Any]], *, as_json: bool) -> int:
    if as_json:
        print_json({"files": [{**one, "name": name} for name, one in found.items()]})
        return 0
    if not found:
        print("no store has refused rows")
    for name, one in found.items():
        uploads = ", ".join(one["uploads"])
        print(f"{one['rows']:>10,} rows {one['bytes']:>13,} bytes  {printable(uploads)}  {name}")
    return 0


def _chosen(found: dict[str, dict[str, Any]], names: tuple[str, ...]) -> list[str]:
    """Names of the files to handle.

    Raises:
        InvalidCommandError: No file is named, or there is none of a name.
    """
    if not names:
        raise InvalidCommandError("name the FILEs, as `list` prints them, or `all`", field="FILE")
    if names == ("all",):
        return list(found)
    for name in names:
        if name not in found:
            raise InvalidCommandError(
                f"there are no refused rows in {name[:200]!r}; `list` prints the names",
                field="FILE",
                allowed=list(found)[:20],
            )
    return list(dict.fromkeys(names))


def _handle_rejected(root: Path, action: str, names: list[str]) -> int:
    from fletcher.delivery.journal.root import lock_journal, revive_segments

    with lock_journal(root):
        for name in names:
            path = root / name
            if action == "drop":
                path.unlink()
            else:
                revive_segments(path.parent, [path])
    verb = "are dropped" if action == "drop" else "wait again; the next start sends them"
    print(f"{len(names)} files {verb}")
    return 0
