"""Input and output of `fletcher embed`: batches of text, vectors in three formats."""

from __future__ import annotations

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

from fletcher.core.command import EmbedCommand
from fletcher.core.schema import CHUNK_FIELDS
from fletcher.errors import BY_CODE, ConfigError, InternalError, InvalidCommandError

if TYPE_CHECKING:
    from io import BufferedReader

    from fletcher.client import Client

BATCH_TEXTS = 1024
_SLICE_BYTES = 1 << 16
_COLUMNS = ("text", "vector", "scale", *(field.name for field in CHUNK_FIELDS))


class TextLines:
    """Given texts, or the lines of standard input, as batches for the client."""

    schema = pa.schema([("text", pa.utf8())])

    def __init__(self, given: tuple[str, ...]) -> None:
        self._given = given

    def batches(self) -> Iterator[pa.RecordBatch]:
        texts = lines(_standard_input()) if self._given == ("-",) else iter(self._given)
        while chunk := list(itertools.islice(texts, BATCH_TEXTS)):
            yield pa.record_batch([pa.array(chunk, pa.utf8())], schema=self.schema)


class TextStream:
    """Standard input as one text, in slices that are passed on as they arrive."""

    schema = TextLines.schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        stdin = _standard_input()
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        more = True
        while more:
            data = stdin.read1(_SLICE_BYTES)
            more = bool(data)
            try:
                text = decoder.decode(data, final=not more)
            except UnicodeDecodeError:
                raise InvalidCommandError(
                    "standard input is not UTF-8; convert it with iconv"
                ) from None
            if text:
                yield pa.record_batch([pa.array([text], pa.utf8())], schema=self.schema)


def _standard_input() -> BufferedReader:
    """Open standard input for a thread that may still be reading at exit.

    Python takes the lock of `sys.stdin` at exit and aborts if a thread holds it. The new file
    object has another lock.
    """
    return open(sys.stdin.fileno(), "rb", closefd=False)


def lines(stdin: Any) -> Iterator[str]:
    """Lines of standard input, blank ones too, without a byte-order mark.

    Raises InvalidCommandError if a line is not UTF-8.
    """
    from fletcher.readers.lines import raw_lines

    for number, line in enumerate(raw_lines(stdin, "standard input"), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise InvalidCommandError(
                f"standard input is not UTF-8 in line {number}; convert it with iconv"
            ) from None
        yield text.removeprefix("\ufeff") if number == 1 else text


def embedded(
    client: Client, texts: TextLines | TextStream, options: EmbedCommand
) -> Iterator[pa.RecordBatch]:
    """Batches with the columns in `_COLUMNS` that the server sends.

    Starts with an empty batch, which shows the schema. If a text has no vector, raises the error of
    the first such text.
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


def open_output(path: Path | None) -> IO[bytes]:
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


WRITERS = {"jsonl": _write_jsonl, "npy": _write_npy, "arrow": _write_arrow}
