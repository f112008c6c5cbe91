"""Options shared by several commands, and flags for the server's options."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fletcher.cli.command_line import Choice, Decorator, combine, option
from fletcher.cli.terminal import say
from fletcher.config.option import SIZE, SWITCH, Option, split_list
from fletcher.config.resolution import Resolved, misspelt_variables, resolve
from fletcher.config.server import OPTIONS, PART_OF, fletcher_home
from fletcher.core.command import CHOICES
from fletcher.util.paths import is_uri

# Prefix of the parameter names of server options in click. `config_options` removes it.
_PREFIX = "option_"
_HEADINGS = {
    "network": "Network",
    "model": "Models",
    "output": "Output vectors",
    "cache": "Embedding cache",
    "engine": "Engine and devices",
    "workers": "Processes and scheduling",
    "delivery": "Stores",
    "journal": "Journal",
    "limits": "Limits",
    "telemetry": "Logs and telemetry",
    "": "Files",
}
INPUT, OUTPUT = "Input", "Output"
_FORMATS = ("parquet", "csv", "tsv", "jsonl", "arrow", "orc", "text")


@dataclass(frozen=True, slots=True)
class ConfigFlags:
    """Server options given as flags.

    `given` holds the value of each flag by option name: a text, or a list of texts if the flag is
    repeatable. `file` is the TOML file; None: the file named by FLETCHER_CONFIG, if that is set.
    """

    given: Mapping[str, Any]
    file: Path | None = None

    def resolve(self, only: Collection[str] | None = None, **flags: Any) -> Resolved:
        """Call `fletcher.config.resolution.resolve`; `flags` replace the given flags."""
        return resolve({**self.given, **flags}, os.environ, self.file, only=only)


class _ConfigText(click.ParamType[str]):
    """Text of a server option.

    The text is not checked here: `resolve` checks flags, variables and the TOML file alike.
    """

    name = "text"

    def __init__(self, one: Option) -> None:
        self._option = one

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002
        if self._option.choices:
            return f"[{'|'.join(self._option.choices)}]"
        return self._option.kind.metavar

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if self._option.choices:
            return starting(self._option.choices, incomplete)
        if self._option.name in ("model", "models", "loadable_models"):
            return complete_model(ctx, param, incomplete)
        kinds = {"FILE": "file", "FOLDER": "dir"}
        if self._option.kind.metavar in kinds:
            return [CompletionItem(incomplete, type=kinds[self._option.kind.metavar])]
        return []


def config_options(
    *names: str, text: Mapping[str, str] | None = None, warn: bool = True
) -> Decorator:
    """Add flags for the server options `names`, and `--config`.

    The command gets them as the parameter `flags`: a ConfigFlags. `text` holds help texts by option
    name, for options whose help differs from that of `fletcher serve`. With `warn`, environment
    variables that look like misspelt options are reported on standard error.
    """

    def collect(params: dict[str, Any]) -> None:
        for warning in misspelt_variables(os.environ) if warn else ():
            say(f"note: {warning}")
        values = {name: params.pop(_PREFIX + name) for name in names}
        given = {
            name: list(one) if isinstance(one, tuple) else one
            for name, one in values.items()
            if one not in (None, ())
        }
        params["flags"] = ConfigFlags(given, params.pop("config"))

    return combine(
        *(_flag(OPTIONS[name], (text or {}).get(name)) for name in names),
        option(
            "--config FILE",
            heading=_HEADINGS[""],
            help="TOML file of server options. Flags and variables win over it.",
            notes=("env: FLETCHER_CONFIG",),
        ),
        collect=collect,
    )


def _flag(one: Option, text: str | None) -> Decorator:
    kind: dict[str, Any] = {"multiple": list in one.kind.toml, "type": _ConfigText(one)}
    if one.kind is SWITCH:
        kind = {"is_flag": True, "flag_value": "true", "type": click.UNPROCESSED}
    default = [] if text and "Default" in text else _default(one)
    return option(
        one.flag,
        _PREFIX + one.name,
        heading=_HEADINGS[PART_OF[one.name]],
        help=text or one.help,
        notes=[*default, f"env: {one.variable}"],
        **kind,
    )


def _default(one: Option) -> list[str]:
    if one.default in (None, (), False):
        return []
    if one.kind is SIZE and one.default:
        gib = one.default >> 30
        return [f"default: {gib}GiB" if gib else f"default: {one.default >> 20}MiB"]
    return [f"default: {one.default}"]


def complete_model(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completions for a model name: the models in the home folder."""
    from fletcher.models.bundle.files import VERSION_NAME

    home = Path(ctx.params.get("option_home") or fletcher_home()).expanduser()
    names = sorted(one.name for one in home.glob("models/*"))
    return starting([one for one in names if VERSION_NAME.fullmatch(one)], incomplete)


