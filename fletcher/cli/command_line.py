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

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
# Types of options by their metavar.
_TYPES = {"N": int, **dict.fromkeys(("FILE", "FOLDER"), click.Path(path_type=Path))}

_NO_BREAK_SPACE, _NO_BREAK_HYPHEN = "\xa0", "\u2011"


def _unbroken(text: str) -> str:
    """A text that is not broken into lines at its spaces and hyphens."""
    return text.replace(" ", _NO_BREAK_SPACE).replace("-", _NO_BREAK_HYPHEN)


class Formatter(click.HelpFormatter):
    """Help with bold headings and examples as they are written."""

    def write_heading(self, heading: str) -> None:
        """Writes a heading, bold where colour is shown."""
        self.write(f"{'':>{self.current_indent}}{click.style(f'{heading}:', bold=True)}\n")

    def getvalue(self) -> str:
        """The text, with ordinary spaces and hyphens for those of `_unbroken`."""
        return super().getvalue().replace(_NO_BREAK_SPACE, " ").replace(_NO_BREAK_HYPHEN, "-")


class Context(click.Context):
    """A click context whose help uses `Formatter`."""

    formatter_class = Formatter


class CommandOption(click.Option):
    """A command's option.

    Args:
        heading: Section of the help.
        variable: Environment variable that sets it as well, for the help.
        default_text: Default for the help, where `default` does not tell it.
    """

    def __init__(
        self,
        param_decls: Sequence[str] | None = None,
        *,
        heading: str = "Options",
        variable: str = "",
        default_text: str = "",
        **attributes: Any,
    ) -> None:
        super().__init__(param_decls, **attributes)
        self.heading = heading
        self._variable = variable
        self._default_text = default_text

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Names and help, with the default and the environment variable behind."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        text = re.sub(r"--[a-z-]+|\w+-\w+", lambda match: _unbroken(match[0]), record[1])
        if self._default_text:
            text += " " + _unbroken(f"[default: {self._default_text}]")
        if self._variable:
            text += " " + _unbroken(f"[env: {self._variable}]")
        return record[0], text


class Choice(click.Choice[str]):
    """One of some words; the error for another one suggests the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """The error for a word that is not a choice."""
        from fletcher.config.option import nearest

        hint = nearest(str(value), [str(one) for one in self.choices])
        return super().get_invalid_choice_message(value, ctx).rstrip(".") + hint


class _Sections(click.Command):
    """Help of commands and groups: options by heading, then examples."""

    examples: Sequence[str] = ()
    context_class = Context

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in ctx.command.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                sections.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, line by line."""
        if self.examples:
            with formatter.section("Example" if len(self.examples) == 1 else "Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(_Sections):
    """A command; `command` makes it of a function."""


class CommandGroup(_Sections, click.Group):
    """Commands under headings; those of `package` are imported when they are called.

    Args:
        sections: By heading, the commands' names and their line of help.
        package: Package with a module `NAME` for each command, whose `cli` it is.
    """

    command_class = Command

    def __init__(
        self, *, sections: Mapping[str, Mapping[str, str]], package: str = "", **attributes: Any
    ) -> None:
        super().__init__(**{"no_args_is_help": False, **attributes})
        self.sections = sections
        self._package = package

    def subcommand(
        self, name: str, *examples: str, **attributes: Any
    ) -> Callable[[Callable[..., Any]], Command]:
        """As `command`, for a command of this group."""

        def decorate(function: Callable[..., Any]) -> Command:
            made = command(name, *examples, **attributes)(function)
            self.add_command(made)
            return made

        return decorate

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        """All names, in the order of the help."""
        return [name for commands in self.sections.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; its module is imported."""
        if cmd_name in self.commands or not self._package:
            return self.commands.get(cmd_name)
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = import_module(f"{self._package}.{cmd_name}").cli
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names. Raises click.UsageError with a hint."""
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            if name not in known:
                from fletcher.config.option import nearest

                hint = nearest(name, known) or f"; commands: {', '.join(known)}"
                raise click.UsageError(f"{name!r} is not a command{hint}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Writes the commands under their headings, without importing them."""
        for heading, commands in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl(list(commands.items()))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands, then the options."""
        self.format_commands(ctx, formatter)
        super().format_options(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes commands, then options."""
        return self.complete_commands(incomplete) + click.Command.shell_complete(
            self, ctx, incomplete
        )

    def complete_commands(self, incomplete: str) -> list[CompletionItem]:
        """Completes commands, without importing them."""
        return [
            CompletionItem(name, help=text)
            for commands in self.sections.values()
            for name, text in commands.items()
            if name.startswith(incomplete)
        ]


def command(
    name: str, *examples: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Command]:
    """Makes a command of a function, whose docstring is the help.

    The docstring's `Args` are the help of those options and arguments that have none.

    Args:
        examples: Command lines for the end of the help.
    """

    def decorate(function: Callable[..., Any]) -> Command:
        text, args = split_docstring(function.__doc__, "Args")
        made = click.command(name, cls=Command, **{"help": text, **attributes})(function)
        made.examples = examples
        for param in made.params:
            if isinstance(param, (click.Option, click.Argument)) and param.help is None:
                param.help = args[str(param.name)]
        return made

    return decorate


def option(declaration: str, name: str | None = None, **attributes: Any) -> Decorator:
    """`click.option` that makes a `CommandOption`, which shows its default.

    Args:
        declaration: `--flag`, or `--flag METAVAR`; see `_TYPES` for the types.
        name: Name of the parameter; None: that of the flag.
    """
    flag, _, metavar = declaration.partition(" ")
    if metavar:
        attributes = {"metavar": metavar, "type": _TYPES.get(metavar), **attributes}
    names = [flag] if name is None else [flag, name]
    attributes = {"show_default": "default" in attributes, **attributes}
    return click.option(*names, cls=CommandOption, **attributes)


def combine(*decorators: Decorator) -> Decorator:
    """One decorator that does what several do, written above each other."""
    return lambda function: functools.reduce(
        lambda done, one: one(done), reversed(decorators), function
    )


def usage_message(error: click.UsageError, hint: str = "") -> str:
    """One line for a command line that is not understood.

    Args:
        hint: For an unknown option, in place of the nearest known one.
    """
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
