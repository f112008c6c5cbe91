"""`fletcher datasets`: list, show and drop datasets, and print their first rows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from fletcher.cli.command_line import CommandGroup, option
from fletcher.cli.options import ConfigFlags, config_options, json_option, split_names
from fletcher.cli.progress import human
from fletcher.cli.search import complete_dataset, to_rows
from fletcher.cli.store_commands import (
    foreign_refusal,
    is_foreign,
    open_dataset_store,
    open_stores,
    removing_journal,
)
from fletcher.cli.terminal import counted, index_share, print_json, print_table, printable, say
from fletcher.errors import ConfigError, UnknownColumnError

if TYPE_CHECKING:
    import pyarrow as pa

    from fletcher.stores.base import DatasetInfo

MAX_HEAD_ROWS = 10_000
_UNKNOWN = "?"

cli = CommandGroup(
    name="datasets",
    help="List, show and drop the datasets of stores, and print their first rows.\n\n"
    "These commands read the stores themselves, without a server.",
    sections={
        "Commands": {
            "list": "List datasets with their rows, vectors, size and index.",
            "show": "Show the columns and properties of a dataset.",
            "head": "Print the first rows of a dataset.",
            "drop": "Delete a dataset.",
        }
    },
)
cli.examples = (
    "fletcher datasets list --store lance:vectors",
    "fletcher datasets head articles --filter 'year >= 2020' --json",
)
_name_argument = click.argument("name", metavar="NAME", shell_complete=complete_dataset)


@cli.subcommand("list", "fletcher datasets list", "fletcher datasets list --json")
@json_option()
@config_options("home", "store")
def list_datasets(flags: ConfigFlags, as_json: bool) -> None:
    """List the datasets of all given stores.

    A store that does not tell a number leaves it out. Damaged datasets are left out and named on
    standard error.
    """
    config = flags.resolve(("home", "store")).config
    found = [
        _describe(address, info)
        for address, store in open_stores(config)
        for info in store.datasets()
    ]
    if as_json:
        print_json({"datasets": found})
        return
    if not found:
        print("there is no dataset")
        return
    header = ("name", "rows", "model", "dims", "dtype", "size", "index", "last written", "store")
    print_table([_cells(one) for one in found], header=header, right=(1, 3, 5))


@cli.subcommand("show", "fletcher datasets show articles --store lance:vectors")
@_name_argument
@json_option()
@config_options("home", "store")
def show_dataset(flags: ConfigFlags, name: str, as_json: bool) -> None:
    """Show a dataset's columns, vectors, size and index.

    Args:
        name: Name of the dataset.
    """
    with open_dataset_store(flags.resolve(("home", "store")).config, name) as (address, store):
        from fletcher.stores.exact_search import existing_dataset

        info = existing_dataset(store, name)
    about = _describe(address, info)
    about["columns"] = {field.name: str(field.type) for field in info.schema}
    if as_json:
        print_json(about)
        return
    size = _UNKNOWN if info.num_bytes is None else f"{human(info.num_bytes)}B"
    index = about["index"] or "none"
    if info.num_indexed is not None:
        index = f"{index}, {index_share(info.num_rows, info.num_indexed)}"
    rows = [
        ("store", address),
        ("rows", counted(info.num_rows)),
        ("model", about["model"] or _UNKNOWN),
        ("vectors", f"{about['output']}, {about['dims'] or _UNKNOWN} dims, {about['dtype']}"),
        ("similarity", about["similarity"]),
        ("prompt", about["prompt"] or "none"),
        ("size", size),
        ("index", index),
        ("last written", about["written_at"] or _UNKNOWN),
        ("written by", "another program" if about["foreign"] else "Fletcher"),
        *(("columns", f"{column}: {kind}") for column, kind in about["columns"].items()),
    ]
    print_table(rows)


@cli.subcommand("head", "fletcher datasets head articles --rows 3 --columns title,year")
@_name_argument
@option("--rows N", default=10)
@option("--columns NAME,...", callback=split_names)
@option("--filter CONDITION", "filters", multiple=True)
@json_option("Print JSON lines.")
@config_options("home", "store")
def print_head(
    flags: ConfigFlags,
    name: str,
    rows: int,
    columns: tuple[str, ...],
    filters: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print the first rows of a dataset, in the order in which the store reads them.

    Args:
        name: Name of the dataset.
        rows: Number of rows.
        columns: Columns to print. Default: all but vectors and the key of the upload.
        filters: Condition that a row must meet, as in `fletcher search`; repeatable.
    """
    from fletcher.stores.exact_search import existing_schema
    from fletcher.stores.filter_parser import parse_filter

    if not 1 <= rows <= MAX_HEAD_ROWS:
        raise ConfigError(f"`rows` is {rows}, expected 1 to {MAX_HEAD_ROWS}", field="rows")
    with open_dataset_store(flags.resolve(("home", "store")).config, name) as (_, store):
        schema = existing_schema(store, name)
        shown = list(columns) or _plain_columns(schema)
        for one in shown:
            if one not in schema.names:
                raise UnknownColumnError(
                    f"`columns` asks for {one!r}; known: {', '.join(schema.names)}",
                    field="columns",
                    allowed=schema.names,
                )
        conditions = [parse_filter(text, schema) for text in filters]
        table = store.scan(name, columns=shown, filters=conditions, limit=rows).read_all()
    found = to_rows(table)
    if as_json:
        for row in found:
            print_json(row)
    elif not found:
        print("no rows")
    else:
        cells = [
            ["" if value is None else printable(value) for value in row.values()] for row in found
        ]
        print_table(cells, header=shown)


