"""Argument parsing shared by the commands; flags of `ServeConfig` derive from its options."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fletcher.config.option import SIZE, SWITCH, Option, nearest
from fletcher.config.resolution import Resolved, resolve
from fletcher.config.server import OPTIONS, PART_OF
from fletcher.core.command import CHOICES

_DEST = "option."


class UsageError(Exception):
    """A command line that cannot be understood; `command` is what was being called."""

    def __init__(self, command: str, message: str) -> None:
        super().__init__(message)
        self.command = command
        self.message = message


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with room for flags, and the example as it is written."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 26, **kwargs})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(("example:", "sources:")):
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, takes no abbreviations and shows one example."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", Formatter)
        if example:
            kwargs["epilog"] = f"example:\n  {example}"
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message)
        if choice:
            message += nearest(choice[1], re.findall(r"[\w.-]+", choice[2]))
        raise UsageError(self.prog, message)


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """All flags of a parser and of the parsers below it."""
    flags: set[str] = set()
    for action in parser._actions:
        flags.update(flag for flag in action.option_strings if flag.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                flags |= flags_of(child)
    return flags


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds the flags of options, and `--config`; `read_config` reads what was given."""
    groups: dict[str, Any] = {}
    for name in names:
        part = PART_OF[name] or "files"
        if part not in groups:
            groups[part] = parser.add_argument_group(part)
        _add(groups[part], OPTIONS[name], OPTIONS[name].default)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file of options; flags go before it"
    )


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Adds the files that a command reads."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a file, a folder of them, or - for standard input"
    )


def add_format(group: Any, what: str) -> None:
    """Adds `--format`, of `what` a command reads; readers check it, which import Arrow."""
    group.add_argument(
        "--format",
        metavar="NAME",
        help=f"{what}: parquet, csv, tsv, jsonl, arrow or text (default: by name, else by content)",
    )


def add_long_texts(group: Any) -> None:
    """Adds the flags that say what becomes of texts longer than the model takes."""
    group.add_argument(
        "--truncate",
        choices=CHOICES["truncate"],
        default="end",
        help="long texts: cut there, or fail (default: end)",
    )
    group.add_argument(
        "--chunking",
        default="none",
        metavar="HOW",
        help="cut texts, METHOD[:SIZE[/OVERLAP]][:AGGREGATION][:late]: tokens, sentences, "
        "paragraphs, each-sentence or each-paragraph; mean, weighted, max, hierarchical "
        "(sentences, then paragraphs), or none for a row a chunk; nothing of a long text is lost, "
        "and each chunk takes the time of a text; late: chunks know what is around them, for the "
        "memory of a second graph (default: none)",
    )


def _add(group: Any, option: Option, default: Any) -> None:
    text = option.help.replace("%", "%%") + _default(option, default)
    common: dict[str, Any] = {
        "dest": _DEST + option.name,
        "default": argparse.SUPPRESS,
        "help": text,
    }
    if option.kind is SWITCH:
        group.add_argument(option.flag, action="store_const", const="true", **common)
    elif list in option.kind.toml:
        group.add_argument(option.flag, action="append", metavar=option.kind.metavar, **common)
    else:
        # Choices are checked where the environment's and the file's are, for the same message.
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else option.kind.metavar
        group.add_argument(option.flag, metavar=metavar, **common)


def _default(option: Option, default: Any) -> str:
    if default in (None, (), False):
        return ""
    if option.kind is SIZE:
        return (
            f" (default: {default >> 30}GiB)"
            if default >= 1 << 30
            else f" (default: {default >> 20}MiB)"
        )
    return f" (default: {default})"


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The options given by flags, by name: text, or a list of texts for a repeatable flag."""
    return {
        name.removeprefix(_DEST): value
        for name, value in vars(args).items()
        if name.startswith(_DEST)
    }


def check_server(args: argparse.Namespace) -> None:
    """Refuses a `--server` that is no address, under that name. Raises InvalidCommandError."""
    if args.server:
        from fletcher.net.address import parse_address

        parse_address(args.server, field="server")


def read_config(
    args: argparse.Namespace,
    environ: Mapping[str, str],
    only: Iterable[str] | None = None,
    **flags: Any,
) -> Resolved:
    """The configuration that the flags added by `add_options`, environment and file make.

    Args:
        only: Option names to take; others keep their defaults.
        flags: By option name, texts that stand in for flags.

    Raises:
        ConfigError: As `fletcher.config.server.resolve`.
    """
    given = {**given_flags(args), **flags}
    return resolve(given, environ, args.config, only=None if only is None else set(only))
