"""Embed texts on a server, and measure the speed and the size of vectors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fletcher.core.batches import FloatArray
from fletcher.core.command import EmbedCommand
from fletcher.core.similarity import Similarity
from fletcher.errors import BY_CODE, InternalError

if TYPE_CHECKING:
    from fletcher.client import Client

_BATCH_ROWS = 1024
# Number of rows whose vectors are read at once. A sparse vector is read as one number for each
# token of the vocabulary.
_BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of some texts.

    Attributes:
        batch: The columns `vector`, and `scale` if the vectors have scales; one row per text.
        similarity: Comparison of queries with these vectors.
        num_truncated: Number of truncated texts.
        texts_per_s: Texts per second, timed from sending the first text to receiving the last
            vector; None if the server had some of the texts in its cache.
    """

    batch: pa.RecordBatch
    similarity: Similarity
    num_truncated: int
    texts_per_s: float | None

    @property
    def bytes_per_vector(self) -> int:
        """Mean size of the vectors of a text, with their scales."""
        num_bytes: int = sum(_num_bytes(column) for column in self.batch.columns)
        return round(num_bytes / max(1, int(self.batch.num_rows)))

    @property
    def vectors(self) -> FloatArray:
        """Dequantized dense vectors: float32 [num_texts, dims]."""
        assert self.similarity.reader is not None
        return self.similarity.reader.vectors(self.batch)

    def blocks(self, num_rows: int = _BLOCK_ROWS) -> Iterator[pa.RecordBatch]:
        """The rows in slices of at most `num_rows`."""
        for first in range(0, self.batch.num_rows, num_rows):
            yield self.batch.slice(first, num_rows)

    def rows(self) -> Iterator[FloatArray]:
        """Vectors of each text.

        They are float32 [dims], or [num_vectors, dims] if a text has several vectors.
        """
        for block in self.blocks():
            if self.similarity.output == "dense" and self.similarity.reader is not None:
                yield from self.similarity.reader.vectors(block)
            else:
                yield from self.similarity.queries(block)


def embed(client: Client, texts: pa.Array, **options: Any) -> Embedded:
    """Embed texts in one exchange.

    Args:
        client: Client that is connected to the server.
        texts: utf8 [num_texts], at least one.
        **options: Fields of EmbedCommand. A field that is None keeps its default.

    Raises:
        FletcherError: The server refuses the call or fails, or a text has no vector.
    """
    hits = _cache_hits(client)
    started = time.perf_counter()
    batches = embed_batches(client, texts, **options)
    elapsed_s = time.perf_counter() - started
    table = pa.Table.from_batches(batches)
    names = [name for name in ("vector", "scale") if name in table.schema.names]
    (batch,) = table.select(names).combine_chunks().to_batches()
    return Embedded(
        batch=batch,
        similarity=Similarity.from_schema(batch.schema),
        num_truncated=sum(one.column("truncated").true_count for one in batches),
        texts_per_s=None if _cache_hits(client) > hits else len(texts) / elapsed_s,
    )


def embed_batches(client: Client, texts: pa.Array, **options: Any) -> list[pa.RecordBatch]:
    """Embed texts in one exchange; the arguments and errors are those of `embed`.

    Returns:
        Answers in the order of the texts, with one row per text, of whatever output the model has.
    """
    given = {name: value for name, value in options.items() if value is not None}
    wanted = EmbedCommand(priority="bulk", include_text=False, **given)
    table = pa.table({"text": texts})
    batches = []
    with client.exchange(iter(table.to_batches(_BATCH_ROWS)), wanted) as exchange:
        for batch in exchange:
            for error in exchange.errors:
                kind = BY_CODE.get(error.code, InternalError)
                raise kind(f"text {error.row}: {error.message}")
            batches.append(batch)
    return batches


def _num_bytes(column: pa.Array) -> int:
    """Size of a column's numbers, without offsets and nulls."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return _num_bytes(column.flatten())
    if pa.types.is_struct(kind):
        return sum(_num_bytes(one) for one in column.flatten())
    return int(len(column) * kind.bit_width // 8)


def _cache_hits(client: Client) -> float:
    return float(client.stats().get("fletcher.cache.hits", 0))
