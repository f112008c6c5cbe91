"""`fletcher completion`: completions for a shell, written from the parser itself."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import Any

SHELLS = {
    "bash": 'eval "$(fletcher completion bash)"',
    "zsh": 'eval "$(fletcher completion zsh)"',
    "fish": "fletcher completion fish | source",
}


def add_parser(subparsers: Any) -> None:
    """Adds `completion`."""
    parser = subparsers.add_parser(
        "completion",
        help="print completions for a shell",
        description="Prints completions for a shell; put the example into its start-up file.",
        example=SHELLS["bash"],
    )
    parser.add_argument("shell", choices=tuple(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Prints the completions."""
    from fletcher.cli import COMMANDS, build_parser

    words = dict(_words(build_parser(COMMANDS)))
    if args.shell == "fish":
        print("\n".join(_fish(words, COMMANDS)))
    else:
        print(_bash(words, zsh=args.shell == "zsh"))
    return 0


def _words(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """For each command (`""`, `model`, `model add`): the words that may follow it."""
    words: list[str] = []
    for action in parser._actions:
        words.extend(flag for flag in action.option_strings if flag.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            words.extend(action.choices)
            for name, child in action.choices.items():
                yield from _words(child, f"{path} {name}".strip())
        elif action.choices and not action.option_strings:
            words.extend(str(choice) for choice in action.choices)
    yield path, words


def _bash(words: dict[str, list[str]], *, zsh: bool) -> str:
    cases = "\n".join(
        f"    {shlex.quote(path)}) words={shlex.quote(' '.join(some))} ;;"
        for path, some in words.items()
    )
    load = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return f"""{load}_fletcher() {{
  local word path="" words="" i
  [[ $1 == *fletcher-serve ]] && path=serve
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${{path:+$path }}${{COMP_WORDS[i]}}"
    case "$word" in
    {"|".join(shlex.quote(path) for path in words if path)}) path="$word" ;;
    esac
  done
  case "$path" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _fletcher fletcher fletcher-serve"""


def _fish(words: dict[str, list[str]], commands: dict[str, str]) -> Iterator[str]:
    for name, text in commands.items():
        rule = f"-n __fish_use_subcommand -a {name} -d {shlex.quote(text)}"
        yield f"complete -c fletcher {rule}"
    for path, some in words.items():
        if not path:
            continue
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path.split())
        for word in some:
            what = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            yield f"complete -c fletcher -n {shlex.quote(seen)} {what}"
            if path == "serve" and word.startswith("--"):
                yield f"complete -c fletcher-serve {what}"
