"""Click commands with headings, examples, lazy modules and spelling suggestions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fletcher.util.docstrings import split_docstring
from fletcher.util.paths import check_local

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class LocalPath(click.Path):
    """Path on this machine; a URI is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        check_local(str(value), str(param.name) if param is not None else "path")
        return super().convert(value, param, ctx)


# Type of an option's value, by the metavar in its declaration.
_TYPES = {"N": int, **dict.fromkeys(("FILE", "FOLDER"), LocalPath(path_type=Path))}

# Replaces characters at which a help line could break by characters at which it cannot.
_UNBROKEN = str.maketrans(" -", "\xa0\u2011")
_BREAKABLE = str.maketrans("\xa0\u2011", " -")


class Formatter(click.HelpFormatter):
    """Help formatter with bold headings; makes unbreakable characters plain again."""

    def write_heading(self, heading: str) -> None:
        self.write(f"{'':>{self.current_indent}}{click.style(f'{heading}:', bold=True)}\n")

    def getvalue(self) -> str:
        return super().getvalue().translate(_BREAKABLE)


class Context(click.Context):
    """Click context that formats help with `Formatter`."""

    formatter_class = Formatter


class CommandOption(click.Option):
    """A command's option, listed in the help under a `heading`.

    The option's help text ends with its `notes`, each in brackets.
    """

    def __init__(
        self,
        param_decls: Sequence[str] | None = None,
        *,
        heading: str = "Options",
        notes: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        super().__init__(param_decls, **attributes)
        self.heading, self._notes = heading, notes

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None:
            return None
        text = re.sub(r"--[a-z-]+|\w+-\w+", lambda match: match[0].translate(_UNBROKEN), record[1])
        return record[0], " ".join(
            [text, *(f"[{one}]".translate(_UNBROKEN) for one in self._notes)]
        )


class Choice(click.Choice[str]):
    """Choice of words; the error for an unknown word suggests the nearest one."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        from fletcher.config.option import nearest

        hint = nearest(str(value), [str(one) for one in self.choices])
        return super().get_invalid_choice_message(value, ctx).rstrip(".") + hint


class Command(click.Command):
    """A command whose help lists options by heading, then examples."""

    examples: Sequence[str] = ()
    context_class = Context

    def invoke(self, ctx: click.Context) -> Any:
        for param in self.params:
            value = ctx.params.get(str(param.name))
            if not isinstance(param.type, click.Path) and _has_other_bytes(value):
                raise click.BadParameter("expected UTF-8, it holds other bytes", ctx, param)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in ctx.command.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                sections.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Example" if len(self.examples) == 1 else "Examples"):
                indent = " " * formatter.current_indent
                formatter.write("".join(f"{indent}{line}\n" for line in self.examples))


class CommandGroup(Command, click.Group):
    """A group whose help lists commands by heading, with one line of help each.

    `sections` maps headings to commands, and commands to their lines of help. With `package`, a
    command is the `cli` of the package's module with its name, imported when it is called.
    """

    def __init__(
        self, *, sections: Mapping[str, Mapping[str, str]], package: str = "", **attributes: Any
    ) -> None:
        super().__init__(**{"no_args_is_help": False, **attributes})
        self.sections = sections
        self._package = package

    def subcommand(
        self, name: str, *examples: str, **attributes: Any
    ) -> Callable[[Callable[..., Any]], Command]:
        """Like `command`, and add the new command to this group."""

        def decorate(function: Callable[..., Any]) -> Command:
            made = command(name, *examples, **attributes)(function)
            self.add_command(made)
            return made

        return decorate

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        """Names of all commands, in the order of the help."""
        return [name for commands in self.sections.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands or not self._package:
            return self.commands.get(cmd_name)
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = import_module(f"{self._package}.{cmd_name}").cli
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            if name not in known:
                from fletcher.config.option import nearest

                hint = nearest(name, known) or f"; commands: {', '.join(known)}"
                raise click.UsageError(f"{name!r} is not a command{hint}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, commands in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl(list(commands.items()))
        super().format_options(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return self.complete_commands(incomplete) + click.Command.shell_complete(
            self, ctx, incomplete
        )

    def complete_commands(self, incomplete: str) -> list[CompletionItem]:
        """Completions for a command name, found without importing commands."""
        return [
            CompletionItem(name, help=text)
            for commands in self.sections.values()
            for name, text in commands.items()
            if name.startswith(incomplete)
        ]


def command(
    name: str, *examples: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function; the function's docstring is the help.

    An option or argument without help text takes it from `Args` of the docstring. The help ends
    with `examples`.
    """

    def decorate(function: Callable[..., Any]) -> Command:
        text, args = split_docstring(function.__doc__, "Args")
        made = click.command(name, cls=Command, **{"help": text, **attributes})(function)
        made.examples = examples
        for param in made.params:
            if isinstance(param, (click.Option, click.Argument)) and param.help is None:
                param.help = args.get(str(param.name))
        return made

    return decorate


def option(declaration: str, name: str | None = None, **attributes: Any) -> Decorator:
    """`click.option` declared as `--flag` or `--flag METAVAR`; shows its default."""
    flag, _, metavar = declaration.partition(" ")
    if metavar:
        attributes = {"metavar": metavar, "type": _TYPES.get(metavar), **attributes}
    names = [flag] if name is None else [flag, name]
    attributes = {"show_default": "default" in attributes, **attributes}
    return click.option(*names, cls=CommandOption, **attributes)


def combine(
    *decorators: Decorator, collect: Callable[[dict[str, Any]], None] | None = None
) -> Decorator:
    """One decorator that applies several decorators; the first one is outermost.

    `collect` changes the parameters before the function is called, for example to replace some of
    them by one object.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(**params: Any) -> Any:
            if collect is not None:
                collect(params)
            return function(**params)

        decorated: Callable[..., Any] = call
        for one in reversed(decorators):
            decorated = one(decorated)
        return decorated

    return decorate


def _has_other_bytes(value: object) -> bool:
    """Whether an argument, or one of several, holds bytes that are not UTF-8."""
    if isinstance(value, (list, tuple)):
        return any(map(_has_other_bytes, value))
    # Python decodes each such byte to half a surrogate pair.
    return isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value)


def usage_message(error: click.UsageError, hint: str = "") -> str:
    """One line for a usage error; `hint` replaces the suggestion of a known flag."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return re.sub(r"\s+", " ", error.format_message()).rstrip(".")
    from fletcher.config.option import nearest

    flag, ctx = error.option_name, error.ctx
    known = _flags(ctx.command)
    siblings: Mapping[str, click.Command] = getattr(
        ctx.parent and ctx.parent.command, "commands", {}
    )
    elsewhere = any(flag in _flags(one) for one in siblings.values())
    hint = hint or (" here" if elsewhere else nearest(flag, known))
    return f"{flag!r} is not understood{hint}"


def _flags(one: click.Command) -> list[str]:
    return [flag for param in one.params for flag in param.opts if flag.startswith("--")]
