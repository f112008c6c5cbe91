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
from fletcher.core.similarity import Similarity
from fletcher.evaluation.search import Nearest
from fletcher.evaluation.vectors import embed_batches
from fletcher.readers import TextSource

if TYPE_CHECKING:
    from fletcher.client import Client


@dataclass(frozen=True, slots=True)
class SimilarTexts:
    """Result of `find_similar`.

    Attributes:
        metric: Name of the scores: `cosine`, `dot`, `maxsim` or another of `Similarity`.
        best: The most similar candidates of each text, best first. A candidate is a tuple of its
            score, its index among all candidates from 0, and its text.
        num_candidates: Number of candidates.
        num_failed: Number of candidates without a vector.
    """

    metric: str
    best: Sequence[Sequence[tuple[float, int, str]]]
    num_candidates: int
    num_failed: int


def compare_texts(
    client: Client, texts: Sequence[str], *, model: str | None = None
) -> tuple[str, FloatArray]:
    """Similarity of each text, as a query, to each text.

    The similarity is the one that the model was trained for. At least one text must be given.

    Returns:
        Name of the similarity, and the scores, float32 [num_texts, num_texts]. Only MaxSim depends
        on which text is the query.

    Raises:
        FletcherError: The server refuses the call or fails, or a text has no vector.
    """
    similarity, queries, batches = _embed_queries(client, texts, model=model)
    scores = [similarity.scores(queries, batch) for batch in batches]
    return similarity.name, np.concatenate(scores, axis=1)


def _embed_queries(
    client: Client, texts: Sequence[str], **options: Any
) -> tuple[Similarity, list[FloatArray], list[pa.RecordBatch]]:
    column = pa.array(texts, pa.utf8())
    batches = embed_batches(client, column, dtype="float32", **options)
    similarity = Similarity.from_schema(batches[0].schema)
    return similarity, [one for batch in batches for one in similarity.queries(batch)], batches


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
    similarity, queries, _ = _embed_queries(client, texts, model=model, prompt=query)
    nearest = Nearest(len(texts), k)
    kept: dict[int, tuple[int, str]] = {}
    num_rows = 0
    options = EmbedCommand(
        model=model,
        text_column=candidates.selection.text_column,
        id_column=candidates.selection.id or "id",
        prompt=document,
        dtype="float32",
        include_text=True,
    )
    with client.exchange(candidates, options) as exchange:
        for answer in exchange:
            scores = similarity.scores(queries, answer)
            valid = np.isfinite(scores).all(axis=0)
            rows: Any = np.flatnonzero(valid) + num_rows
            num_rows += answer.num_rows
            batch = answer.filter(pa.array(valid))
            first = nearest.num_documents
            nearest.add_scores(scores[:, valid])
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
    return SimilarTexts(similarity.name, best, num_rows, num_rows - nearest.num_documents)
