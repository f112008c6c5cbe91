"""Commands of `fletcher model` for a running server: running, load, swap, ..."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from fletcher.cli.command_line import CommandGroup, Decorator, command, option
from fletcher.cli.connection import RemoteServer, server_options
from fletcher.cli.options import json_option
from fletcher.cli.progress import human
from fletcher.cli.terminal import print_table, printable
from fletcher.config.model_alias import Alias
from fletcher.errors import InvalidCommandError

SECTION = {
    "running": "List the models of a running server.",
    "load": "Load a model on a running server.",
    "swap": "Replace the running version of a model by the installed one.",
    "unload": "Take a model of a running server out of service.",
    "alias": "Divide the calls for a name among models.",
}


def add_commands(group: CommandGroup) -> None:
    """Adds the commands to those of `model`."""
    for one in (list_running, load_model, swap_model, unload_model, set_alias):
        group.add_command(one)


def _name_argument() -> Decorator:
    return click.argument("name", help="Model: NAME, or one version as NAME@HASH.")


@command("running", "fletcher model running --server grpc://localhost:8815")
@json_option()
@server_options(required=True)
def list_running(server: RemoteServer, as_json: bool) -> None:
    """List the models of a running server, with state, calls and memory.

    Each version has a line; aliases follow.
    """
    with server.connect() as client:
        _print({"models": client.list_models(), "aliases": client.aliases()}, as_json=as_json)


@command("load", "fletcher model load bge-small --server grpc://localhost:8815")
@_name_argument()
@json_option()
@server_options(required=True)
def load_model(server: RemoteServer, name: str, as_json: bool) -> None:
    """Load a model on a running server, and wait until it is ready.

    The model must be installed there, and named by the server's --models or --loadable-models.
    Another version of the name runs on beside it.
    """
    with server.connect() as client:
        _print({"model": client.load_model(name), "state": "ready"}, as_json=as_json)


@command("swap", "fletcher model swap bge-small --server grpc://localhost:8815")
@_name_argument()
@json_option()
@server_options(required=True)
def swap_model(server: RemoteServer, name: str, as_json: bool) -> None:
    """Replace the running version of a model by the installed one.

    New calls get it as soon as it is ready. Running calls end with the version before, which is
    then unloaded. NAME@HASH returns to a version that `fletcher model add --replace` kept.
    """
    with server.connect() as client:
        _print({"model": client.swap_model(name), "state": "ready"}, as_json=as_json)


@command("unload", "fletcher model unload bge-small --server grpc://localhost:8815")
@_name_argument()
@option("--force", is_flag=True)
@json_option()
@server_options(required=True)
def unload_model(server: RemoteServer, name: str, force: bool, as_json: bool) -> None:
    """Take a model out of service.

    New calls do not get it. Its memory is free after its last call.

    Args:
        force: Cut off the calls that use it; their clients get a retryable error.
    """
    with server.connect() as client:
        model = client.unload_model(name, force=force)
    _print({"model": model, "state": "retiring"}, as_json=as_json)


@command(
    "alias",
    "fletcher model alias search bge-small:0.9 bge-base:0.1 --server grpc://localhost:8815",
    "fletcher model alias search --server grpc://localhost:8815",
)
@click.argument("name")
@click.argument("models", metavar="[MODEL:WEIGHT]...", nargs=-1)
@json_option()
@server_options(required=True)
def set_alias(server: RemoteServer, name: str, models: tuple[str, ...], as_json: bool) -> None:
    """Divide the calls for a name among models by weight, until the server ends.

    --model-alias of `fletcher serve` does it from the start. The alias `default` is for calls that
    name no model.

    Args:
        name: Alias.
        models: Traffic weight per model; omit to delete the alias.
    """
    weights = _weights(name, models) if models else None
    with server.connect() as client:
        _print({"aliases": client.set_alias(name, weights)}, as_json=as_json)


def _print(answer: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
        return
    rows = [
        (
            f"{one['name']}@{one['hash']}",
            one["state"],
            f"{one['calls']} calls",
            f"{human(one['memory_bytes'])}B",
            "" if one["is_current"] else "as NAME@HASH alone",
        )
        for one in answer.get("models", [])
    ]
    if rows:
        print_table(rows)
    for name, shares in answer.get("aliases", {}).items():
        print(f"{printable(name)}  {printable(shares)}")
    if "model" in answer:
        print(f"{printable(answer['model'])}  {answer['state']}")


def _weights(name: str, models: Sequence[str]) -> dict[str, float]:
    text = ",".join(models)
    try:
        return dict(Alias.from_text(f"{name}={text}").targets)
    except ValueError:
        raise InvalidCommandError(
            f"`models` is {text[:200]!r}, expected MODEL:WEIGHT with weights over 0, and a name "
            "of letters, digits, `.`, `_` and `-`",
            field="models",
        ) from None
