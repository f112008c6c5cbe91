"""`fletcher completion`: completions for a shell, by click."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from fletcher.cli.command_line import Choice, command

SHELLS = ("bash", "zsh", "fish")


@command(
    "completion",
    '# bash, in ~/.bashrc:  eval "$(fletcher completion bash)"',
    '# zsh, in ~/.zshrc:    eval "$(fletcher completion zsh)"',
    "# fish, in ~/.config/fish/config.fish:  fletcher completion fish | source",
    help="Print completions for a shell, for its start-up file.",
)
@click.argument("shell", type=Choice(SHELLS))
def cli(shell: str) -> None:
    """Prints the scripts of both programs.

    Args:
        shell: Shell that completes.
    """
    from fletcher.cli import COMPLETE_VARIABLES, root

    completion = get_completion_class(shell)
    assert completion is not None
    for program, variable in COMPLETE_VARIABLES.items():
        # Not `source()` of bash's class, which starts bash to learn its version.
        script = completion(root, {}, program, variable)
        click.echo(script.source_template % script.source_vars())
