"""The programs `fletcher` and `fletcher-serve`, with one module per command."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from fletcher.cli.command_line import Choice, Command, CommandGroup, Context, command, usage_message
from fletcher.cli.shutdown import EXIT_INTERRUPTED, leave_with
from fletcher.cli.terminal import printable, wants_colour
from fletcher.errors import ConfigError, FletcherError, InvalidCommandError

# Each command outside "Help" is the `cli` of the module with its name. The module is imported when
# the command is called.
SECTIONS = {
    "Data": {
        "ingest": "Embed files or standard input into a store.",
        "embed": "Print the vectors of texts.",
        "search": "Find the rows nearest to a text.",
        "similar": "Compare texts, or find those most like them in a file.",
        "verify": "Compare a dataset with what a job stored.",
        "jobs": "List, show, resume and cancel jobs of fletcher ingest.",
        "index": "Index a dataset, and measure the index.",
        "optimize": "Compact a dataset and its index.",
        "datasets": "List, show and drop datasets, and print their first rows.",
    },
    "Server": {
        "serve": "Serve embeddings over Arrow Flight.",
        "store": "Serve a folder of vectors over Arrow Flight.",
        "stats": "Show the state of a running server.",
    },
    "Models": {
        "model": "Add, list, verify, calibrate and remove models; load them on servers.",
        "tune": "Measure the fastest way to run a model on this machine.",
        "eval": "Measure the cost in quality of precision, depth, width and type.",
    },
    "Diagnosis": {
        "doctor": "Check hardware, engines, models and stores, and show fixes.",
        "journal": "Show, check and replay rows that wait for their stores.",
        "overwrite": "List and drop the rows of unfinished overwrites.",
    },
    "Help": {
        "help": "Show the help of a command.",
        "version": "Print the version.",
        "completion": "Print completions for a shell.",
    },
}
COMMANDS = {name: text for section in SECTIONS.values() for name, text in section.items()}
EXIT_FAILURE, EXIT_USAGE, EXIT_BROKEN_PIPE = 1, 2, 141
# To ask for completions, a completion script calls the program with this variable set.
COMPLETE_VARIABLES = {
    "fletcher": "_FLETCHER_COMPLETE",
    "fletcher-serve": "_FLETCHER_SERVE_COMPLETE",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 for an invalid command line or
        configuration, 130 after an interrupt, and 141 if the reader of standard output closed it.
        Some commands return 1 to report a finding.
    """
    # gRPC logs failed connections itself. Its lines repeat our error message, and are not JSON.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # any terminal can show any text
        sys.stdout.reconfigure(errors="backslashreplace")
    name = f"fletcher {argv[0]}" if argv and argv[0] in COMMANDS else "fletcher"
    try:
        code = _complete("fletcher", root)
        if code is None:
            colour = wants_colour(sys.stdout)
            given = tuple(argv)
            with root.make_context("fletcher", argv, color=colour, obj=given) as context:
                code = int(root.invoke(context) or 0)
        sys.stdout.flush()
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else name
        hint = _elsewhere(error, path) if isinstance(error, click.NoSuchOption) else ""
        _complain(path, f"{usage_message(error, hint)}; see {path} --help")
        code = EXIT_USAGE
    except click.ClickException as error:
        _complain(name, error.format_message())
        code = EXIT_FAILURE
    except FletcherError as error:
        _complain(name, error.message)
        code = EXIT_USAGE if isinstance(error, (ConfigError, InvalidCommandError)) else EXIT_FAILURE
    except click.exceptions.Exit as done:
        code = done.exit_code
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else EXIT_FAILURE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output again at exit. That flush must not print an error either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  (any other error is a bug, reported in one line)
        # The traceback is printed only with FLETCHER_LOG_LEVEL=debug.
        if os.environ.get("FLETCHER_LOG_LEVEL") == "debug":
            traceback.print_exc()
        hint = "FLETCHER_LOG_LEVEL=debug shows where"
        _complain(name, f"unexpected {type(error).__name__}: {error}; {hint}")
        code = EXIT_FAILURE
    return leave_with(code)


