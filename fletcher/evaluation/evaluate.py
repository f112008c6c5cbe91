"""Variants against the reference on a corpus of pairs, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
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
from fletcher.core.batches import FloatArray, Int64Array
from fletcher.evaluation import metrics
from fletcher.evaluation.metrics import Float64Array
from fletcher.evaluation.pairs import Pairs
from fletcher.evaluation.search import search
from fletcher.evaluation.variants import Engine, Variant, usual
from fletcher.evaluation.vectors import Embedded, embed

if TYPE_CHECKING:
    from fletcher.client import Client

OpenClient = Callable[[Engine], AbstractContextManager["Client"]]

_DEPTH = 100  # places that are looked at
_TOP = 10
_RESCORED = 4 * _TOP
_NUM_PAIRS = 20_000
_SEED = 1
# Above this, on average between texts that have nothing to do with each other, cosines say little
# by themselves and thresholds mislead (https://arxiv.org/abs/1909.00512). Search still ranks.
ANISOTROPIC = 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a variant.

    Attributes:
        variant: It, with its numbers.
        recall: By k, the share of queries whose document is among the first k.
        ndcg: At 10, the mean.
        ndcg_loss: Against the reference, the mean over the queries.
        ndcg_loss_95: Half the width of its 95% interval.
        top: The share of the reference's own first 10 that is among the first 10.
        top_rescored: The share of them that is among the first 40: what is found where four times
            as many candidates are scored anew by their exact vectors.
        cosine: To the reference's vectors of the documents: mean, p1 (1% are less) and min.
        spearman: Of the similarities of random queries and documents, to the reference's.
        alignment: See `metrics.alignment`.
        uniformity: See `metrics.uniformity`, over random documents.
        mean_cosine: Between random documents.
        num_alike: Documents that share their vector with another, bit for bit.
        bytes_per_vector: What a vector takes on the wire and in a store.
        texts_per_s: Documents, from the first one sent to the last vector received. Width and type
            are applied after the model has run: where they alone differ, they share one run.
    """

    variant: Variant
    recall: Mapping[int, float]
    ndcg: float
    ndcg_loss: float
    ndcg_loss_95: float
    top: float
    top_rescored: float
    cosine: Mapping[str, float]
    spearman: float
    alignment: float
    uniformity: float
    mean_cosine: float
    num_alike: int
    bytes_per_vector: int
    texts_per_s: float | None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What came of an evaluation.

    Attributes:
        model: ModelInfo.
        pairs: The corpus.
        rows: A row for each variant; the first is the reference.
        num_truncated: Documents whose end the model did not see.
    """

    model: Mapping[str, Any]
    pairs: Pairs
    rows: Sequence[Row]
    num_truncated: int

    def warnings(self) -> Iterator[str]:
        """What one should know before believing the rows, a line each."""
        pairs, first = self.pairs, self.rows[0]
        if pairs.num_repeated:
            yield (
                f"{pairs.num_repeated:,} of {pairs.num_rows:,} rows left out: their query or "
                "document comes in an earlier row"
            )
        if self.num_truncated:
            yield (
                f"{self.num_truncated:,} of {len(pairs.documents):,} documents are longer than "
                f"{self.model['max_length']} tokens; their ends were not seen"
            )
        if first.mean_cosine > ANISOTROPIC:
            yield (
                f"random documents have a cosine of {first.mean_cosine:.2f} on average: all "
                "vectors point one way (anisotropy), so a cosine says little by itself; rank by "
                "it, and use no threshold of another model"
            )
        least = 0
        for row in self.rows:
            if row.num_alike > least:
                yield (
                    f"{row.variant}: {row.num_alike:,} documents share their vector with another"
                )
            least = max(least, first.num_alike)  # of others, what they add


def evaluate(
    pairs: Pairs,
    reference_engine: Engine,
    engines: Sequence[Engine],
    variants: Sequence[Variant] | None,
    open_client: OpenClient,
    progress: Callable[[str], None],
    *,
    model_name: str | None = None,
) -> EvaluationReport:
    """Embeds a corpus in several ways and compares what comes of it.

    Args:
        pairs: The corpus.
        reference_engine: What makes the reference, at full depth and width, in float32.
        engines: What can run the model, what a server would take first.
        variants: What to compare; None: what is usual for the model.
        open_client: Brings up a server that runs an engine, for as long as it is entered.
        progress: Gets a line now and then.
        model_name: The model; None: the server's default.

    Raises:
        FletcherError: A server cannot be brought up, refused or failed.
    """
    reference: _Reference | None = None
    rows: dict[Variant, Row] = {}
    num_truncated = 0
    todo = [Variant(reference_engine)]
    while todo:
        engine = todo[0].engine
        progress(f"starting {engine}")
        with open_client(engine) as client:
            model = served_model(client, model_name)
            if reference is None:
                more = usual(engines, model) if variants is None else variants
                todo = list(dict.fromkeys(one.of(model) for one in (*todo, *more)))
                _try(client, model, todo)
            rates: dict[tuple[int | None, str | None], float] = {}
            for variant in [one for one in todo if one.engine == engine]:
                progress(str(variant))
                queries, documents = _embed(client, model, variant, pairs)
                run = (variant.layers, variant.chunking)
                if documents.texts_per_s is not None:
                    rates[run] = documents.texts_per_s
                if reference is None:
                    reference = _Reference.of(queries.vectors, documents.vectors, pairs)
                    num_truncated = documents.num_truncated
                rows[variant] = _compare(
                    variant, queries, documents, pairs, reference, rates.get(run)
                )
        todo = [one for one in todo if one.engine != engine]
    return EvaluationReport(model, pairs, list(rows.values()), num_truncated)


def _try(client: Client, model: Mapping[str, Any], variants: Iterable[Variant]) -> None:
    """Has the server refuse now what it would refuse after much work."""
    for variant in variants:
        options = _options(variant, model)
        embed(client, pa.array(["a text"]), chunking=variant.chunking, **options)


def _options(variant: Variant, model: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of EmbedCommand; what is as usual is not asked for."""
    return {
        "model": f"{model['name']}@{model['hash']}",  # whatever the name may stand for by now
        "layers": variant.layers if variant.layers != model["num_layers"] else None,
        "dims": variant.dims if variant.dims != model["dim"] else None,
        "dtype": variant.dtype,
    }


