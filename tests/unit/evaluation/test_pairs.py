"""Which rows of a corpus become pairs."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fletcher.errors import InvalidCommandError, UnknownColumnError
from fletcher.evaluation.pairs import choose_pairs, read_pairs


def column(*texts):
    return pa.chunked_array([pa.array(texts, pa.utf8())])


def test_documents_and_queries_come_once():
    queries = column("a", "b", "c", "a", "d", "", None, "e", "f")
    documents = column("A", "B", "A ", "X", "D", "Y", "Z", None, "F")
    pairs = choose_pairs(queries, documents)
    # c: its document came before; the second a: its query did; then three that lack a side.
    assert sorted(pairs.documents.to_pylist()) == ["A", "B", "D", "F"]
    assert (pairs.num_rows, pairs.num_empty, pairs.num_repeated) == (9, 3, 2)
    asked = dict(zip(pairs.queries.to_pylist(), pairs.relevant.tolist(), strict=True))
    assert {query: pairs.documents[place].as_py() for query, place in asked.items()} == {
        "a": "A",
        "b": "B",
        "d": "D",
        "f": "F",
    }


def test_the_choice_is_random_and_fixed():
    texts = [str(number) for number in range(1000)]
    pairs = choose_pairs(column(*texts), column(*texts), num_documents=50, num_queries=20)
    again = choose_pairs(column(*texts), column(*texts), num_documents=50, num_queries=20)
    assert len(pairs.documents) == 50
    assert pairs.queries.to_pylist() == pairs.documents.take(pa.array(pairs.relevant)).to_pylist()
    assert len(pairs.queries) == 20
    assert pairs.documents.equals(again.documents)
    numbers = [int(text) for text in pairs.documents.to_pylist()]
    assert 300 < sum(numbers) / 50 < 700


def test_one_pair_is_too_few():
    with pytest.raises(InvalidCommandError, match="2 rows hold 1 pairs"):
        choose_pairs(column("a", "a"), column("A", "B"))


def test_files_are_read_by_their_columns(tmp_path):
    table = pa.table({"id": [1, 2], "title": ["a", "b"], "body": ["A", "B"]})
    pq.write_table(table, tmp_path / "corpus.parquet")
    read = {"query_column": "title", "document_column": "body", "notice": print}
    pairs = read_pairs([str(tmp_path)], **read)
    assert sorted(pairs.documents.to_pylist()) == ["A", "B"]
    with pytest.raises(UnknownColumnError, match="heading"):
        read_pairs([str(tmp_path)], **{**read, "query_column": "heading"})
    with pytest.raises(InvalidCommandError, match="`id` is int64, expected text"):
        read_pairs([str(tmp_path)], **{**read, "query_column": "id"})
