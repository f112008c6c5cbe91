"""Vectors of texts out of those of their chunks."""

from __future__ import annotations

import numpy as np
import pytest

from fletcher.core.batches import Chunks, EmbeddingBatch
from fletcher.errors import FletcherError, InternalError
from fletcher.vectors.aggregation import Aggregation, Hierarchical, aggregation

RNG = np.random.default_rng(3)


def batch(counts: list[int], first_index: int = 0) -> EmbeddingBatch:
    rows = sum(counts)
    vectors = RNG.normal(size=(rows, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = [n for count in counts for n in range(count)]
    tokens = RNG.integers(1, 9, rows).astype(np.int32)
    chunks = Chunks(
        np.cumsum([0, *counts]),
        np.array(index, np.int32) + np.int32(first_index),
        tokens,
        np.zeros((rows, 4), np.int64),
        np.array([n == 0 for n in index], np.bool_),
    )
    return EmbeddingBatch(
        vectors, None, tokens + np.int32(2), np.zeros(rows, np.bool_), chunks=chunks
    )


def expected(method: str, vectors: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    if len(vectors) == 1:
        return np.asarray(vectors[0])
    if method == "max":
        total = vectors.max(axis=0)
    else:
        places = np.arange(len(vectors)) + 2.0
        weight = tokens / np.log2(places) if method == "weighted" else np.ones(len(vectors))
        total = (vectors * weight[:, None]).sum(axis=0)
    return np.asarray(total / np.linalg.norm(total))


@pytest.mark.parametrize("method", ["mean", "weighted", "max"])
def test_each_text_gets_its_own(method: str) -> None:
    counts = [1, 3, 2, 1, 7]
    given = batch(counts)
    found = Aggregation(method, normalized=True).add_chunks(given, continued=False)
    assert isinstance(found, EmbeddingBatch)
    assert given.chunks is not None
    for text, (a, b) in enumerate(zip(np.cumsum([0, *counts]), np.cumsum(counts), strict=False)):
        vectors, tokens = given.embeddings[a:b], given.chunks.num_tokens[a:b]
        np.testing.assert_allclose(
            found.embeddings[text], expected(method, vectors, tokens), rtol=1e-6, atol=1e-7
        )
        assert found.token_count[text] == given.token_count[a:b].sum()
    assert np.array_equal(found.embeddings[0], given.embeddings[0])  # to the last bit
    assert found.embeddings.dtype == np.float32


def in_parts(
    joins: Aggregation | Hierarchical, given: EmbeddingBatch, parts: list[int]
) -> EmbeddingBatch:
    found, chunks = None, given.chunks
    assert chunks is not None
    for number, count in enumerate(parts):
        a = sum(parts[:number])
        rows = slice(a, a + count)
        own = (chunks.index, chunks.num_tokens, chunks.text_ranges, chunks.begins)
        part = EmbeddingBatch(
            given.embeddings[rows],
            None,
            given.token_count[rows],
            given.truncated[rows],
            chunks=Chunks(np.array([0, count]), *(one[rows] for one in own)),
        )
        assert found is None
        found = joins.add_chunks(part, continued=number < len(parts) - 1)
    assert isinstance(found, EmbeddingBatch)
    return found


@pytest.mark.parametrize("method", ["mean", "weighted", "max"])
@pytest.mark.parametrize("parts", [[2, 3], [0, 2, 0, 1], [1, 0], [0, 1], [4, 4, 4, 1]])
def test_in_parts_a_text_gets_the_same(method: str, parts: list[int]) -> None:
    given = batch([sum(parts)])
    assert given.chunks is not None
    aggregation = Aggregation(method, normalized=True)
    found = in_parts(aggregation, given, parts)
    whole = Aggregation(method, normalized=True).add_chunks(given, continued=False)
    assert isinstance(whole, EmbeddingBatch)
    np.testing.assert_allclose(found.embeddings, whole.embeddings, rtol=1e-6)
    assert found.token_count.tolist() == whole.token_count.tolist()
    # And nothing of it stays for the next.
    again = aggregation.add_chunks(given, continued=False)
    assert isinstance(again, EmbeddingBatch)
    assert np.array_equal(again.embeddings, whole.embeddings)


def test_unnormalised_vectors_stay_so() -> None:
    given = batch([4])
    found = Aggregation("mean", normalized=False).add_chunks(given, continued=False)
    assert isinstance(found, EmbeddingBatch)
    np.testing.assert_allclose(found.embeddings[0], given.embeddings.mean(axis=0), rtol=1e-5)


def test_a_failed_chunk_fails_its_text_alone() -> None:
    given, error = batch([2, 3, 1]), InternalError("lost")
    given.errors[3] = error
    found = Aggregation("mean", normalized=True).add_chunks(given, continued=False)
    assert isinstance(found, EmbeddingBatch)
    assert found.errors == {1: error}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_part_that_failed_fails_the_text(lost: int) -> None:
    error: FletcherError = InternalError("lost")
    aggregation = Aggregation("mean", normalized=True)
    parts = [error if n == lost else batch([2], 2 * n) for n in range(3)]
    assert aggregation.add_chunks(parts[0], continued=True) is None
    assert aggregation.add_chunks(parts[1], continued=True) is None
    found = aggregation.add_chunks(parts[2], continued=False)
    assert found is error or (isinstance(found, EmbeddingBatch) and found.errors == {0: error})
    assert aggregation.add_chunks(error, continued=False) is error


def paragraphs_first(vectors: np.ndarray, begins: np.ndarray) -> np.ndarray:
    parts = np.split(vectors, np.flatnonzero(begins)[1:])
    return unit(np.array([unit(part.mean(axis=0)) for part in parts]).mean(axis=0))


def unit(vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector / np.linalg.norm(vector))


def test_paragraphs_count_alike_however_long() -> None:
    counts = [6, 1, 9, 2]
    given = batch(counts)
    assert given.chunks is not None
    given.chunks.begins[[2, 3, 8, 12]] = True
    found = aggregation("hierarchical", normalized=True).add_chunks(given, continued=False)
    assert isinstance(found, EmbeddingBatch)
    ends = np.cumsum(counts).tolist()
    for text, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
        expected = paragraphs_first(given.embeddings[a:b], given.chunks.begins[a:b])
        np.testing.assert_allclose(found.embeddings[text], expected, rtol=1e-5, atol=1e-6)
        assert found.token_count[text] == given.token_count[a:b].sum()
    assert np.array_equal(found.embeddings[1], given.embeddings[6])


@pytest.mark.parametrize("begins", [[0], [0, 3], [0, 1, 2, 3, 4, 5, 6], [0, 2, 6]])
def test_paragraphs_may_go_on_in_the_next_part(begins: list[int]) -> None:
    for parts in ([3, 4], [0, 3, 0, 4, 0], [1] * 7, [0, 0, 7], [2, 0, 4, 1]):
        given = batch([7])
        assert given.chunks is not None
        given.chunks.begins[begins] = True
        joins = aggregation("hierarchical", normalized=True)
        for _ in range(2):  # and nothing of it stays for the next
            found = in_parts(joins, given, parts)
            assert len(found.embeddings) == 1
            expected = paragraphs_first(given.embeddings, given.chunks.begins)
            np.testing.assert_allclose(found.embeddings[0], expected, rtol=1e-5, atol=1e-6)
            assert found.token_count.tolist() == [given.token_count.sum()]


def test_a_failed_chunk_fails_its_text_through_its_paragraph() -> None:
    given, error = batch([2, 4, 1]), InternalError("lost")
    assert given.chunks is not None
    given.chunks.begins[4] = True
    given.errors[5] = error
    found = aggregation("hierarchical", normalized=True).add_chunks(given, continued=False)
    assert isinstance(found, EmbeddingBatch)
    assert found.errors == {1: error}
    # Parts: the first has half a paragraph, the second fails, the third has the rest.
    joins, whole = aggregation("hierarchical", normalized=True), batch([2])
    assert joins.add_chunks(whole, continued=True) is None
    assert joins.add_chunks(error, continued=True) is None
    found = joins.add_chunks(batch([2], 2), continued=False)
    assert isinstance(found, EmbeddingBatch)
    assert found.errors == {0: error}
    later = joins.add_chunks(whole, continued=False)
    assert isinstance(later, EmbeddingBatch)
    assert not later.errors