def serve_main() -> int:
    """Run `fletcher serve` as the program `fletcher-serve`."""
    if os.environ.get(COMPLETE_VARIABLES["fletcher-serve"]):
        serve = root.get_command(Context(root), "serve")
        assert serve is not None
        return _complete("fletcher-serve", serve) or 0
    return main(["serve", *sys.argv[1:]])


def _complete(program: str, completed: click.Command) -> int | None:
    """Print completions if a shell asks for them; None if no shell does."""
    instruction = os.environ.get(COMPLETE_VARIABLES[program])
    if not instruction:
        return None
    return shell_complete(completed, {}, program, COMPLETE_VARIABLES[program], instruction)


def _run_root(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


root = CommandGroup(
    name="fletcher",
    sections=SECTIONS,
    package=__name__,
    help="Text in over Arrow Flight, vectors in a store.",
    invoke_without_command=True,
    callback=click.pass_context(_run_root),
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
root.examples = (
    "fletcher ingest articles.parquet --text body --dataset articles",
    'fletcher search "play chess" --dataset articles',
    "fletcher help model add",
)
click.version_option(
    package_name="longbow-fletcher", message="fletcher %(version)s", help="Print the version."
)(root)


def _complete_words(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    group: click.Command | None = context.find_root().command
    for word in context.params.get("words") or ():
        group = group.get_command(context, word) if isinstance(group, CommandGroup) else None
    return group.complete_commands(incomplete) if isinstance(group, CommandGroup) else []


@command("help", "fletcher help ingest", "fletcher help model add")
@click.argument("words", metavar="[COMMAND]...", nargs=-1, shell_complete=_complete_words)
@click.pass_context
def show_help(context: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command, or of all.

    Args:
        words: Name of the command, such as `model add`.
    """
    shown: click.Context = context.find_root()
    for index, word in enumerate(words):
        if not isinstance(shown.command, CommandGroup):
            raise click.UsageError(f"{' '.join(words[:index])!r} has no commands", ctx=context)
        _, found, _ = shown.command.resolve_command(shown, [word])
        if found is None:  # an option
            raise click.UsageError(f"{word!r} is not a command", ctx=context)
        shown = Context(found, info_name=word, parent=shown)
    click.echo(shown.get_help(), color=shown.color)


@command("version", "fletcher version")
def show_version() -> None:
    """Print the version."""
    from importlib.metadata import version

    click.echo(f"fletcher {version('longbow-fletcher')}")


@command(
    "completion",
    '# bash, in ~/.bashrc:  eval "$(fletcher completion bash)"',
    '# zsh, in ~/.zshrc:    eval "$(fletcher completion zsh)"',
    "# fish, in ~/.config/fish/config.fish:  fletcher completion fish | source",
)
@click.argument("shell", type=Choice(("bash", "zsh", "fish")))
def print_completions(shell: str) -> None:
    """Print completions for a shell, for its start-up file.

    Args:
        shell: Shell to print the completions for.
    """
    completion = get_completion_class(shell)
    assert completion is not None
    for program, variable in COMPLETE_VARIABLES.items():
        # `source()` is not called here: for bash, it would start bash to ask for its version.
        script = completion(root, {}, program, variable)
        click.echo(script.source_template % script.source_vars())


for one in (show_help, show_version, print_completions):
    root.add_command(one)


def _elsewhere(error: click.NoSuchOption, path: str) -> str:
    """Hint for an unknown flag that is an option of the server; empty for other flags."""
    from fletcher.cli.connection import LOCAL_OPTIONS
    from fletcher.config.server import OPTIONS

    one = next((one for one in OPTIONS.values() if one.flag == error.option_name), None)
    if one is None or path.rsplit(maxsplit=1)[-1] not in SECTIONS["Data"]:
        return ""
    if one.name not in LOCAL_OPTIONS:
        return "; it is an option of fletcher serve"
    return f"; set {one.variable}, or {one.name} in the file of --config"


def _complain(name: str, message: str) -> None:
    # The message is printed as one line, even if an engine or a server put more lines into it.
    shown = click.style(f"{name}:", fg="red") if wants_colour(sys.stderr) else f"{name}:"
    print(shown, printable(message), file=sys.stderr)


__all__ = ["COMMANDS", "Command", "main", "root", "serve_main"]
