"""Similarities, compared with plain loops over rows, slices and nulls included."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

import fletcher
from fletcher.core.similarity import Similarity
from fletcher.errors import ColumnTypeError, DimensionMismatchError
from tests.doubles import store_rows as rows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sparse_vectors_have_their_dot_product(dtype: str) -> None:
    batch = rows.list_batch(0, 20, "sparse", dtype).slice(3, 11)
    similarity = Similarity.from_schema(batch.schema)
    assert (similarity.name, similarity.columns) == ("dot", ("vector",))
    queries = similarity.queries(batch.filter(batch["vector"].is_valid()).slice(1, 4))
    found = similarity.scores(queries, batch)
    for query, scores in zip(queries, found, strict=True):
        for row, score in zip(batch["vector"].to_pylist(), scores, strict=True):
            plain = (
                -np.inf if row is None else sum(query[one["index"]] * one["value"] for one in row)
            )
            assert score == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_token_vectors_have_their_maxsim(dtype: str, metric: str) -> None:
    batch = rows.list_batch(0, 20, "multi", dtype)
    metadata = {**batch.schema.metadata, b"fletcher.similarity": metric.encode()}
    batch = batch.replace_schema_metadata(metadata).slice(5, 12)
    similarity = Similarity.from_schema(batch.schema)
    assert similarity.name == "maxsim"
    queries = similarity.queries(batch.filter(batch["vector"].is_valid()).slice(2, 3))
    found = similarity.scores(queries, batch)
    scales = batch["scale"].to_pylist() if dtype == "int8" else [[1] * 9] * len(batch)
    for query, scores in zip(queries, found, strict=True):
        for row, scale, score in zip(batch["vector"].to_pylist(), scales, scores, strict=True):
            if row is None:
                assert score == -np.inf
                continue
            tokens = [np.array(one) * factor for one, factor in zip(row, scale, strict=False)]
            if metric == "cosine":
                tokens = [one / np.linalg.norm(one) for one in tokens]
                asked = [one / np.linalg.norm(one) for one in query]
            else:
                asked = list(query)
            plain = sum(max(float(one @ each) for each in tokens) for one in asked)
            assert score == pytest.approx(plain, rel=1e-4)


def test_rows_without_a_vector_never_count() -> None:
    batch = rows.batch(0, 4, null_rows=(1,))
    similarity = Similarity.from_schema(batch.schema)
    scores = similarity.scores([np.ones(8, np.float32), -np.ones(8, np.float32)], batch)
    assert np.isneginf(scores).tolist() == [[False, True, False, False]] * 2
    empty = rows.list_batch(0, 0, "multi", "float16")
    assert Similarity.from_schema(empty.schema).scores([np.ones((2, 8))], empty).shape == (1, 0)


def test_rescoring_takes_the_similarity_of_the_rows() -> None:
    batch = rows.batch(0, 9, dtype="float32")
    dot = batch.replace_schema_metadata({**batch.schema.metadata, b"fletcher.similarity": b"dot"})
    query = 5 * rows.vectors(4, 1)[0]
    assert fletcher.rescore(batch, query, k=1)["score"].to_pylist() == pytest.approx([1])
    assert fletcher.rescore(dot, query, k=1)["score"].to_pylist() == pytest.approx([5])
    tokens = rows.list_batch(0, 9, "multi", "float16")
    best = fletcher.rescore(tokens, Similarity.from_schema(tokens.schema).queries(tokens)[2], k=1)
    assert best["id"].to_pylist() == ["id2"]
    with pytest.raises(DimensionMismatchError):
        fletcher.rescore(tokens, query)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"fletcher.similarity": "angle"}, "similarity 'angle'"),
        ({"fletcher.output": "graph"}, "output 'graph'"),
        ({"fletcher.output": "sparse"}, "expected lists of `index` and `value`"),
        ({"fletcher.output": "multi"}, "expected a fixed size list"),
    ],
)
def test_unknown_metadata_is_refused(metadata: dict[str, str], message: str) -> None:
    schema = rows.batch(0, 1).schema
    with pytest.raises(ColumnTypeError, match=message):
        Similarity.from_schema(schema.with_metadata(metadata))


def test_a_dimension_beyond_the_vocabulary_is_refused() -> None:
    batch = rows.list_batch(0, 3, "sparse", "float32")
    narrow = {**batch.schema.metadata, b"fletcher.dims": b"7"}
    batch = batch.replace_schema_metadata(narrow)
    with pytest.raises(ColumnTypeError, match="outside 0 to 6"):
        Similarity.from_schema(batch.schema).scores([np.ones(7, np.float32)], batch)


def test_the_array_type_of_a_stored_list_does_not_matter() -> None:
    batch = rows.list_batch(0, 6, "multi", "float16")
    back = pa.Table.from_batches([batch]).take([4, 2, 0]).combine_chunks().to_batches()[0]
    similarity = Similarity.from_schema(back.schema)
    queries = similarity.queries(batch.slice(0, 1))
    assert similarity.scores(queries, back)[0, 2] == pytest.approx(
        similarity.scores(queries, batch)[0, 0]
    )
