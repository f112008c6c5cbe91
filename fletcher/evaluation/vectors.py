"""Embed texts on a server, and measure the speed and the size of vectors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fletcher.core.batches import FloatArray
from fletcher.core.command import EmbedCommand
from fletcher.core.quantization import VectorReader
from fletcher.errors import BY_CODE, InternalError

if TYPE_CHECKING:
    from fletcher.client import Client

_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of some texts.

    Attributes:
        vectors: float32 [num_texts, dims], dequantized.
        bytes_per_vector: Size of a received vector, including its scale if it has one.
        num_truncated: Number of truncated texts.
        texts_per_s: Texts per second, timed from sending the first text to receiving the last
            vector; None if the server had some of the texts in its cache.
    """

    vectors: FloatArray
    bytes_per_vector: int
    num_truncated: int
    texts_per_s: float | None


def embed(client: Client, texts: pa.Array, **options: Any) -> Embedded:
    """Embed texts in one exchange.

    Args:
        client: Client that is connected to the server.
        texts: utf8 [num_texts].
        **options: Fields of EmbedCommand. A field that is None keeps its default.

    Raises:
        FletcherError: The server refuses the call or fails, the model's vectors are not dense, or a
            text has no vector.
    """
    hits = _cache_hits(client)
    started = time.perf_counter()
    batches = embed_batches(client, texts, output="dense", **options)
    elapsed_s = time.perf_counter() - started
    return Embedded(
        vectors=np.concatenate([read_vectors(batch) for batch in batches]),
        bytes_per_vector=_bytes_per_vector(batches[0].schema),
        num_truncated=sum(batch.column("truncated").true_count for batch in batches),
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


def read_vectors(batch: pa.RecordBatch) -> FloatArray:
    """Dequantized vectors: float32 [num_rows, dims]; a null vector becomes NaN."""
    return VectorReader.from_schema(batch.schema).vectors(batch)


def _bytes_per_vector(schema: pa.Schema) -> int:
    vector = schema.field("vector").type
    scale = schema.field("scale").type.bit_width if "scale" in schema.names else 0
    return int(vector.list_size * vector.value_type.bit_width + scale) // 8


def _cache_hits(client: Client) -> float:
    return float(client.stats().get("fletcher.cache.hits", 0))
