"""`fletcher embed`: print the vectors of texts or write them to a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fletcher.cli.command_line import Choice, command, option
from fletcher.cli.connection import EmbedTarget, target_options
from fletcher.cli.options import vector_options
from fletcher.config.delivery import NO_STORE
from fletcher.core.command import EmbedCommand
from fletcher.errors import ConfigError


@command(
    "embed",
    'fletcher embed "a first text" "a second one"',
    "fletcher embed - --format npy --output vectors.npy < lines.txt",
    "tail -f log | fletcher embed - --continuous --chunking sentences:128:none",
)
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@option("--format", "format_name", type=Choice(("jsonl", "npy", "arrow")), default="jsonl")
@option("--output FILE")
@option("--continuous", is_flag=True)
@vector_options(
    "Options", dtype="float32", prompt="Prompt of the model, or text to put before each text."
)
@target_options("model")
def cli(
    target: EmbedTarget,
    texts: tuple[str, ...],
    format_name: str,
    output: Path | None,
    **fields: Any,
) -> None:
    """Print the vectors of texts.

    Each line is a JSON object with `text` and `vector`. For other formats see --format.

    Args:
        texts: Texts, or - to read one text per line from standard input.
        format_name: Output format: JSON lines, a NumPy array, or an Arrow stream.
        output: File to write to, instead of standard output.
        continuous: Read standard input as one text that keeps growing, such as from tail -f. Each
            chunk is printed when it is complete, so give --chunking ...:none. The last chunk is
            printed when the input ends.
    """
    from fletcher.cli.embed_io import WRITERS, TextLines, TextStream, embedded, open_output

    if format_name != "jsonl" and output is None and sys.stdout.isatty():
        raise ConfigError(
            f"`format` {format_name} is not for a terminal; give --output FILE", field="format"
        )
    if fields["continuous"] and texts != ("-",):
        raise ConfigError(
            "`continuous` needs - for standard input, but texts were given; leave one of them out",
            field="continuous",
        )
    options = EmbedCommand(model=target.asked_model, include_text=True, **fields)
    given = TextStream() if fields["continuous"] else TextLines(texts)
    config = target.resolve(store=NO_STORE)
    with open_output(output) as file, target.open_client(config) as client:
        WRITERS[format_name](embedded(client, given, options), file)
