"""Texts beside each other, and the texts of a stream that are most like some others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fletcher.client.prompts import (
    DOCUMENT_PROMPTS,
    QUERY_PROMPTS,
    default_prompt,
    served_model,
)
from fletcher.core.batches import FloatArray
from fletcher.core.command import EmbedCommand
from fletcher.evaluation.metrics import unit
from fletcher.evaluation.search import Nearest
from fletcher.evaluation.vectors import embed, read_vectors
from fletcher.readers import TextSource

if TYPE_CHECKING:
    from fletcher.client import Client


@dataclass(frozen=True, slots=True)
class Found:
    """What was found.

    Attributes:
        best: For each text the candidates most like it, best first: cosine, place among the
            candidates from 0, text.
        num_candidates: How many there were.
        num_failed: How many of them have no vector.
    """

    best: Sequence[Sequence[tuple[float, int, str]]]
    num_candidates: int
    num_failed: int


def compare(client: Client, texts: Sequence[str], *, model: str | None = None) -> FloatArray:
    """The cosine of each text to each.

    Args:
        client: Of a server.
        texts: Some, at least one.
        model: A model's name; None: the server's default.

    Returns:
        float32 [num_texts, num_texts].

    Raises:
        FletcherError: The server refused or failed, or a text has no vector.
    """
    vectors = unit(embed(client, pa.array(texts, pa.utf8()), model=model, dtype="float32").vectors)
    return np.asarray(vectors @ vectors.T, np.float32)


def find(
    client: Client,
    texts: Sequence[str],
    candidates: TextSource,
    k: int,
    *,
    model: str | None = None,
) -> Found:
    """The candidates most like each text; all of them are looked at, a batch at a time.

    Texts get the model's prompt for queries and candidates that for documents, where it has some.

    Args:
        client: Of a server.
        texts: Some, at least one.
        candidates: Where they are read from.
        k: How many to find for each text.
        model: A model's name; None: the server's default.

    Raises:
        FletcherError: The server refused or failed, the candidates cannot be read, or one of
            `texts` has no vector.
    """
    known = served_model(client, model)
    query, document = (default_prompt(known, one) for one in (QUERY_PROMPTS, DOCUMENT_PROMPTS))
    asked = embed(client, pa.array(texts, pa.utf8()), model=model, prompt=query, dtype="float32")
    queries, nearest = unit(asked.vectors), Nearest(len(texts), k)
    kept: dict[int, tuple[int, str]] = {}
    num_rows = 0
    options = EmbedCommand(
        model=model,
        output="dense",
        text_column=candidates.selection.text,
        id_column=candidates.selection.id or "id",
        prompt=document,
        dtype="float32",
        include_text=True,
    )
    with client.exchange(candidates, options) as exchange:
        for answer in exchange:
            valid = answer.column("vector").is_valid()
            rows: Any = np.flatnonzero(valid) + num_rows
            num_rows += answer.num_rows
            batch = answer.filter(valid)
            first = nearest.num_documents
            nearest.add(queries @ unit(read_vectors(batch)).T)
            still = set(nearest.found.reshape(-1).tolist())
            kept = {place: one for place, one in kept.items() if place in still}
            for place in still:
                if place >= first:
                    text = batch.column("text")[place - first].as_py()
                    kept[place] = int(rows[place - first]), text
    best = [
        [(score, *kept[place]) for score, place in zip(scores, places, strict=True)]
        for scores, places in zip(nearest.scores.tolist(), nearest.found.tolist(), strict=True)
    ]
    return Found(best, num_rows, num_rows - nearest.num_documents)
