"""Similarity between texts, and between texts and a stream of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fletcher.client.prompts import DOCUMENT_PROMPTS, QUERY_PROMPTS, default_prompt, served_model
from fletcher.core.batches import FloatArray
from fletcher.core.command import EmbedCommand
from fletcher.evaluation.metrics import unit
from fletcher.evaluation.search import Nearest
from fletcher.evaluation.vectors import embed, read_vectors
from fletcher.readers import TextSource

if TYPE_CHECKING:
    from fletcher.client import Client


@dataclass(frozen=True, slots=True)
class SimilarTexts:
    """Result of `find_similar`.

    Attributes:
        best: The most similar candidates of each text, best first. A candidate is a tuple of its
            cosine, its index among all candidates from 0, and its text.
        num_candidates: Number of candidates.
        num_failed: Number of candidates without a vector.
    """

    best: Sequence[Sequence[tuple[float, int, str]]]
    num_candidates: int
    num_failed: int


def compare_texts(client: Client, texts: Sequence[str], *, model: str | None = None) -> FloatArray:
    """Cosine of each pair of texts: float32 [num_texts, num_texts].

    At least one text must be given.

    Raises:
        FletcherError: The server refuses the call or fails, or a text has no vector.
    """
    vectors = unit(embed(client, pa.array(texts, pa.utf8()), model=model, dtype="float32").vectors)
    return np.asarray(vectors @ vectors.T, np.float32)


def find_similar(
    client: Client,
    texts: Sequence[str],
    candidates: TextSource,
    k: int,
    *,
    model: str | None = None,
) -> SimilarTexts:
    """Find the candidates that are most similar to each text.

    Texts get the model's prompt for queries, and candidates get its prompt for documents. Without
    such a prompt they are embedded as they are.

    Args:
        client: Client that is connected to a server.
        texts: Texts to find candidates for, at least one.
        candidates: Source of the candidates, which is read once.
        k: Number of candidates to find for each text.
        model: Name of the model; None: the server's default model.

    Raises:
        FletcherError: The server refuses the call or fails, the candidates cannot be read, or one
            of `texts` has no vector.
    """
    served = served_model(client, model)
    query, document = (default_prompt(served, one) for one in (QUERY_PROMPTS, DOCUMENT_PROMPTS))
    asked = embed(client, pa.array(texts, pa.utf8()), model=model, prompt=query, dtype="float32")
    queries, nearest = unit(asked.vectors), Nearest(len(texts), k)
    kept: dict[int, tuple[int, str]] = {}
    num_rows = 0
    options = EmbedCommand(
        model=model,
        output="dense",
        text_column=candidates.selection.text_column,
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
            nearest.add_scores(queries @ unit(read_vectors(batch)).T)
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
    return SimilarTexts(best, num_rows, num_rows - nearest.num_documents)