@cli.subcommand("drop", "fletcher datasets drop articles --store lance:vectors")
@_name_argument
@option("--yes", is_flag=True)
@option("--foreign", is_flag=True)
@config_options("home", "store")
def drop_dataset(flags: ConfigFlags, name: str, yes: bool, foreign: bool) -> int:
    """Delete a dataset and all its rows, after a question.

    Rows of the dataset that wait in the journal in --home are deleted, too; its server must be
    stopped if there are any. A dataset that is being written is not deleted.

    Args:
        name: Name of the dataset.
        yes: Delete without a question. Needed where nobody can answer, as in scripts.
        foreign: Delete a table even if another program wrote it.
    """
    from fletcher.stores.exact_search import existing_dataset

    config = flags.resolve(("home", "store")).config
    with open_dataset_store(config, name) as (address, store):
        info = existing_dataset(store, name)
        if is_foreign(info.schema) and not foreign:
            raise foreign_refusal(name, address, "delete")
        what = f"{name}, {counted(info.num_rows, 'rows')}, from {address}"
        if not store.capabilities.overwrite:
            say("note: this store brings deleted rows back when it restarts")
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(f"nobody can be asked; give --yes to delete {what}", field="yes")
            if not click.confirm(f"delete {what}?", err=True):
                print("nothing is deleted")
                return 1
        with removing_journal(config.home / "journal", address, name):
            store.delete_dataset(name)
    print(f"deleted {what}")
    return 0


def _plain_columns(schema: pa.Schema) -> list[str]:
    hidden = ("vector", "scale", "batch_key")
    return [name for name in schema.names if name not in hidden] or list(schema.names)


def _describe(address: str, info: DatasetInfo) -> dict[str, Any]:
    said = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in (info.schema.metadata or {}).items()
    }
    dims, dtype = _vector_type(info.schema)
    declared = said.get("fletcher.dims", "")
    written_at = info.written_at
    return {
        "name": info.name,
        "store": address,
        "rows": info.num_rows,
        "bytes": info.num_bytes,
        "model": said.get("fletcher.model"),
        "dims": int(declared) if declared.isdecimal() else dims,
        "dtype": said.get("fletcher.dtype", dtype),
        "output": said.get("fletcher.output", "dense"),
        "similarity": said.get("fletcher.similarity", "cosine"),
        "prompt": said.get("fletcher.prompt") or None,
        "index": info.index,
        "indexed_rows": info.num_indexed,
        "written_at": None if written_at is None else written_at.isoformat(timespec="seconds"),
        "foreign": is_foreign(info.schema),
    }


def _vector_type(schema: pa.Schema) -> tuple[int | None, str]:
    """Number of dimensions and element type, as far as the type of `vector` tells."""
    import pyarrow as pa

    kind = schema.field("vector").type if "vector" in schema.names else pa.null()
    if pa.types.is_fixed_size_list(kind):
        names = {"float": "float32", "halffloat": "float16"}
        return kind.list_size, names.get(str(kind.value_type), str(kind.value_type))
    return None, str(kind)


def _cells(one: dict[str, Any]) -> list[object]:
    return [
        one["name"],
        _UNKNOWN if one["rows"] is None else f"{one['rows']:,}",
        (one["model"] or _UNKNOWN).partition("@")[0],
        one["dims"] or _UNKNOWN,
        one["dtype"],
        _UNKNOWN if one["bytes"] is None else f"{human(one['bytes'])}B",
        one["index"] or "",
        one["written_at"] or "",
        one["store"],
    ]
