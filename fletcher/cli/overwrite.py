"""`fletcher overwrite`: list and drop the staged rows of unfinished overwrites."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from fletcher.cli.command_line import CommandGroup
from fletcher.cli.options import ConfigFlags, config_options, json_option
from fletcher.cli.store_commands import open_stores, removing_journal
from fletcher.cli.terminal import counted, print_json
from fletcher.errors import ConfigError, UnknownDatasetError

if TYPE_CHECKING:
    from fletcher.stores.base import Store

cli = CommandGroup(
    name="overwrite",
    help="List and drop the rows of unfinished uploads with --mode overwrite.\n\n"
    "An overwrite keeps its rows beside the dataset until all have arrived, and then replaces the "
    "dataset. The rows of an unfinished one stay there, so that the upload can be resumed.",
    sections={
        "Commands": {
            "list": "List unfinished overwrites.",
            "drop": "Delete the rows of an unfinished overwrite.",
        }
    },
)
cli.examples = (
    "fletcher overwrite list",
    "fletcher overwrite drop articles.staged-0123456789abcdef",
)


@cli.subcommand("list", "fletcher overwrite list --store lance:vectors")
@json_option()
@config_options("home", "store")
def list_overwrites(flags: ConfigFlags, as_json: bool) -> None:
    """List unfinished overwrites with their dataset, upload and number of rows.

    An overwrite that is running now is listed, too.
    """
    found: list[dict[str, Any]] = [
        {
            "name": info.name,
            "dataset": info.name.partition(".")[0],
            "store": address,
            "upload_id": _upload_id(store, info.name),
            "rows": info.num_rows,
            "bytes": info.num_bytes,
        }
        for address, store in open_stores(flags.resolve(("home", "store")).config)
        for info in store.staged_datasets()
    ]
    if as_json:
        print_json({"overwrites": found})
        return
    if not found:
        print("no overwrite is unfinished")
    for one in found:
        upload = f"upload {one['upload_id']}" if one["upload_id"] else "no rows yet"
        print(f"{one['name']}  {counted(one['rows'], 'rows')}  {upload}  {one['store']}")


@cli.subcommand("drop", "fletcher overwrite drop articles.staged-0123456789abcdef")
@click.argument("name", metavar="NAME")
@config_options("home", "store")
def drop_overwrite(flags: ConfigFlags, name: str) -> None:
    """Delete the rows of an unfinished overwrite. The dataset keeps its rows.

    A server that uses the store must be stopped if some of the rows are still in its journal.

    Args:
        name: Name of the overwrite, as listed by `fletcher overwrite list`.
    """
    from fletcher.stores.staging import staged_for

    config = flags.resolve(("home", "store")).config
    if staged_for(name) is None:
        raise ConfigError(
            f"`name` is {name!r}, expected a name from `fletcher overwrite list`", field="name"
        )
    dropped = 0
    for address, store in open_stores(config):
        with removing_journal(config.home / "journal", address, name) as journaled:
            dropped += journaled
            with contextlib.suppress(UnknownDatasetError):
                store.delete_dataset(name)
                dropped += 1
    if not dropped:
        raise ConfigError(f"there is no overwrite {name!r}; list them first", field="name")
    print(f"dropped {name}")


def _upload_id(store: Store, name: str) -> str | None:
    from fletcher.core.owner import plain_id
    from fletcher.core.schema import parse_batch_key

    first = store.scan(name, columns=["batch_key"], limit=1).read_all().column("batch_key")
    parsed = parse_batch_key(first[0].as_py()) if len(first) else None
    return plain_id(parsed[0]) if parsed else None
