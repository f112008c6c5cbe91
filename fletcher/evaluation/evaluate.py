"""Comparison of variants with a reference on a corpus of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fletcher.client.prompts import DOCUMENT_PROMPTS, QUERY_PROMPTS, default_prompt, served_model
from fletcher.core.batches import FloatArray, Int64Array
from fletcher.evaluation import metrics
from fletcher.evaluation.metrics import Float64Array
from fletcher.evaluation.pairs import Pairs
from fletcher.evaluation.search import search
from fletcher.evaluation.variants import Engine, Variant, usual_variants
from fletcher.evaluation.vectors import Embedded, embed

if TYPE_CHECKING:
    from fletcher.client import Client

_NO_GEOMETRY: dict[str, float | None] = dict.fromkeys(("alignment", "uniformity", "mean_cosine"))
RowPairs = tuple[Int64Array, Int64Array]
OpenClient = Callable[[Engine], AbstractContextManager["Client"]]

_DEPTH = 100  # documents found per query
_TOP = 10
_RESCORED = 4 * _TOP
_NUM_PAIRS = 20_000
_SEED = 1
# If unrelated texts have a higher mean cosine than this, a single cosine says little about
# similarity, and thresholds mislead (https://arxiv.org/abs/1909.00512). Ranking still works.
ANISOTROPIC = 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """Result of one variant.

    Attributes:
        variant: The variant, with its layers and dimensions as numbers.
        recall: Share of queries whose document is among the first k, for each k.
        ndcg: Mean NDCG@10.
        ndcg_loss: Mean loss of NDCG@10 against the reference, over the queries.
        ndcg_loss_95: Half the width of the 95% interval of `ndcg_loss`.
        top: Share of the reference's first 10 documents that are among this variant's first 10.
        top_rescored: Share of the reference's first 10 documents that are among this variant's
            first 40. Ranking these 40 again by their exact vectors would find this share.
        cosine: `metrics.text_cosines` of this variant's documents and those of the reference: mean,
            p1 (1st percentile) and min.
        spearman: Rank correlation between the similarities in this variant and in the reference,
            for random pairs of a query and a document.
        alignment: `metrics.alignment` of the queries and their documents; None unless dense.
        uniformity: `metrics.uniformity` of random pairs of documents; None unless dense.
        mean_cosine: Mean cosine of random pairs of documents; None unless dense.
        num_alike: Number of documents whose vectors equal another document's, bit for bit.
        bytes_per_vector: Size of a document's vectors on the wire and in a store, on average.
        texts_per_s: Documents per second, timed from sending the first document to receiving the
            last vector. Variants that differ only in width or type share one run of the model and
            its speed, because width and type are applied after the run. None if unknown.
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
    alignment: float | None
    uniformity: float | None
    mean_cosine: float | None
    num_alike: int
    bytes_per_vector: int
    texts_per_s: float | None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Result of an evaluation.

    Attributes:
        model: ModelInfo of the model.
        pairs: The corpus.
        rows: One row per variant. The first row is the reference.
        num_truncated: Number of documents that were truncated.
    """

    model: Mapping[str, Any]
    pairs: Pairs
    rows: Sequence[Row]
    num_truncated: int

    def warnings(self) -> Iterator[str]:
        """Warnings about the result, one line each."""
        pairs, first = self.pairs, self.rows[0]
        if pairs.num_repeated:
            yield (
                f"{pairs.num_repeated:,} of {pairs.num_rows:,} rows left out: an earlier row has "
                "the same query or document"
            )
        if self.num_truncated:
            yield (
                f"{self.num_truncated:,} of {len(pairs.documents):,} documents are longer than "
                f"{self.model['max_length']} tokens; their ends were cut off"
            )
        if first.mean_cosine is not None and first.mean_cosine > ANISOTROPIC:
            yield (
                f"random documents have a cosine of {first.mean_cosine:.2f} on average: all "
                "vectors point in similar directions (anisotropy), so a single cosine says "
                "little; use it to rank, and do not reuse another model's threshold"
            )
        for row in self.rows:
            if row.num_alike > (0 if row is first else first.num_alike):
                yield f"{row.variant}: {row.num_alike:,} documents share their vector with another"


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
    """Embed a corpus with several variants and compare each with a reference.

    Args:
        pairs: The corpus.
        reference_engine: Engine that computes the reference: all layers, all dimensions, float32.
        engines: Engines that can run the model. The first is the one that a server would choose.
        variants: Variants to compare; None: those of `usual_variants`.
        open_client: Function that takes an engine. Returns the context manager of a client whose
            server runs that engine.
        progress: Callback for progress messages.
        model_name: Name of the model; None: the server's default model.

    Raises:
        FletcherError: A server does not start, refuses a call or fails.
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
                more = usual_variants(engines, model) if variants is None else variants
                todo = list(dict.fromkeys(one.resolved(model) for one in (*todo, *more)))
                for variant in todo:  # embed one text to refuse an invalid variant early
                    options = _options(variant, model)
                    embed(client, pa.array(["a text"]), chunking=variant.chunking, **options)
            rates: dict[tuple[int | None, str | None], float] = {}
            for variant in [one for one in todo if one.engine == engine]:
                progress(str(variant))
                queries, documents = _embed(client, model, variant, pairs)
                if documents.texts_per_s is not None:
                    rates[variant.layers, variant.chunking] = documents.texts_per_s
                if reference is None:
                    reference = _Reference.from_vectors(queries, documents, pairs)
                    num_truncated = documents.num_truncated
                rate = rates.get((variant.layers, variant.chunking))
                rows[variant] = _compare(variant, queries, documents, pairs, reference, rate)
        todo = [one for one in todo if one.engine != engine]
    return EvaluationReport(model, pairs, list(rows.values()), num_truncated)


