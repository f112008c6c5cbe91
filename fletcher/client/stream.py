"""Documents that arrive in parts, returned as chunks with vectors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.client.connection import Connection
from fletcher.client.exchange import Exchange
from fletcher.client.messages import Message, RowError
from fletcher.core.command import EmbedCommand
from fletcher.errors import InvalidCommandError
from fletcher.net.message_size import batch_bytes
from fletcher.util.closing import Closing

_MAX_UTF8_BYTES = 4  # of a character


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A chunk of a document.

    Attributes:
        id: The document's id.
        index: Number of the chunk in the document, from 0.
        start: First character (Unicode code point) in the document.
        end: First character after the chunk.
        text: The text; None if `include_text` is false.
        vector: [dims] of the requested `dtype`.
        scale: Factor of int8 values; None for other vectors.
        token_count: Tokens that the model read.
        error: Reason why the rest of the document has no chunks; None for a chunk. With an error,
            only `id` is set besides it.
    """

    id: str
    index: int
    start: int
    end: int
    text: str | None
    vector: npt.NDArray[Any]
    scale: float | None
    token_count: int
    error: RowError | None = None


class DocumentStream(Iterator[Chunk], Closing):
    """An iterator over chunks, in order; made by `Client.stream`.

    A thread reads the input, and iteration waits for the input. The errors are those of `Exchange`.
    `close`, or the end of `with`, cancels the call.
    """

    def __init__(
        self,
        connection: Connection,
        pieces: Iterable[str | tuple[str, str] | None],
        options: EmbedCommand,
    ) -> None:
        schema = pa.schema([(options.id_column, pa.utf8()), (options.text_column, pa.utf8())])
        outgoing = _messages(pieces, schema, connection.transfer.message_bytes)
        self._exchange = Exchange(connection, schema, outgoing, options)
        self._waiting: deque[Chunk] = deque()

    def __next__(self) -> Chunk:
        while not self._waiting:
            batch = next(self._exchange)
            self._waiting += _chunks(batch, self._exchange.errors)
        return self._waiting.popleft()

    def close(self) -> None:
        """End the call, and cancel it if chunks are left. Idempotent."""
        self._exchange.close()


def _messages(
    pieces: Iterable[str | tuple[str, str] | None], schema: pa.Schema, max_bytes: int
) -> Iterator[Message]:
    """Messages for each part of a document, and one for each document's end."""
    batch_id = row = number = 0
    size = max(1, max_bytes // _MAX_UTF8_BYTES)
    for piece in pieces:
        name, text = piece if isinstance(piece, tuple) else (str(number), piece)
        rows: list[list[tuple[str, str]]] = [[]]
        if piece is None:
            number += 1
        elif isinstance(text, str):
            rows = [[(name, text[n : n + size])] for n in range(0, max(1, len(text)), size)]
        else:
            raise _refusal(piece)
        for one in rows:
            batch = _batch(one, schema)
            yield Message(
                batch, batch_id, row, batch_bytes(batch), last=True, document_end=piece is None
            )
            batch_id, row = batch_id + 1, row + len(one)


def _batch(rows: Sequence[tuple[str, str]], schema: pa.Schema) -> pa.RecordBatch:
    columns: tuple[Any, ...] = tuple(zip(*rows, strict=True)) or ((), ())
    try:
        arrays = [pa.array(column, pa.utf8()) for column in columns]
    except (pa.ArrowException, TypeError, UnicodeError):
        raise _refusal(rows[0]) from None
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _refusal(piece: Any) -> InvalidCommandError:
    return InvalidCommandError(
        f"`pieces` yields {str(piece)[:100]!r} of type {type(piece).__name__}, expected Unicode "
        "text, (ID, text), or None at the end of a document"
    )


def _chunks(batch: pa.RecordBatch, errors: Sequence[RowError]) -> Iterator[Chunk]:
    vectors = batch.column("vector")
    found = iter(np.asarray(vectors.flatten()).reshape(-1, vectors.type.list_size))
    nothing = np.zeros(0, vectors.type.value_type.to_pandas_dtype())
    failures = iter(errors)
    for row in batch.drop_columns(["vector", "timestamp"]).to_pylist():
        failed = row["chunk_index"] is None
        yield Chunk(
            row["id"],
            -1 if failed else row["chunk_index"],
            -1 if failed else row["chunk_start"],
            -1 if failed else row["chunk_end"],
            row.get("text"),
            nothing if failed else next(found),
            row.get("scale"),
            row["token_count"],
            next(failures, None) if failed else None,
        )