def starting(words: Sequence[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def split_names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Split a comma-separated list of names; a callback for click."""
    return split_list(value or "")


def json_option(text: str = "Print JSON, for programs.") -> Decorator:
    """Add `--json`, passed to the command as `as_json`."""
    return option("--json", "as_json", is_flag=True, help=text)


def paths_argument() -> Decorator:
    """Add the argument for the files to read, passed to the command as `paths`."""
    text = (
        "Files, folders of them, patterns such as '*.csv' in quotes, URIs of s3://, gs://, hf://, "
        "https:// or http://, or - for standard input."
    )
    return click.argument(
        "paths",
        nargs=-1,
        required=True,
        metavar="PATH...",
        type=click.Path(),
        callback=_check_paths,
        help=text,
    )


def _check_paths(
    _ctx: click.Context, _param: click.Parameter, paths: tuple[str, ...]
) -> tuple[str, ...]:
    """The paths, unless one is a URI that cannot be read."""
    for path in paths:
        if is_uri(path):
            from fletcher.readers.sources import check_scheme

            check_scheme(path)
    return paths


def format_option(what: str) -> Decorator:
    """Add `--format` of input files, passed as `format_name`; the readers check it."""
    text = f"Format of the {what}: {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}. "
    return option(
        "--format NAME",
        "format_name",
        heading=INPUT,
        help=text + "Given by the name, else by the content.",
        shell_complete=lambda _, __, incomplete: starting(_FORMATS, incomplete),
    )


def text_option() -> Decorator:
    """Add `--text`, the column of texts, passed to the command as `text_column`."""
    text = (
        "Column of the texts, a field inside objects such as meta.text, or a template of several "
        r"such as '{title}\n{body}'."
    )
    return option("--text COLUMN", "text_column", default="text", heading=INPUT, help=text)


def vector_options(heading: str = OUTPUT, *, dtype: str | None = None, prompt: str) -> Decorator:
    """Add options for the output vectors, named like the fields of `EmbedCommand`.

    `dtype` is the default of `--dtype`; None leaves the choice to the server. `prompt` is the help
    text of `--prompt`.
    """
    unset = "" if dtype else " Default: float16, or float32 if the store takes nothing else."
    add = functools.partial(option, heading=heading)
    return combine(
        add(
            "--dtype",
            type=Choice(CHOICES["dtype"]),
            default=dtype,
            help="Element type of the vectors. float16 takes half the space of float32, int8 a "
            f"quarter, ubinary a 32nd, each at some loss of quality.{unset}",
        ),
        add(
            "--dims N",
            help="Leading dimensions to keep. Fewer take less space, at some loss of quality.",
        ),
        add("--layers N", help="Exit layer. Fewer layers are faster, at some loss of quality."),
        add("--prompt TEXT", help=prompt),
        add(
            "--truncate",
            type=Choice(CHOICES["truncate"]),
            default="end",
            help="Long texts: cut off at the end or start, or fail.",
        ),
        add(
            "--chunking HOW",
            help="Cut long texts into chunks: METHOD:SIZE/OVERLAP:AGGREGATION:late, of which only "
            "the method is required. Methods: tokens, sentences, paragraphs, each-sentence, "
            "each-paragraph. Aggregations: mean, weighted, max, hierarchical, or none for a row a "
            "chunk. late: each chunk is read with its surroundings, for the memory of a second "
            "graph. Long texts are not truncated; each chunk costs as much as one text. "
            "Default: none.",
            callback=lambda _, __, value: None if value == "none" else value,
        ),
    )
