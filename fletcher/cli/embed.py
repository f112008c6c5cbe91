"""`fletcher embed`: the vectors of texts, printed or into a file."""

from __future__ import annotations

import argparse
import codecs
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.cli.connection import add_connection, local_config, open_client
from fletcher.cli.parser import add_long_texts, check_server, given_flags
from fletcher.config.delivery import NO_STORE
from fletcher.core.command import CHOICES, EmbedCommand
from fletcher.core.schema import CHUNK_FIELDS
from fletcher.errors import BY_CODE, ConfigError, InternalError, InvalidCommandError

if TYPE_CHECKING:
    from io import BufferedReader

    from fletcher.client import Client

BATCH_TEXTS = 1024
_SLICE_BYTES = 1 << 16
_COLUMNS = ("text", "vector", "scale", *(field.name for field in CHUNK_FIELDS))


def add_parser(subparsers: Any) -> None:
    """Adds `embed`."""
    parser = subparsers.add_parser(
        "embed",
        usage="fletcher embed [options] TEXT... | -",
        help="print the vectors of texts",
        description="Prints the vectors of texts; - reads standard input, one text a line.",
        example='fletcher embed "a first text" "a second one"',
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text, or - for standard input")
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
        "--layers", type=int, metavar="N", help="exit layer; fewer: faster, at some loss"
    )
    parser.add_argument(
        "--dtype",
        choices=CHOICES["dtype"],
        default="float32",
        help="of the vectors: float16 halves them, int8 quarters them, ubinary keeps a bit a "
        "dimension, each at some loss (default: float32)",
    )
    parser.add_argument("--prompt", help="a prompt of the model, or text to put before each text")
    add_long_texts(parser)
    parser.add_argument(
        "--continuous",
        action="store_true",
        help="standard input is one text that goes on, such as tail -f gives: each chunk is "
        "printed when it is complete, so with --chunking ...:none; the last one comes with the end",
    )
    add_connection(parser, ("model",))


def run(args: argparse.Namespace) -> int:
    """Embeds and writes."""
    check_server(args)
    if args.format != "jsonl" and args.output is None and sys.stdout.isatty():
        raise ConfigError(
            f"`format` {args.format} is not for a terminal; give --output FILE", field="format"
        )
    if args.continuous and args.texts != ["-"]:
        raise ConfigError(
            "`continuous` goes with -, which is standard input, and texts were given; leave one of "
            "them out",
            field="continuous",
        )
    options = EmbedCommand(
        model=given_flags(args).get("model") if args.server else None,
        dims=args.dims,
        layers=args.layers,
        dtype=args.dtype,
        prompt=args.prompt,
        truncate=args.truncate,
        chunking=None if args.chunking == "none" else args.chunking,
        include_text=True,
        continuous=args.continuous,
    )
    texts = _Pieces() if args.continuous else _Texts(args.texts)
    config = local_config(args, store=NO_STORE)
    with _open_output(args.output) as output, open_client(args, config) as client:
        _WRITERS[args.format](_embedded(client, texts, options), output)
    return 0


class _Texts:
    """Texts as batches, in the form that the client takes."""

    schema = pa.schema([("text", pa.utf8())])

    def __init__(self, given: list[str]) -> None:
        self._given = given

    def batches(self) -> Iterator[pa.RecordBatch]:
        texts = lines(_standard_input()) if self._given == ["-"] else iter(self._given)
        while chunk := list(itertools.islice(texts, BATCH_TEXTS)):
            yield pa.record_batch([pa.array(chunk, pa.utf8())], schema=self.schema)


class _Pieces:
    """Standard input as pieces of one text, as they come."""

    schema = _Texts.schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        stdin = _standard_input()
        decoder = codecs.getincrementaldecoder("utf-8")()
        more = True
        while more:
            data = stdin.read1(_SLICE_BYTES)
            more = bool(data)
            try:
                piece = decoder.decode(data, final=not more)
            except UnicodeDecodeError:
                raise InvalidCommandError(
                    "standard input is not UTF-8; convert it with iconv"
                ) from None
            if piece:
                yield pa.record_batch([pa.array([piece], pa.utf8())], schema=self.schema)


def _standard_input() -> BufferedReader:
    """Standard input for a thread that may still wait in it when the process ends.

    Python takes the lock of `sys.stdin` then, and aborts where a thread has it.
    """
    return open(sys.stdin.fileno(), "rb", closefd=False)


def lines(stdin: Iterable[bytes]) -> Iterator[str]:
    """The lines of standard input. Raises InvalidCommandError for what is not UTF-8."""
    for number, line in enumerate(stdin, 1):
        try:
            yield line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError:
            raise InvalidCommandError(
                f"standard input is not UTF-8 in line {number}; convert it with iconv"
            ) from None


def _embedded(
    client: Client, texts: _Texts | _Pieces, options: EmbedCommand
) -> Iterator[pa.RecordBatch]:
    """Batches of text, vector and its scale, and of chunks their places.

    Raises what a text without a vector failed by.
    """
    with client.exchange(texts, options) as exchange:
        names = [name for name in _COLUMNS if name in exchange.schema.names]
        yield pa.RecordBatch.from_pylist([], exchange.schema).select(names)
        for batch in exchange:
            for error in exchange.errors:
                kind = BY_CODE.get(error.code, InternalError)
                number = "" if error.row is None else f" {error.row + 1}"
                raise kind(f"text{number}: {error.message}")
            yield batch.select(names)


def _open_output(path: Path | None) -> IO[bytes]:
    if path is None:
        return open(sys.stdout.fileno(), "wb", closefd=False)
    try:
        return path.open("wb")
    except OSError as error:
        raise ConfigError(
            f"`output` is {str(path)!r}, which cannot be written: {error.strerror}", field="output"
        ) from None


def _vectors(batch: pa.RecordBatch) -> npt.NDArray[Any]:
    column = batch.column("vector")
    if not pa.types.is_fixed_size_list(column.type):
        raise ConfigError(
            f"`format` npy is for one vector a text, and the model gives {column.type}; ask for "
            "arrow or jsonl",
            field="format",
            allowed=["jsonl", "arrow"],
        )
    return np.asarray(column.flatten()).reshape(len(column), column.type.list_size)


def _write_jsonl(batches: Iterable[pa.RecordBatch], output: IO[bytes]) -> None:
    for batch in batches:
        others = batch.drop_columns("vector").to_pylist()
        one_each = pa.types.is_fixed_size_list(batch.schema.field("vector").type)
        vectors = map(_numbers, _vectors(batch)) if one_each else batch.column("vector").to_pylist()
        for fields, vector in zip(others, vectors, strict=True):
            row = {"text": fields.pop("text"), "vector": vector, **fields}
            output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        output.flush()


def _numbers(vector: npt.NDArray[Any]) -> list[Any]:
    if vector.dtype.kind != "f":
        return list(vector.tolist())
    # `str` of a float32 is the shortest text that reads back as the same float32.
    return [float(str(value)) for value in vector]


def _write_npy(batches: Iterable[pa.RecordBatch], output: IO[bytes]) -> None:
    np.lib.format.write_array(output, np.concatenate([_vectors(batch) for batch in batches]))


def _write_arrow(batches: Iterable[pa.RecordBatch], output: IO[bytes]) -> None:
    rest = iter(batches)
    first = next(rest)
    with pa.ipc.new_stream(output, first.schema) as writer:
        for batch in rest:
            writer.write_batch(batch)


_WRITERS = {"jsonl": _write_jsonl, "npy": _write_npy, "arrow": _write_arrow}
