"""`fletcher similar`: compare texts with each other or with texts of a file."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fletcher.cli.command_line import LocalPath, command, option
from fletcher.cli.connection import EmbedTarget, target_options
from fletcher.cli.options import format_option, json_option, text_option
from fletcher.cli.terminal import cut, print_json, printable, say, terminal_width
from fletcher.config.delivery import NO_STORE
from fletcher.errors import ConfigError

if TYPE_CHECKING:
    from fletcher.core.batches import FloatArray
    from fletcher.evaluation.similar import SimilarTexts

MAX_TEXTS = 1000
MAX_K = 10_000


@command(
    "similar",
    'fletcher similar "play go" "play chess" "bake bread"',
    'fletcher similar "play go" --candidates articles.parquet --text body --k 3',
)
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@option("--candidates PATH", type=LocalPath())
@text_option()
@format_option("candidates")
@option("--k N")
@json_option("Print JSON lines.")
@target_options("model")
def cli(
    target: EmbedTarget,
    texts: tuple[str, ...],
    candidates: str | None,
    text_column: str,
    format_name: str | None,
    k: int | None,
    as_json: bool,
) -> None:
    """Compare texts with each other, or find those most like them in a file.

    Prints the similarity of each pair of texts, the most similar pair first. It is the one that the
    model was trained for: the cosine for most models, the dot product of sparse vectors, MaxSim
    with the first text as the query for token vectors. With --candidates, prints for each text the
    most similar texts of a file instead. Nothing is stored.

    Args:
        texts: Texts, or - to read one text per line from standard input.
        candidates: Where to look for similar texts: a file, a folder of files, or - for standard
            input.
        k: With --candidates, number of lines to print for each text, 5 by default. Without it,
            number of pairs to print, all by default.
    """
    from fletcher.cli.embed_io import lines
    from fletcher.evaluation.similar import compare_texts, find_similar
    from fletcher.readers import open_source

    if k is not None and not 1 <= k <= MAX_K:
        raise ConfigError(f"`k` is {k}, expected 1 to {MAX_K}", field="k")
    if texts == ("-",) and candidates == "-":
        raise ConfigError(
            "`candidates` is -, and so is the text; standard input can be one of them",
            field="candidates",
        )
    if texts == ("-",):
        texts = tuple(lines(sys.stdin.buffer))
    _check_number(texts, 1 if candidates else 2)
    source = None
    if candidates:
        source = open_source(
            candidates, text_column=text_column, format_name=format_name, notice=say
        )
    model = target.asked_model
    with target.open_client(target.resolve(store=NO_STORE)) as client:
        if source is None:
            _print_pairs(texts, compare_texts(client, texts, model=model), k, as_json=as_json)
        else:
            _print_found(
                texts, find_similar(client, texts, source, k or 5, model=model), as_json=as_json
            )


def _check_number(texts: Sequence[str], least: int) -> None:
    if len(texts) < least:
        raise ConfigError(
            f"`texts` has {len(texts)} texts, expected at least {least}; to look for one among "
            "many give --candidates",
            field="texts",
        )
    if len(texts) > MAX_TEXTS:
        raise ConfigError(
            f"`texts` has {len(texts)} texts, at most {MAX_TEXTS} are compared at once; give "
            "most of them as --candidates",
            field="texts",
        )


def _print_pairs(
    texts: Sequence[str], compared: tuple[str, FloatArray], k: int | None, *, as_json: bool
) -> None:
    metric, scores = compared
    pairs = [
        (float(scores[one, other]), one, other)
        for one, other in itertools.combinations(range(len(texts)), 2)
    ]
    pairs.sort(key=lambda pair: -pair[0])
    width = (terminal_width() - 13) // 2
    for score, one, other in pairs[:k]:
        if as_json:
            print_json({metric: score, "first": texts[one], "second": texts[other]})
        else:
            both = " | ".join(cut(printable(texts[place]), width) for place in (one, other))
            print(f"{score:7.4f}  {both}")


def _print_found(texts: Sequence[str], found: SimilarTexts, *, as_json: bool) -> None:
    for text, best in zip(texts, found.best, strict=True):
        if not as_json and len(texts) > 1:
            print(cut(printable(text), terminal_width()))
        for rank, (score, row, candidate) in enumerate(best, 1):
            if as_json:
                line = {"text": text, "rank": rank, found.metric: score, "row": row}
                print_json(line | {"candidate": candidate})
            else:
                line_of = f"{rank:>{len(str(len(best)))}}  {score:7.4f}  {printable(candidate)}"
                print(cut(line_of, terminal_width()))
    if found.num_failed:
        say(f"note: {found.num_failed} of {found.num_candidates} candidates have no vector")