def _options(variant: Variant, model: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of EmbedCommand for a variant.

    Each field is given, because a model's default may be fewer than all dimensions.
    """
    return {
        "model": f"{model['name']}@{model['hash']}",  # the name may be an alias
        "layers": variant.layers,
        "dims": variant.dims,
        "dtype": variant.dtype,
    }


def _embed(
    client: Client, model: Mapping[str, Any], variant: Variant, pairs: Pairs
) -> tuple[Embedded, Embedded]:
    """Embed queries and documents.

    As in a search, queries stay float32 and are not cut into chunks.
    """
    options = _options(variant, model)
    prompt = default_prompt(model, QUERY_PROMPTS)
    queries = embed(client, pairs.queries, prompt=prompt, **{**options, "dtype": "float32"})
    prompt = default_prompt(model, DOCUMENT_PROMPTS)
    documents = embed(client, pairs.documents, prompt=prompt, chunking=variant.chunking, **options)
    return queries, documents


@dataclass(frozen=True, slots=True)
class _Reference:
    """Results of the reference, which all variants are compared with.

    Attributes:
        documents: The documents.
        found: int64 [num_queries, k], indexes of the first documents for each query.
        gains: float64 [num_queries], NDCG@10 of each query.
        drawn: Random pairs of a query and a document: two arrays of indexes, int64 [num_pairs].
        similarities: float32 [num_pairs], similarities of the pairs in `drawn`.
        random: Random pairs of different documents: two arrays of indexes, int64 [num_pairs].
    """

    documents: Embedded
    found: Int64Array
    gains: Float64Array
    drawn: RowPairs
    similarities: FloatArray
    random: RowPairs

    @classmethod
    def from_vectors(cls, queries: Embedded, documents: Embedded, pairs: Pairs) -> _Reference:
        draw = np.random.default_rng(_SEED).integers
        num_queries, num_documents = queries.batch.num_rows, documents.batch.num_rows
        drawn = draw(num_queries, size=_NUM_PAIRS), draw(num_documents, size=_NUM_PAIRS)
        first = draw(num_documents, size=_NUM_PAIRS)
        second = (first + draw(1, num_documents, size=_NUM_PAIRS)) % num_documents
        found = search(queries, documents, _DEPTH)
        return cls(
            documents=documents,
            found=found[:, :_TOP],
            gains=metrics.ndcg(metrics.ranks(found, pairs.relevant), _TOP),
            drawn=drawn,
            similarities=_similarities(queries, documents, drawn),
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
    found = search(queries, documents, _DEPTH)
    places = metrics.ranks(found, pairs.relevant)
    gains = metrics.ndcg(places, _TOP)
    lost, lost_95 = metrics.loss(gains, reference.gains)
    cosines = metrics.text_cosines(documents.rows(), reference.documents.rows())
    is_dense = documents.similarity.output == "dense"
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
        spearman=metrics.spearman(
            _similarities(queries, documents, reference.drawn), reference.similarities
        ),
        **_geometry(queries, documents, pairs, reference.random) if is_dense else _NO_GEOMETRY,
        num_alike=metrics.num_alike(documents.rows()),
        bytes_per_vector=documents.bytes_per_vector,
        texts_per_s=texts_per_s,
    )


def _geometry(
    queries: Embedded, documents: Embedded, pairs: Pairs, random: RowPairs
) -> dict[str, float | None]:
    """Alignment, uniformity and mean cosine of dense vectors, as in `Row`."""
    asked, unit = metrics.unit(queries.vectors), metrics.unit(documents.vectors)
    first, second = unit[random[0]], unit[random[1]]
    return {
        "alignment": metrics.alignment(asked, unit[pairs.relevant]),
        "uniformity": metrics.uniformity(first, second),
        "mean_cosine": float(np.einsum("nd,nd->n", first, second).mean()),
    }


def _similarities(queries: Embedded, documents: Embedded, pairs: RowPairs) -> FloatArray:
    """Similarity of each pair of a query and a document: float32 [num_pairs]."""
    found = np.empty(len(pairs[0]), np.float32)
    for query in np.unique(pairs[0]).tolist():
        places = np.flatnonzero(pairs[0] == query)
        asked = queries.similarity.queries(queries.batch.slice(query, 1))
        batch = documents.batch.take(pa.array(pairs[1][places]))
        found[places] = documents.similarity.scores(asked, batch)[0]
    return found
