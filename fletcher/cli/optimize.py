"""`fletcher optimize`: compact a dataset and its indexes."""

from __future__ import annotations

import dataclasses
import datetime as dt

import click

from fletcher.cli.command_line import command, option
from fletcher.cli.options import ConfigFlags, config_options, json_option
from fletcher.cli.progress import human
from fletcher.cli.search import complete_dataset
from fletcher.cli.store_commands import open_maintained
from fletcher.cli.terminal import print_json, print_table
from fletcher.errors import ConfigError

MAX_MINUTES = 525_600


@command("optimize", "fletcher optimize articles --store lance:vectors")
@click.argument("name", metavar="NAME", shell_complete=complete_dataset)
@option("--keep-minutes N", default=10)
@option("--foreign", is_flag=True)
@json_option()
@config_options("home", "store")
def cli(flags: ConfigFlags, name: str, keep_minutes: int, foreign: bool, as_json: bool) -> None:
    """Compact a dataset in a lance: store and its index, and delete old versions.

    A server does the same by itself after many appends. A dataset that is being written is not
    compacted.

    Args:
        name: Name of the dataset.
        keep_minutes: Age in minutes up to which old versions are kept, for searches that still read
            them. Fewer free space sooner, and end searches that take longer.
        foreign: Compact a table even if another program wrote it. Clones of the table that need
            deleted versions become unreadable.
    """
    from fletcher.stores.lance.indexing import optimize_table

    if not 1 <= keep_minutes <= MAX_MINUTES:
        raise ConfigError(
            f"`keep_minutes` is {keep_minutes}, expected 1 to {MAX_MINUTES}", field="keep_minutes"
        )
    config = flags.resolve(("home", "store")).config
    with open_maintained(config, name, foreign=foreign) as store:
        before, after = optimize_table(store, name, dt.timedelta(minutes=keep_minutes))
    if as_json:
        states = {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}
        print_json({"dataset": name, **states})
        return
    numbers = [("rows", "num_rows"), ("fragments", "num_fragments"), ("versions", "num_versions")]
    rows = [
        (label, f"{getattr(before, one):,}", f"{getattr(after, one):,}") for label, one in numbers
    ]
    if after.num_unindexed is not None and before.num_unindexed is not None:
        rows.append(("not indexed", f"{before.num_unindexed:,}", f"{after.num_unindexed:,}"))
    rows.append(("size", f"{human(before.num_bytes)}B", f"{human(after.num_bytes)}B"))
    print_table(rows, header=("", "before", "after"), right=(1, 2))