def _embed(
    client: Client, model: Mapping[str, Any], variant: Variant, pairs: Pairs
) -> tuple[Embedded, Embedded]:
    """Queries and documents; queries stay float32, and whole, as those of searches are."""
    options = _options(variant, model)
    asked = {**options, "dtype": "float32"}
    queries = embed(client, pairs.queries, prompt=default_prompt(model, QUERY_PROMPTS), **asked)
    prompt = default_prompt(model, DOCUMENT_PROMPTS)
    documents = embed(client, pairs.documents, prompt=prompt, chunking=variant.chunking, **options)
    return queries, documents


@dataclass(frozen=True, slots=True)
class _Reference:
    """What all variants are compared with.

    Attributes:
        documents: float32 [num_documents, dim].
        found: int64 [num_queries, k], its own first documents.
        gains: float64 [num_queries].
        drawn: Queries and documents, int64 [num_pairs] each, whose similarities are compared.
        similarities: float32 [num_pairs], of these.
        random: Documents, int64 [num_pairs] twice, no one beside itself.
    """

    documents: FloatArray
    found: Int64Array
    gains: Float64Array
    drawn: tuple[Int64Array, Int64Array]
    similarities: FloatArray
    random: tuple[Int64Array, Int64Array]

    @classmethod
    def of(cls, queries: FloatArray, documents: FloatArray, pairs: Pairs) -> _Reference:
        draw = np.random.default_rng(_SEED).integers
        num_queries, num_documents = len(queries), len(documents)
        drawn = draw(num_queries, size=_NUM_PAIRS), draw(num_documents, size=_NUM_PAIRS)
        first = draw(num_documents, size=_NUM_PAIRS)
        second = (first + draw(1, num_documents, size=_NUM_PAIRS)) % num_documents
        queries, unit = metrics.unit(queries), metrics.unit(documents)
        found = search(queries, unit, _DEPTH)
        return cls(
            documents=documents,
            found=found[:, :_TOP],
            gains=metrics.ndcg(metrics.ranks(found, pairs.relevant), _TOP),
            drawn=drawn,
            similarities=_products(queries, unit, drawn),
            random=(first, second),
        )


def _compare(
    variant: Variant,
    queries: Embedded,
    documents: Embedded,
    pairs: Pairs,
    reference: _Reference,
    texts_per_s: float | None,
) -> Row:
    asked, unit = metrics.unit(queries.vectors), metrics.unit(documents.vectors)
    found = search(asked, unit, _DEPTH)
    places = metrics.ranks(found, pairs.relevant)
    gains = metrics.ndcg(places, _TOP)
    lost, lost_95 = metrics.loss(gains, reference.gains)
    cosines = metrics.cosines(documents.vectors, reference.documents)
    first, second = reference.random
    return Row(
        variant=variant,
        recall={k: metrics.recall(places, k) for k in (1, _TOP, _DEPTH)},
        ndcg=float(gains.mean()),
        ndcg_loss=lost,
        ndcg_loss_95=lost_95,
        top=metrics.shared(found[:, :_TOP], reference.found),
        top_rescored=metrics.shared(found[:, :_RESCORED], reference.found),
        cosine={
            "mean": float(cosines.mean()),
            "p1": float(np.percentile(cosines, 1)),
            "min": float(cosines.min()),
        },
        spearman=metrics.spearman(_products(asked, unit, reference.drawn), reference.similarities),
        alignment=metrics.alignment(asked, unit[pairs.relevant]),
        uniformity=metrics.uniformity(unit[first], unit[second]),
        mean_cosine=float(_products(unit, unit, reference.random).mean()),
        num_alike=metrics.num_alike(documents.vectors),
        bytes_per_vector=documents.bytes_per_vector,
        texts_per_s=texts_per_s,
    )


def _products(
    left: FloatArray, right: FloatArray, pairs: tuple[Int64Array, Int64Array]
) -> FloatArray:
    products: FloatArray = np.einsum("nd,nd->n", left[pairs[0]], right[pairs[1]])
    return products
