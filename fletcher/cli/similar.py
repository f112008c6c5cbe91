"""`fletcher similar`: how alike texts are, and which texts of a file are most like them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fletcher.cli.connection import add_connection, local_config, open_client
from fletcher.cli.embed import lines
from fletcher.cli.parser import add_format, check_server, given_flags
from fletcher.cli.terminal import cut, printable, say, terminal_width
from fletcher.config.delivery import NO_STORE
from fletcher.errors import ConfigError

if TYPE_CHECKING:
    from fletcher.core.batches import FloatArray
    from fletcher.evaluation.similar import SimilarTexts

MAX_TEXTS = 1000
MAX_K = 10_000


def add_parser(subparsers: Any) -> None:
    """Adds `similar`."""
    parser = subparsers.add_parser(
        "similar",
        usage="fletcher similar [options] TEXT TEXT... | - [--candidates PATH]",
        help="compare texts, or find those most like them in a file",
        description="Prints the cosine of each text to each, the most alike first; with "
        "--candidates, the texts of a file that are most like each. - reads standard input, one "
        "text a line. Nothing is stored.",
        example='fletcher similar "play go" --candidates articles.parquet --text body --k 3',
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text, or - for standard input")
    parser.add_argument(
        "--candidates", metavar="PATH", help="a file, a folder of them, or -: look there"
    )
    parser.add_argument(
        "--text", default="text", metavar="COLUMN", help="of the candidates (default: text)"
    )
    add_format(parser, "of the candidates")
    parser.add_argument(
        "--k", type=int, metavar="N", help="lines to print for each text (default: 5; all pairs)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    add_connection(parser, ("model",))


def run(args: argparse.Namespace) -> int:
    """Compares or finds, and prints."""
    from fletcher.evaluation.similar import compare_texts, find_similar
    from fletcher.readers import open_source

    check_server(args)
    if args.k is not None and not 1 <= args.k <= MAX_K:
        raise ConfigError(f"`k` is {args.k}, expected 1 to {MAX_K}", field="k")
    if args.texts == ["-"] and args.candidates == "-":
        raise ConfigError(
            "`candidates` is -, and so is the text: standard input can be one of them",
            field="candidates",
        )
    texts = list(lines(sys.stdin.buffer)) if args.texts == ["-"] else args.texts
    _check_number(texts, 1 if args.candidates else 2)
    source = None
    if args.candidates:
        source = open_source(
            args.candidates, text_column=args.text, format_name=args.format, notice=say
        )
    model = given_flags(args).get("model") if args.server else None
    with open_client(args, local_config(args, store=NO_STORE)) as client:
        if source is None:
            _print_pairs(texts, compare_texts(client, texts, model=model), args)
        else:
            _print_found(texts, find_similar(client, texts, source, args.k or 5, model=model), args)
    return 0


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


def _print_pairs(texts: Sequence[str], cosines: FloatArray, args: argparse.Namespace) -> None:
    pairs = sorted(
        (
            (float(cosines[one, other]), one, other)
            for one in range(len(texts))
            for other in range(one + 1, len(texts))
        ),
        key=lambda pair: -pair[0],
    )
    width = (terminal_width() - 13) // 2
    for cosine, one, other in pairs[: args.k]:
        if args.json:
            _json_line({"cosine": cosine, "first": texts[one], "second": texts[other]})
        else:
            both = " | ".join(cut(printable(texts[place]), width) for place in (one, other))
            print(f"{cosine:7.4f}  {both}")


def _print_found(texts: Sequence[str], found: SimilarTexts, args: argparse.Namespace) -> None:
    for text, best in zip(texts, found.best, strict=True):
        if not args.json and len(texts) > 1:
            print(cut(printable(text), terminal_width()))
        for rank, (cosine, row, candidate) in enumerate(best, 1):
            if args.json:
                line = {"text": text, "rank": rank, "cosine": cosine, "row": row}
                _json_line({**line, "candidate": candidate})
            else:
                line_of = f"{rank:>{len(str(len(best)))}}  {cosine:7.4f}  {printable(candidate)}"
                print(cut(line_of, terminal_width()))
    if found.num_failed:
        say(f"note: {found.num_failed} of {found.num_candidates} candidates have no vector")


def _json_line(fields: dict[str, Any]) -> None:
    print(json.dumps(fields, ensure_ascii=False))
