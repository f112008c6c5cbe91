"""`fletcher model load`, `swap`, `unload`, `alias`, `running`: the models of a running server."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fletcher.cli.connection import add_server, open_server
from fletcher.cli.parser import check_server
from fletcher.cli.progress import human
from fletcher.config.model_alias import Alias
from fletcher.errors import InvalidCommandError

if TYPE_CHECKING:
    from fletcher.client import Client

COMMANDS = ("running", "load", "swap", "unload", "alias")


def add_parsers(commands: Any) -> None:
    """Adds the commands to those of `model`."""
    running = commands.add_parser(
        "running",
        help="list the models of a running server",
        description="Lists each version, its state, the calls that hold it and its memory; then "
        "the aliases.",
        example="fletcher model running --server grpc://localhost:8815",
    )
    load = commands.add_parser(
        "load",
        help="have a running server load a model",
        description="Has a running server load a model that is installed there, and that its "
        "--models or --loadable-models name; ends when it is ready. Another version of the name "
        "runs on beside it.",
        example="fletcher model load bge-small --server grpc://localhost:8815",
    )
    swap = commands.add_parser(
        "swap",
        help="have a running server put a model in the place of the one of that name",
        description="Has a name stand for the version that is installed under it now. New calls "
        "get it as soon as it is ready; those that run end with the version before, which then "
        "goes. NAME@HASH goes back to a version that `model add --replace` has kept.",
        example="fletcher model swap bge-small --server grpc://localhost:8815",
    )
    unload = commands.add_parser(
        "unload",
        help="have a running server take a model out of service",
        description="No new calls get the model; its memory is free when the last one ends.",
        example="fletcher model unload bge-small --server grpc://localhost:8815",
    )
    unload.add_argument(
        "--force", action="store_true", help="cut those calls off; clients are told to come again"
    )
    for one in (load, swap, unload):
        one.add_argument("name", help="the model: NAME, or one version as NAME@HASH")
    alias = commands.add_parser(
        "alias",
        help="have a running server divide calls among models",
        description="Has calls for an alias divided among models by weight, until the server ends; "
        "--model-alias of `serve` does it for good. The alias `default` is for calls that name no "
        "model.",
        example="fletcher model alias search bge-small:0.9 bge-base:0.1 --server "
        "grpc://localhost:8815",
    )
    alias.add_argument("name", help="the alias")
    alias.add_argument(
        "models", nargs="*", metavar="MODEL:WEIGHT", help="who gets how much; none: the alias goes"
    )
    for one in (running, load, swap, unload, alias):
        add_server(one, required=True)


def run(args: argparse.Namespace) -> int:
    """Runs one of the commands."""
    check_server(args)
    with open_server(args) as client:
        answer = _answer(client, args)
    if args.json:
        print(json.dumps(answer, ensure_ascii=False))
        return 0
    for one in answer.get("models", []):
        stands_for = "" if one["is_current"] else "  as NAME@HASH alone"
        print(
            f"{one['name']}@{one['hash']}  {one['state']}  {one['calls']} calls  "
            f"{human(one['memory_bytes'])}B{stands_for}"
        )
    for name, shares in answer.get("aliases", {}).items():
        print(f"{name}  {shares}")
    if "model" in answer:
        print(f"{answer['model']}  {answer['state']}")
    return 0


def _answer(client: Client, args: argparse.Namespace) -> dict[str, Any]:
    command = args.model_command
    if command == "running":
        return {"models": client.list_models(), "aliases": client.aliases()}
    if command == "alias":
        return {"aliases": client.set_alias(args.name, _weights(args) if args.models else None)}
    if command == "unload":
        return {"model": client.unload_model(args.name, force=args.force), "state": "retiring"}
    load = client.load_model if command == "load" else client.swap_model
    return {"model": load(args.name), "state": "ready"}


def _weights(args: argparse.Namespace) -> dict[str, float]:
    text = ",".join(args.models)
    try:
        return dict(Alias.parse(f"{args.name}={text}").targets)
    except ValueError:
        raise InvalidCommandError(
            f"`models` is {text[:200]!r}, expected MODEL:WEIGHT with weights over 0, and a name "
            "of letters, digits, `.`, `_` and `-`",
            field="models",
        ) from None
