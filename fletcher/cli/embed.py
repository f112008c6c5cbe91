"""`fletcher embed`: the vectors of texts, printed or into a file."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fletcher.cli.connection import add_connection, local_config, open_client
from fletcher.cli.parser import given_flags
from fletcher.config import NO_STORE
from fletcher.errors import ConfigError, InvalidCommandError
from fletcher.options import CHOICES

CHUNK_TEXTS = 1024
Vectors = npt.NDArray[np.floating[Any]]


def add_parser(subparsers: Any) -> None:
    """Adds `embed`."""
    parser = subparsers.add_parser(
        "embed",
        usage="fletcher embed [options] TEXT... | -",
        help="print the vectors of texts",
        description="Prints the vectors of texts; - reads standard input, one text a line.",
        example='fletcher embed "a first text" "a second one"',
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument(
        "--format",
        choices=("jsonl", "npy", "arrow"),
        default="jsonl",
        help="JSON lines, a NumPy array, or an Arrow stream (default: jsonl)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write there, not to standard output"
    )
    parser.add_argument("--dims", type=int, metavar="N", help="leading dimensions to keep")
    parser.add_argument(
        "--dtype", choices=CHOICES["dtype"], default="float32", help="element type of the vectors"
    )
    parser.add_argument("--prompt", help="a prompt of the model, or text to put before each text")
    parser.add_argument(
        "--truncate", choices=CHOICES["truncate"], default="end", help="what to do with long texts"
    )
    add_connection(parser, ("model",))


def run(args: argparse.Namespace) -> int:
    """Embeds and writes."""
    if args.format != "jsonl" and args.output is None and sys.stdout.isatty():
        raise ConfigError(
            f"`format` {args.format} is not for a terminal; give --output FILE", field="format"
        )
    config = local_config(args, store=NO_STORE)
    options = {"dims": args.dims, "dtype": args.dtype, "prompt": args.prompt}
    if args.server:
        options["model"] = given_flags(args).get("model")
    with _open_output(args.output) as output, open_client(args, config) as client:
        chunks = (
            (chunk, client.embed(chunk, truncate=args.truncate, **options))
            for chunk in _chunks(_texts(args.texts))
        )
        _WRITERS[args.format](chunks, output)
    return 0


def _texts(given: list[str]) -> Iterator[str]:
    if given == ["-"]:
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                yield line.rstrip(b"\r\n").decode()
            except UnicodeDecodeError:
                raise InvalidCommandError(
                    f"standard input is not UTF-8 in line {number}; convert it with iconv"
                ) from None
    else:
        yield from given


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while chunk := list(itertools.islice(iterator, CHUNK_TEXTS)):
        yield chunk


def _open_output(path: Path | None) -> IO[bytes]:
    if path is None:
        return open(sys.stdout.fileno(), "wb", closefd=False)
    try:
        return path.open("wb")
    except OSError as error:
        raise ConfigError(
            f"`output` is {str(path)!r}, which cannot be written: {error.strerror}", field="output"
        ) from None


def _write_jsonl(chunks: Iterable[tuple[list[str], Vectors]], output: IO[bytes]) -> None:
    for texts, vectors in chunks:
        for text, vector in zip(texts, vectors, strict=True):
            # `str` of a float32 is the shortest text that reads back as the same float32.
            row = {"text": text, "vector": [float(str(value)) for value in vector]}
            output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        output.flush()


def _write_npy(chunks: Iterable[tuple[list[str], Vectors]], output: IO[bytes]) -> None:
    arrays = [vectors for _, vectors in chunks]
    np.lib.format.write_array(output, np.concatenate(arrays) if arrays else np.empty((0, 0)))


def _write_arrow(chunks: Iterable[tuple[list[str], Vectors]], output: IO[bytes]) -> None:
    import pyarrow as pa

    writer: Any = None
    for texts, vectors in chunks:
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        batch = pa.record_batch({"text": pa.array(texts, pa.utf8()), "vector": column})
        if writer is None:
            writer = pa.ipc.new_stream(output, batch.schema)
        writer.write_batch(batch)
    if writer is not None:
        writer.close()


_WRITERS = {"jsonl": _write_jsonl, "npy": _write_npy, "arrow": _write_arrow}
