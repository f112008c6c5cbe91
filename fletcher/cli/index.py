"""`fletcher index`: index the ids and vectors of a dataset, and measure the index."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from fletcher.cli.command_line import Choice, command, option
from fletcher.cli.options import ConfigFlags, config_options, json_option
from fletcher.cli.search import complete_dataset
from fletcher.cli.store_commands import open_maintained
from fletcher.cli.terminal import counted, print_json, print_table, say

LEAST_RECALL = 0.99


@command(
    "index",
    "fletcher index articles --store lance:vectors",
    "fletcher index articles --type ivf_hnsw_sq --json",
)
@click.argument("name", metavar="NAME", shell_complete=complete_dataset)
@option(
    "--type",
    "kind",
    type=Choice(("auto", "ivf_pq", "ivf_rq", "ivf_sq", "ivf_hnsw_sq", "none")),
    default="auto",
)
@option("--foreign", is_flag=True)
@json_option()
@config_options("home", "store")
def cli(flags: ConfigFlags, name: str, kind: str, foreign: bool, as_json: bool) -> int:
    """Index a dataset in a lance: store, and measure the index.

    Ids and vectors are indexed. Searches use the index by themselves, with the settings that were
    measured here. Scores stay exact. The measurement compares searches for stored rows with exact
    searches. The exit status is 1 if the recall is below 0.99. A dataset that is being written is
    not indexed.

    Args:
        name: Name of the dataset.
        kind: Index of the vectors. auto: none below 10,000 rows, else ivf_rq, which is made
            fastest, or ivf_sq if the recall of ivf_rq is low; ivf_sq takes more space and searches
            more slowly, ivf_hnsw_sq takes longest to make, ivf_pq takes least space. none removes
            the index.
        foreign: Index a table even if another program wrote it.
    """
    from fletcher.stores.lance.indexing import build_indexes

    config = flags.resolve(("home", "store")).config
    with open_maintained(config, name, foreign=foreign) as store:
        report = build_indexes(store, name, kind, say)
    index, measured = report.index, report.measured
    low = measured is not None and measured.recall < LEAST_RECALL
    if as_json:
        about: dict[str, Any] = {"dataset": name, "rows": report.num_rows}
        about["id_index"] = report.id_index
        about["index"] = None if index is None else dataclasses.asdict(index)
        about["measured"] = None if measured is None else dataclasses.asdict(measured)
        print_json(about)
        return int(low)
    rows = [("rows", counted(report.num_rows)), ("ids", "indexed" if report.id_index else "none")]
    if index is None:
        rows.append(("vectors", "no index: searches compare all rows"))
    else:
        rows.append(("vectors", f"{index.kind}, {counted(index.num_rows, 'rows')}"))
    if index is not None and measured is not None:
        searched = f"{index.nprobes} partitions, {index.candidates} candidates per row"
        rows.append(("searches use", searched))
        rows.append(("recall@10", f"{measured.recall:.4f} of {measured.num_queries} stored rows"))
        times = f"{measured.index_ms:.1f} ms with the index, {measured.exact_ms:.1f} ms exact"
        rows.append(("median latency", times))
    print_table(rows)
    if low:
        say("note: the recall is below 0.99; another --type may reach it, or none for exact search")
    return int(low)
