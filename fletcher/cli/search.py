"""`fletcher search`: find the rows of a store that are nearest to a query."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fletcher.cli.command_line import command, option
from fletcher.cli.connection import EmbedTarget, target_options
from fletcher.cli.options import json_option, split_names, starting
from fletcher.cli.terminal import columns as width_of
from fletcher.cli.terminal import cut, padded, print_json, printable, say, terminal_width
from fletcher.config.delivery import NO_STORE
from fletcher.config.option import nearest
from fletcher.config.server import fletcher_home
from fletcher.errors import (
    ColumnTypeError,
    ConfigError,
    ModelMismatchError,
    UnknownColumnError,
    UnknownDatasetError,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from click.shell_completion import CompletionItem

    from fletcher.stores.base import Store

MAX_K = 10_000
MAX_ID_COLUMNS = 32


def complete_dataset(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Completions for a dataset name.

    Lists the folder of the store. Opening the store would take a second.
    """
    given = context.params.get("option_store") or [os.environ.get("FLETCHER_STORE", "")]
    home = Path(context.params.get("option_home") or fletcher_home()).expanduser()
    address = given[0].rpartition("=")[2] or f"lance:{home / 'vectors'}"
    kind, _, folder = address.partition(":")
    found = Path(folder).expanduser().glob("*.lance" if kind == "lance" else "*/")
    if kind not in ("lance", "parquet"):
        return []
    return starting(sorted(path.name.removesuffix(".lance") for path in found), incomplete)


