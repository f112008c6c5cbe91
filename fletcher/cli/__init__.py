"""The commands `fletcher` and `fletcher-serve`: parse, call, print; one module a command."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Collection, Sequence
from importlib import import_module

from fletcher.cli.parser import Parser, UsageError, flags_of
from fletcher.cli.shutdown import leave_with
from fletcher.config.option import nearest
from fletcher.config.server import OPTIONS
from fletcher.errors import ConfigError, FletcherError, InvalidCommandError

# Each module has `add_parser(subparsers)` and `run(args) -> int`; it is imported when it is called.
COMMANDS = {
    "serve": "serve embeddings over Arrow Flight",
    "ingest": "embed files or standard input into a store",
    "embed": "print the vectors of texts",
    "search": "find the rows nearest to a text",
    "similar": "compare texts, or find those most like them in a file",
    "model": "add, list, verify, calibrate and remove models",
    "eval": "measure what precision, depth, width and type cost in quality",
    "tune": "measure what runs a model fastest here",
    "journal": "show and replay rows that wait for their stores",
    "store": "serve a folder of vectors over Arrow Flight",
    "doctor": "show what this machine has, and what to fix",
    "stats": "show how a running server is doing",
    "completion": "print completions for a shell",
}
EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 for a failure; 2 for a command line or a configuration that cannot be used; 130 when
        interrupted; 141 when the reader of our output went away.
    """
    # gRPC's own lines about failed connections say what our message says, and are no JSON.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    argv = sys.argv[1:] if argv is None else list(argv)
    name = f"fletcher {argv[0]}" if argv and argv[0] in COMMANDS else "fletcher"
    try:
        code = _run(argv)
        sys.stdout.flush()
    except UsageError as error:
        _complain(f"{error.command}: {error.message}; see {error.command} --help")
        code = EXIT_USAGE
    except FletcherError as error:
        _complain(f"{name}: {error.message}")
        code = EXIT_USAGE if isinstance(error, (ConfigError, InvalidCommandError)) else EXIT_FAILURE
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else EXIT_FAILURE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  (all others: a bug, told in one line)
        # A person at a terminal gets a line, and the traceback on demand.
        if os.environ.get("FLETCHER_LOG_LEVEL") == "debug":
            traceback.print_exc()
        hint = "FLETCHER_LOG_LEVEL=debug shows where"
        _complain(f"{name}: unexpected {type(error).__name__}: {error}; {hint}")
        code = EXIT_FAILURE
    return leave_with(code)


def serve_main() -> int:
    """The command `fletcher-serve`: `fletcher serve` under the name of a server."""
    return main(["serve", *sys.argv[1:]])


def build_parser(commands: Collection[str]) -> Parser:
    """The whole parser, with the flags of `commands` alone: the others are not imported."""
    parser = Parser(
        prog="fletcher",
        description="Text in over Arrow Flight, vectors in a store.",
        example="fletcher ingest articles.parquet --text body --dataset articles",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        if name in commands:
            import_module(f"fletcher.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def _run(argv: Sequence[str]) -> int:
    command = argv[0] if argv else ""
    if command and not command.startswith("-") and command not in COMMANDS:
        hint = nearest(command, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UsageError("fletcher", f"{command!r} is not a command{hint}")
    parser = build_parser({command})
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = flags_of(parser)
        # Of a command's commands, another one may have it.
        hint = " here" if flag in known else _elsewhere(flag, command) or nearest(flag, known)
        raise UsageError(
            f"fletcher {command}".strip(),
            f"{flag!r} is not understood{hint}",
        )
    if args.version:
        print("fletcher", _version())
        return 0
    if not command:
        parser.print_help()
        return 0
    return int(import_module(f"fletcher.cli.{command}").run(args))


def _elsewhere(flag: str, command: str) -> str:
    """Where an option of servers is set for a command that has no flag for it."""
    from fletcher.cli.connection import LOCAL_OPTIONS

    option = next((one for one in OPTIONS.values() if one.flag == flag), None)
    if option is None or command not in ("ingest", "embed", "search", "similar"):
        return ""
    if option.name not in LOCAL_OPTIONS:
        return " here: it is for fletcher serve"
    return f" here; set {option.variable}, or {option.name} in the file of --config"


def _complain(message: str) -> None:
    # One line, whatever an engine put into its message.
    print(" ".join(message.split()), file=sys.stderr)


def _version() -> str:
    from importlib.metadata import version

    return version("longbow-fletcher")
