"""`fletcher search`: embeds a query and asks the store for the nearest rows."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fletcher.cli.connection import add_connection, local_config, open_client, without_store
from fletcher.cli.parser import check_server, given_flags
from fletcher.cli.terminal import columns, cut, padded, printable, terminal_width
from fletcher.config.option import nearest
from fletcher.core.command import check_dataset
from fletcher.errors import (
    ConfigError,
    InvalidCommandError,
    ModelMismatchError,
    UnknownColumnError,
    UnknownDatasetError,
)

if TYPE_CHECKING:
    from fletcher.config.server import ServeConfig
    from fletcher.stores.base import DatasetInfo, Filter, Store

MAX_K = 10_000
MAX_ID_COLUMNS = 32
_FILTER = re.compile(r"\s*([^\s=!<>]+)\s*(==|!=|>=|<=|=|>|<)\s*(.*?)\s*", re.DOTALL)


def add_parser(subparsers: Any) -> None:
    """Adds `search`."""
    parser = subparsers.add_parser(
        "search",
        usage="fletcher search [options] QUERY --dataset NAME",
        help="find the rows nearest to a text",
        description="Finds the rows of a dataset whose vectors are nearest to a text's. The rows "
        "are in --store; with --server, that server embeds the text and --store has to be given.",
        example='fletcher search "play chess" --dataset articles --store lance:vectors',
    )
    parser.add_argument("query", metavar="QUERY", help="the text to look for")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="where to look")
    parser.add_argument("--k", type=int, default=5, metavar="N", help="rows to find (default: 5)")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="CONDITION",
        help="only rows like this: 'year >= 2020', 'section = games'; all of several must hold",
    )
    parser.add_argument(
        "--columns", type=_names, default=(), metavar="NAME,...", help="further columns to show"
    )
    parser.add_argument(
        "--prompt",
        help="a prompt of the model, or text to put before the query; '' for none "
        "(default: the model's prompt for queries, if it has one)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    add_connection(parser, ("store", "model"))


def run(args: argparse.Namespace) -> int:
    """Searches and prints."""
    from fletcher.stores.address import folder_of, open_store
    from fletcher.stores.exact_search import vector_reader

    check_server(args)
    check_dataset(args.dataset)
    if not args.query.strip():
        raise ConfigError("`query` is empty, expected some text", field="query")
    if not 1 <= args.k <= MAX_K:
        raise ConfigError(f"`k` is {args.k}, expected 1 to {MAX_K}", field="k")
    config = local_config(args, own_store=True)
    addresses = list(config.store_addresses.values())
    if not addresses:
        raise ConfigError("`store` is none, which holds no rows", field="store")
    folder = folder_of(addresses[0])
    if folder is not None and not folder.is_dir():  # else a misspelt path would become a folder
        raise UnknownDatasetError(
            f"there is no dataset {args.dataset!r} in {addresses[0]}: there is no such folder",
            field="dataset",
        )
    store = open_store(addresses[0], timeout_s=config.delivery.store_timeout_s)
    try:
        info = _find_dataset(store, args.dataset)
        if b"fletcher.output" in (info.schema.metadata or {}):  # which says: not dense
            vector_reader(args.dataset, info.schema)  # before a model is loaded for the query
        shown = _shown_columns(info, args.columns)
        filters = [_parse_filter(text, info.schema) for text in args.filter]
        vector = _embed_query(args, config, info)
        found = store.search(args.dataset, vector, k=args.k, columns=shown, filters=filters)
    finally:
        store.close()
    rows = found.select([*shown, "score"]).to_pylist()
    if args.json:
        for rank, row in enumerate(rows, 1):
            print(json.dumps({"rank": rank, **row}, ensure_ascii=False, default=str))
    else:
        print_rows(rows, terminal_width())
    return 0


def print_rows(rows: Sequence[dict[str, Any]], width: int) -> None:
    """Prints a line a row: rank, score, id, further columns, and what fits of the text."""
    if not rows:
        print("no rows")
        return
    ids = [printable(row["id"]) for row in rows]
    id_width = min(MAX_ID_COLUMNS, max(columns(one) for one in ids))
    for rank, (row, one) in enumerate(zip(rows, ids, strict=True), 1):
        others = [
            f"{name}={printable(value)}"
            for name, value in row.items()
            if name not in ("id", "text", "score")
        ]
        tail = "  ".join([*others, printable(row.get("text") or "")])
        head = f"{rank:>{len(str(len(rows)))}}  {row['score']:6.3f}  {padded(one, id_width)}  "
        print(cut((head + tail).rstrip(), width))


def _find_dataset(store: Store, name: str) -> DatasetInfo:
    info = store.dataset(name)
    if info is None:
        known = [one.name for one in store.datasets()]
        hint = nearest(name, known) or f"; there are {', '.join(known[:20]) or 'none'}"
        raise UnknownDatasetError(
            f"there is no dataset {name!r} in {store.address}{hint}", field="dataset"
        )
    return info


def _shown_columns(info: DatasetInfo, asked: Sequence[str]) -> list[str]:
    for name in asked:
        if name not in info.schema.names:
            raise UnknownColumnError(
                f"`columns` asks for {name!r}; there are {', '.join(info.schema.names)}",
                field="columns",
                allowed=info.schema.names,
            )
    shown = [name for name in ("id", "text") if name in info.schema.names]
    return [*shown, *(name for name in asked if name not in shown)]


def _embed_query(args: argparse.Namespace, config: ServeConfig, info: DatasetInfo) -> Any:
    from fletcher.client.prompts import QUERY_PROMPTS, default_prompt, served_model

    metadata = {key.decode(): value.decode() for key, value in (info.schema.metadata or {}).items()}
    stored = metadata.get("fletcher.model")
    model = given_flags(args).get("model")
    if model is None:
        model = stored  # that version, whatever its name stands for by now
    if not args.server and model is not None:
        config = local_config(args, model=model)
    with open_client(args, without_store(config)) as client:
        known = served_model(client, model)
        qualified = f"{known['name']}@{known['hash']}"
        if stored is not None and stored != qualified:
            raise ModelMismatchError(
                f"`dataset` {args.dataset!r} holds vectors of {stored}, and the query would be "
                f"embedded by {qualified}; their distances mean nothing",
                field="model",
                allowed=[stored],
            )
        prompt = args.prompt
        if prompt is None:
            prompt = default_prompt(known, QUERY_PROMPTS)
        dims = int(metadata.get("fletcher.dims", 0)) or None
        layers = int(metadata.get("fletcher.layers", 0)) or None
        vectors = client.embed(
            [args.query],
            model=qualified,
            prompt=prompt,
            dims=None if dims == known["dim"] else dims,
            layers=None if layers == known["num_layers"] else layers,
            dtype="float32",
        )
    return vectors[0]


def _parse_filter(text: str, schema: pa.Schema) -> Filter:
    from fletcher.stores.base import Filter

    match = _FILTER.fullmatch(text)
    if not match:
        raise InvalidCommandError(
            f"`filter` is {text!r}, expected COLUMN OPERATOR VALUE, such as 'year >= 2020'",
            field="filter",
            allowed=["=", "!=", ">", "<", ">=", "<="],
        )
    name, operator, value = match.groups()
    if name not in schema.names:
        raise UnknownColumnError(
            f"`filter` names {name!r}{nearest(name, schema.names)}; "
            f"there are {', '.join(schema.names)}",
            field="filter",
            allowed=schema.names,
        )
    kind = schema.field(name).type
    operator = "=" if operator == "==" else operator
    return Filter(name, operator, _literal(name, value, kind))  # type: ignore[arg-type]


def _literal(name: str, text: str, kind: pa.DataType) -> Any:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_timestamp(kind):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, (bool, int, float)):
        return value
    raise InvalidCommandError(
        f"`filter` compares {name!r} with {text!r}, expected a value of type {kind}", field="filter"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))