@command(
    "search",
    'fletcher search "play chess" --dataset articles --store lance:vectors',
    "fletcher search chess --dataset articles --filter 'year >= 2020' --columns year --json",
)
@click.argument("query", metavar="QUERY")
@option("--dataset NAME", required=True, shell_complete=complete_dataset)
@option("--k N", default=5)
@option("--filter CONDITION", "filters", multiple=True)
@option("--columns NAME,...", callback=split_names)
@option("--prompt TEXT")
@json_option("Print JSON lines.")
@target_options(
    "store",
    "model",
    store="Store to search: lance:PATH, parquet:PATH or grpc://HOST:PORT. Required with --server. "
    "Default: lance: in the home folder.",
    model="Model that embeds the query. Default: the model of the dataset.",
)
def cli(
    target: EmbedTarget,
    query: str,
    dataset: str,
    k: int,
    filters: tuple[str, ...],
    columns: tuple[str, ...],
    prompt: str | None,
    as_json: bool,
) -> None:
    """Find the rows of a dataset whose vectors are nearest to a text's.

    This command always reads the rows from --store itself. With --server, the server embeds the
    query and does nothing else.

    Args:
        query: Text to look for.
        dataset: Dataset to search.
        k: Number of rows to find.
        filters: Condition on columns, such as 'year >= 2020 and (section in (games, news) or
            author is null)'; repeatable. Only rows that meet all conditions are found. Quote texts
            with spaces by ', and names with spaces by ".
        columns: Columns to show besides id and text.
        prompt: Name of a prompt of the model, or text to put before the query; '' for no prompt.
            Default: the model's prompt for queries, if it has one.
    """
    from fletcher.core.command import check_dataset
    from fletcher.stores.address import folder_of, open_store
    from fletcher.stores.exact_search import APPROXIMATE, check_searchable
    from fletcher.stores.filter_parser import parse_filter

    check_dataset(dataset)
    if not query.strip():
        raise ConfigError("`query` is empty, expected some text", field="query")
    if not 1 <= k <= MAX_K:
        raise ConfigError(f"`k` is {k}, expected 1 to {MAX_K}", field="k")
    config = target.resolve(own_store=True)
    addresses = list(config.store_addresses.values())
    if not addresses:
        raise ConfigError("`store` is none, which holds no rows; give an address", field="store")
    folder = folder_of(addresses[0])
    if folder is not None and not folder.is_dir():  # opening the store would create the folder
        raise UnknownDatasetError(
            f"there is no dataset {dataset!r} in {addresses[0]}: there is no such folder",
            field="dataset",
        )
    opened = open_store(addresses[0], timeout_s=config.delivery.store_timeout_s)
    with contextlib.closing(opened) as store:
        schema = _find_schema(store, dataset)
        check_searchable(dataset, schema)  # raises before a model is loaded
        shown = _shown_columns(schema, columns)
        conditions = [parse_filter(text, schema) for text in filters]
        vector = _embed_query(target, query, prompt, dataset, schema)
        found = store.search(dataset, vector, k=k, columns=shown, filters=conditions)
    if APPROXIMATE in (found.schema.metadata or {}):
        say("note: approximate: scores are exact, but better rows may be missing")
    rows = to_rows(found.select([*shown, "score"]))
    if as_json:
        for rank, row in enumerate(rows, 1):
            print_json({"rank": rank, **row})
    else:
        _print_rows(rows)


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The table's rows as Python values; times with nanoseconds become text."""
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        if getattr(field.type, "unit", "") == "ns":
            texts = table.column(place).cast("string")
            table = table.set_column(place, field.name, texts)
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise ColumnTypeError(
            f"`columns` has values that cannot be shown: {error}; leave their column out",
            field="columns",
        ) from None


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line per row: rank, score, id, other columns, start of the text."""
    if not rows:
        print("no rows")
        return
    ids = [printable(row["id"]) for row in rows]
    id_width = min(MAX_ID_COLUMNS, max(width_of(one) for one in ids))
    for rank, (row, one) in enumerate(zip(rows, ids, strict=True), 1):
        others = [
            f"{name}={printable(value)}"
            for name, value in row.items()
            if name not in ("id", "text", "score")
        ]
        tail = "  ".join([*others, printable(row.get("text") or "")])
        head = f"{rank:>{len(str(len(rows)))}}  {row['score']:6.3f}  {padded(one, id_width)}  "
        print(cut((head + tail).rstrip(), terminal_width()))


def _find_schema(store: Store, name: str) -> pa.Schema:
    schema = store.read_schema(name)
    if schema is None:
        known = [one.name for one in store.datasets()]
        hint = nearest(name, known) or f"; known: {', '.join(known[:20]) or 'no dataset'}"
        raise UnknownDatasetError(
            f"there is no dataset {name!r} in {store.address}{hint}", field="dataset"
        )
    return schema


def _shown_columns(schema: pa.Schema, asked: Sequence[str]) -> list[str]:
    for name in asked:
        if name not in schema.names:
            raise UnknownColumnError(
                f"`columns` asks for {name!r}; known: {', '.join(schema.names)}",
                field="columns",
                allowed=schema.names,
            )
    shown = [name for name in ("id", "text") if name in schema.names]
    return [*shown, *(name for name in asked if name not in shown)]


def _embed_query(
    target: EmbedTarget, query: str, prompt: str | None, dataset: str, schema: pa.Schema
) -> Any:
    import pyarrow as pa

    from fletcher.client.prompts import QUERY_PROMPTS, default_prompt, served_model
    from fletcher.core.similarity import Similarity
    from fletcher.evaluation.vectors import embed_batches
    from fletcher.models.bundle.bundle import NULL_PREFIX

    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    stored = metadata.get("fletcher.model")
    # `stored` is NAME@HASH: it selects this version even if NAME now means another one.
    model = target.flags.given.get("model", stored and stored.removeprefix(NULL_PREFIX))
    local_model = {} if target.server or model is None else {"model": model}
    with target.open_client(target.resolve(store=NO_STORE, **local_model)) as client:
        known = served_model(client, model)
        qualified = f"{known['name']}@{known['hash']}"
        if stored is not None and stored.removeprefix(NULL_PREFIX) != qualified:
            raise ModelMismatchError(
                f"`dataset` {dataset!r} holds vectors of {stored}, but the model of the query is "
                f"{qualified}: their distances mean nothing; give --model {stored}",
                field="model",
                allowed=[stored],
            )
        if prompt is None:
            prompt = default_prompt(known, QUERY_PROMPTS)
            written = metadata.get("fletcher.prompt")
            if written and prompt is None:
                say(
                    f"note: the dataset was written with the prompt {written!r}, and the model "
                    "has none for queries; --prompt gives one"
                )
        dims = int(metadata.get("fletcher.dims", 0)) or None
        layers = int(metadata.get("fletcher.layers", 0)) or None
        asked = embed_batches(
            client,
            pa.array([query]),
            model=qualified,
            prompt=prompt,
            dims=dims,
            layers=layers,
            dtype="float32",
        )
    given = asked[0].schema.metadata[b"fletcher.model"].decode()
    if stored is not None and given != stored:
        raise ModelMismatchError(
            f"`dataset` {dataset!r} holds vectors of {stored}, but those of the query are of "
            f"{given}: one of them was made without a model, by --backend null",
            field="model",
            allowed=[stored],
        )
    return Similarity.from_schema(asked[0].schema).queries(asked[0])[0]
