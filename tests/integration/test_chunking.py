"""Long texts in chunks, over real sockets and processes; vectors that depend on tokens alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fletcher
from fletcher.core.chunking import Chunking
from fletcher.errors import InvalidCommandError, ModelMismatchError
from fletcher.inference.null import null_embeddings
from fletcher.pipeline.memory_budget import Allowance
from fletcher.runtime import Runtime
from fletcher.tokenization.chunker import chunk_bounds
from fletcher.tokenization.tokenizer import Tokenizer
from tests.integration.conftest import SMALL_PARTS, StartServer

SERVER_OPTIONS = SMALL_PARTS
WORDS = "the programs, that people use; packages (debian) hold 1 or 22 of them.".split()


def text_of(num_words: int, seed: int = 7) -> str:
    return " ".join(WORDS[n * seed % len(WORDS)] for n in range(num_words))


@dataclass(frozen=True)
class Whole:
    """How the server's model sees texts, whatever their length."""

    tokenizer: Tokenizer
    seed: int


@pytest.fixture(scope="module")
def whole(server: Runtime) -> Whole:
    bundle = server.service.models.default.bundle
    return Whole(Tokenizer.from_bundle(bundle.folder), int(bundle.hash, 16))


def chunk_vectors(whole: Whole, text: str, how: str) -> np.ndarray:
    """The vectors of a text's chunks, each embedded alone."""
    chunking = Chunking.from_text(how)
    assert chunking is not None
    ids = np.array(whole.tokenizer._tokenizer.encode(text, add_special_tokens=True).ids, np.int32)
    found, *_ = chunk_bounds(len(ids) - 2, chunking.size - 2, chunking.overlap, continued=False)
    rows = [np.concatenate((ids[:1], ids[1:-1][a:b], ids[-1:])) for a, b in found]
    lengths = np.array([len(row) for row in rows], np.int32)
    return null_embeddings(np.concatenate(rows), lengths, 32, whole.seed)


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def test_a_text_gets_the_mean_of_its_chunks(client: fletcher.Client, whole: Whole) -> None:
    texts = [text_of(n, n + 1) for n in (5, 900, 0, 40, 8000, 3)]
    found = client.embed(texts, chunking="tokens:16/4")
    for text, vector in zip(texts, found, strict=True):
        chunks = chunk_vectors(whole, text, "tokens:16/4")
        np.testing.assert_allclose(vector, unit(chunks.mean(axis=0)), atol=1e-5)
    assert np.array_equal(found[[2, 5]], client.embed([texts[2], texts[5]]))  # one chunk each


def test_dims_come_before_the_mean(client: fletcher.Client, whole: Whole) -> None:
    text = text_of(300)
    largest = chunk_vectors(whole, text, "tokens:8/2").max(axis=0)
    found = client.embed([text], chunking="tokens:8/2:max")
    np.testing.assert_allclose(found[0], unit(largest), atol=1e-5)
    raw = client.embed([text], chunking="tokens:8/2:max", normalize=False)
    np.testing.assert_allclose(raw[0], largest, atol=1e-5)


def test_company_changes_nothing(client: fletcher.Client) -> None:
    texts = [text_of(n, n) for n in (700, 12, 2500, 45, 700)]
    together = client.embed([*texts, *texts], chunking="tokens:32/8:weighted")
    for number, text in enumerate(texts):
        alone = client.embed([text], chunking="tokens:32/8:weighted")[0]
        assert np.array_equal(together[number], alone)
        assert np.array_equal(together[number + len(texts)], alone)


def test_a_dictionary_and_failed_rows(client: fletcher.Client) -> None:
    texts = [text_of(3000), None, text_of(4), text_of(3000)]
    column = pa.array(texts).dictionary_encode()
    batch = pa.record_batch({"text": column})
    options = fletcher.EmbedCommand(chunking="tokens:32/8", dtype="float32")
    with client.exchange([batch, batch], options) as exchange:
        first, second = list(exchange)
    assert first.column("vector").null_count == 1
    assert first.column("vector").equals(second.column("vector"))
    expected = client.embed([texts[0], texts[2]], chunking="tokens:32/8")
    rows = first.column("vector").to_pylist()
    assert rows[0] == rows[3] == expected[0].tolist()
    assert rows[2] == expected[1].tolist()
    assert exchange.schema.metadata[b"fletcher.chunking"] == b"tokens:32/8:mean"


def test_stored_rows_are_texts(server: Runtime, client: fletcher.Client) -> None:
    texts = [text_of(n * 6, n + 1) for n in range(120)]
    table = pa.table({"id": pa.array(range(120), pa.int64()), "text": texts})
    options = fletcher.EmbedCommand(
        dataset="texts", upload_id="u", chunking="tokens:20/3", dtype="float32"
    )
    summary = client.put(table, options)
    assert (summary.complete, summary.rows_stored) == (True, 120)
    stored = server.service.delivery.stores["default"].scan("texts").read_all().sort_by("id")
    assert stored.column("text").to_pylist() == texts
    found = np.array(stored.column("vector").to_pylist(), np.float32)
    assert np.array_equal(found, client.embed(texts, chunking="tokens:20/3"))
    again = client.put(table, options)
    assert (again.rows_stored, again.rows_deduplicated) == (120, 120)
    with pytest.raises(fletcher.errors.UploadConflictError):
        client.put(table, fletcher.EmbedCommand(dataset="texts", upload_id="u", dtype="float32"))


MIXED = "Grüße, 世界! 🙂 use “packages” \n\n and  hold  them. "


def chunk_rows(
    client: fletcher.Client, texts: list[str | None], how: str, **options: Any
) -> list[list[dict[str, Any]]]:
    """The rows of each text, by its place."""
    table = pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": texts})
    table = table.append_column("n", table.column("id"))
    wanted = fletcher.EmbedCommand(chunking=how, include_text=True, dtype="float32", **options)
    with client.exchange(table, wanted) as exchange:
        table = pa.Table.from_batches(list(exchange), exchange.schema)
    found = table.drop_columns(["timestamp"]).to_pylist()
    assert [row["id"] for row in found] == sorted(row["id"] for row in found)
    return [[row for row in found if row["id"] == number] for number in range(len(texts))]


@pytest.mark.parametrize(("how", "overlap"), [("tokens:16/0:none", 0), ("tokens:20/7:none", 7)])
def test_each_chunk_is_a_row(client: fletcher.Client, whole: Whole, how: str, overlap: int) -> None:
    texts = [text_of(3), MIXED * 200, "", None, text_of(2000), "  ", MIXED]
    found = chunk_rows(client, texts, how, columns=["n"])
    for text, rows in zip(texts, found, strict=True):
        if text is None:
            assert [row["vector"] for row in rows] == [row["chunk_index"] for row in rows] == [None]
            continue
        assert [row["chunk_index"] for row in rows] == list(range(len(rows)))
        expected = chunk_vectors(whole, text, how)
        assert np.array_equal(np.array([row["vector"] for row in rows], np.float32), expected)
        spans = [(row["chunk_start"], row["chunk_end"]) for row in rows]
        assert [text[a:b] for a, b in spans] == [row["text"] for row in rows]
        assert (spans[0][0], spans[-1][1]) == (0, len(text))
        for (_, end), (start, _) in pairwise(spans):
            assert start <= end
            assert overlap or start == end  # they are the text, put together
        assert {row["n"] for row in rows} == {row["id"] for row in rows}
    assert found[4][0]["token_count"] == int(how[7:9])


def test_chunks_with_a_prompt_have_their_text_alone(client: fletcher.Client) -> None:
    (rows,) = chunk_rows(client, [MIXED * 3], "tokens:30:none", prompt="22 use: ")
    assert "".join(row["text"] for row in rows) == MIXED * 3
    assert {row["token_count"] for row in rows[:-1]} == {30}


def test_dictionaries_and_batches_stay_as_they_are(client: fletcher.Client) -> None:
    column = pa.array([MIXED * 90, "of", MIXED * 90, None, "of"]).dictionary_encode()
    batches = [pa.record_batch({"text": column.slice(n, 2)}) for n in (0, 1, 2, 3)]
    options = fletcher.EmbedCommand(chunking="tokens:30/3:none", include_text=True)
    with client.exchange(batches, options) as exchange:
        found = [(batch, exchange.errors) for batch in exchange]
    assert len(found) == 4
    long = found[0][0].column("text").to_pylist()[:-1]
    assert len(long) > 50
    texts = [batch.column("text").to_pylist() for batch, _ in found]
    assert texts == [[*long, "of"], ["of", *long], [*long, None], [None, "of"]]
    assert [[error.row for error in errors] for _, errors in found] == [[], [], [5], [6]]
    vectors = found[1][0].column("vector").slice(1)
    assert vectors.equals(found[0][0].column("vector").slice(0, len(long)))


def test_chunks_are_stored_and_resumed_as_rows(start_server: StartServer) -> None:
    # With a journal, whose groups have more rows than their extent says.
    server = start_server(**SMALL_PARTS, max_journal=64 << 20)
    texts = [MIXED * (n % 40) if n % 9 else None for n in range(200)]
    table = pa.table({"id": pa.array(range(200), pa.int64()), "text": texts})
    options = fletcher.EmbedCommand(dataset="chunks", upload_id="u", chunking="tokens:32/4:none")
    with fletcher.connect(server.address) as client:
        summary = client.put(table.slice(0, 150), options, end=False)
        failed = sum(text is None for text in texts[:150])
        assert (summary.rows_received, summary.rows_failed) == (150, failed)
        assert client.upload_status("u", "chunks")["rows_durable"] == 150
        summary = client.put(table, options)
        assert (summary.complete, summary.rows_received) == (True, 200)
        assert summary.rows_deduplicated == 150
        rows = chunk_rows(client, texts, "tokens:32/4:none")
        assert server.service.delivery.flush(30)
        status = client.upload_status("u", "chunks")
        assert status == {"rows_durable": 200, "ranges": [[0, 199]], "complete": True}
    stored = server.service.delivery.stores["default"].scan("chunks").read_all()
    stored = stored.sort_by([("id", "ascending"), ("chunk_index", "ascending")])
    expected = [row for chunks in rows for row in chunks]
    for name in ("id", "text", "chunk_index", "chunk_start", "chunk_end"):
        assert stored.column(name).to_pylist() == [row[name] for row in expected]
    for mode in ("upsert", "delta"):
        again = fletcher.EmbedCommand(dataset="chunks", mode=mode)
        with (
            fletcher.connect(server.address) as client,
            pytest.raises(ModelMismatchError, match=r"`fletcher\.chunking` is none") as caught,
        ):
            client.put(table.slice(0, 2), again)
        assert caught.value.allowed == ["tokens:32/4:none"]
    # All chunks of a row are in one group.
    keys = stored.group_by("id").aggregate([("batch_key", "count_distinct")])
    assert set(keys.column("batch_key_count_distinct").to_pylist()) == {1}


@pytest.mark.parametrize("fields", [{"mode": "delta"}, {"dedupe": "id"}])
def test_rows_of_one_id_cannot_replace_each_other(fields: dict[str, str]) -> None:
    with pytest.raises(InvalidCommandError, match="which makes several; omit one"):
        fletcher.EmbedCommand(dataset="d", chunking="tokens:none", **fields)


def test_embed_gives_each_text_one_vector(client: fletcher.Client) -> None:
    with pytest.raises(InvalidCommandError, match="several vectors"):
        client.embed(["a"], chunking="tokens:none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chunking": "tokens:33"}, "expected 3 to 32"),
        ({"chunking": "tokens:8/6"}, "expected 9 to 32"),
        ({"chunking": "tokens:8", "prompt": "1 2 3 4 5 6 7: "}, "expected 11 to 32"),
        ({"chunking": "tokens:8", "truncate": "error"}, "`truncate` is error"),
        ({"chunking": "tokens:8/9"}, "not below SIZE"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    client: fletcher.Client, options: dict[str, str], said: str
) -> None:
    with pytest.raises(InvalidCommandError, match=said) as caught:
        client.embed(["a"], **options)
    assert caught.value.allowed


def test_rows_are_whole_sentences(client: fletcher.Client) -> None:
    text = "Use it. Hold on! Go. " * 900 + "Go on."
    (rows,) = chunk_rows(client, [text], "sentences:32/6:none")
    assert len(rows) > 100
    assert all(row["text"].startswith(("Use it.", "Hold on!", "Go.")) for row in rows[:-1])
    assert (rows[0]["chunk_start"], rows[-1]["chunk_end"]) == (0, len(text))
    mean = client.embed([text], chunking="sentences:32/6")[0]
    vectors = np.array([row["vector"] for row in rows], np.float32)
    np.testing.assert_allclose(mean, unit(vectors.mean(axis=0)), atol=1e-5)


def test_sentences_make_paragraphs_and_these_the_document(client: fletcher.Client) -> None:
    sentences = [[f"The use of {n} {m}. " for m in range(n % 7 + 1)] for n in range(60)]
    text = "\n\n".join("".join(one) for one in sentences)
    assert len(text) > 4000  # so it comes in parts
    vectors = client.embed([one for paragraph in sentences for one in paragraph])
    ends = np.cumsum([len(one) for one in sentences])[:-1]
    paragraphs = unit(np.array([one.mean(axis=0) for one in np.split(vectors, ends)]))
    for how, expected in (("mean", vectors), ("hierarchical", paragraphs)):
        (found,) = client.embed([text], chunking=f"each-sentence:{how}")
        np.testing.assert_allclose(found, unit(expected.mean(axis=0)), atol=1e-5)


@pytest.mark.parametrize("how", ["each-sentence:none", "tokens:12/4:none"])
def test_late_chunks_are_the_same_rows(client: fletcher.Client, whole: Whole, how: str) -> None:
    # Longer than a part and than many frames; these vectors depend on a chunk's own tokens alone.
    texts = ["".join(f"The use of {n}. It is! " for n in range(250)), "Go on. It is.", "", None]
    early, late = (chunk_rows(client, texts, how + one) for one in ("", ":late"))
    assert len(early[0]) > 300
    names = ("chunk_index", "chunk_start", "chunk_end", "text")
    special = [*whole.tokenizer._prefix, *whole.tokenizer._suffix]
    for text, rows, others in zip(texts, early, late, strict=True):
        assert [[row[name] for name in names] for row in rows] == [
            [row[name] for name in names] for row in others
        ]
        for place, row in enumerate(others if text is not None else []):
            ids = whole.tokenizer._tokenizer.encode(row["text"], add_special_tokens=False).ids
            ids = [*special[:1] * (place == 0), *ids, *special[1:] * (place == len(others) - 1)]
            if "each" in how:
                lengths = np.array([len(ids)], np.int32)
                expected = null_embeddings(np.array(ids, np.int32), lengths, 32, whole.seed)
                assert np.array_equal(np.array(row["vector"], np.float32), expected[0])
                assert row["token_count"] == len(ids)


def test_late_vectors_know_what_is_around_them(start_server: StartServer) -> None:
    server = start_server(backend="onnxruntime", threads=1)
    texts = ["Use it. The programs hold on.", "Go on. The programs hold on.", "Use it."]
    with fletcher.connect(server.address) as client:
        alone, whole = client.embed(texts[2:]), client.embed(texts)
        early, late = (
            chunk_rows(client, texts, "each-sentence:none" + one) for one in ("", ":late")
        )
        first, second = ([np.array(rows[1]["vector"]) for rows in one[:2]] for one in (early, late))
        assert np.abs(first[0] - first[1]).max() < 1e-6
        assert np.abs(second[0] - second[1]).max() > 1e-3
        np.testing.assert_allclose(late[2][0]["vector"], alone[0], atol=1e-6)
        for dims, normalize in ((None, True), (None, False)):
            options = {"dims": dims, "normalize": normalize}
            rows = chunk_rows(client, texts, "each-sentence:none:late", **options)
            norms = [np.linalg.norm(row["vector"]) for one in rows for row in one]
            assert np.allclose(norms, 1, atol=1e-5) == normalize
        mean = client.embed(texts, chunking="each-sentence:mean:late")
        np.testing.assert_allclose(mean[2], alone[0], atol=1e-6)
        expected = unit(np.mean([row["vector"] for row in late[0]], axis=0))
        np.testing.assert_allclose(mean[0], expected, atol=1e-6)
        assert (mean[0] * whole[0]).sum() > 0.9


def test_a_document_may_be_larger_than_the_budget(
    server: Runtime, client: fletcher.Client, whole: Whole
) -> None:
    # A part holds some 32 times its bytes here: all at once would be over what streams may hold.
    text = text_of(120_000)
    assert 32 * len(text) > 20 << 20
    ids = whole.tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    num_chunks = -(-len(ids) // 30)
    table = pa.table({"id": pa.array([7], pa.int64()), "text": [text]})
    options = fletcher.EmbedCommand(chunking="tokens:32:none", dtype="float16")
    with client.exchange(table, options) as exchange:
        found = pa.Table.from_batches(list(exchange))
    assert found.column("chunk_index").to_pylist() == list(range(num_chunks))
    ends = found.column("chunk_end").to_pylist()
    assert found.column("chunk_start").to_pylist() == [0, *ends[:-1]]
    assert ends[-1] == len(text)
    summary = client.put(table, replace(options, dataset="large"))
    assert (summary.complete, summary.rows_stored) == (True, 1)
    stored = server.service.delivery.stores["default"].scan("large", columns=["text"]).read_all()
    assert "".join(stored.column("text").to_pylist()) == text


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most that rows have taken of the memory budget so far, its only item."""
    peaks = [0]
    add = Allowance._add_row

    def counted(allowance: Allowance, num_bytes: int) -> None:
        add(allowance, num_bytes)
        peaks.append(max(peaks.pop(), allowance._budget._rows_used))

    monkeypatch.setattr(Allowance, "_add_row", counted)
    return peaks


def test_rows_of_many_chunks_share_the_memory_that_there_is(
    server: Runtime, client: fletcher.Client, peaks: list[int]
) -> None:
    # Every stream kept as much as it liked, beside the budget.
    texts = [text_of(70_000, seed) for seed in (3, 7)]
    table = pa.table({"id": pa.array(range(2), pa.int64()), "text": texts})
    options = fletcher.EmbedCommand(chunking="tokens:16:none", dtype="float16", durability="store")

    def put(number: int) -> fletcher.PutSummary:
        return client.put(table, replace(options, dataset=f"many{number}"))

    executor = ThreadPoolExecutor(4)
    try:
        summaries = list(executor.map(put, range(4), timeout=60))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    assert [(one.complete, one.rows_stored) for one in summaries] == [(True, 2)] * 4
    # One row takes more than half of the room for all of them, which is 3/16 of the budget.
    budget = server.service.budget
    assert budget.max_row_bytes * 3 // 4 < peaks[0] <= budget.total_bytes * 3 // 16
    assert budget.statistics()["used_bytes"] == 0
    stored = server.service.delivery.stores["default"].scan("many3", columns=["text"]).read_all()
    assert "".join(stored.column("text").to_pylist()) == "".join(texts)
    whole = pa.table({"text": [text_of(100_000)]})
    summary = client.put(whole, replace(options, dataset="more"))
    assert [(one.code, one.row) for one in summary.errors] == [("row_too_large", 0)]
    assert f"expected at most {budget.max_row_bytes} of one row" in summary.errors[0].message


def test_what_chunks_have_of_their_rows_is_in_the_memory_that_there_is(
    server: Runtime, client: fletcher.Client, peaks: list[int]
) -> None:
    # A row's columns came once for each of its chunks, and were counted once.
    columns = {"text": [text_of(300)] * 30, "note": ["n" * 12_000] * 30}
    table = pa.table(columns | {"id": pa.array(range(30), pa.int64())})
    options = fletcher.EmbedCommand(
        chunking="tokens:16:none", dtype="float16", durability="store", columns=("note",)
    )

    def put(number: int) -> fletcher.PutSummary:
        return client.put(table, replace(options, dataset=f"notes{number}"))

    with ThreadPoolExecutor(3) as executor:
        summaries = list(executor.map(put, range(3), timeout=60))
    assert [(one.complete, one.rows_failed) for one in summaries] == [(True, 0)] * 3
    stored = server.service.delivery.stores["default"].scan("notes2", columns=["note"]).read_all()
    budget = server.service.budget
    assert stored.nbytes > budget.total_bytes * 3 // 16
    assert budget.max_row_bytes // 2 < peaks[0] <= budget.total_bytes * 3 // 16
    assert budget.statistics()["used_bytes"] == 0
    large = pa.table({"text": [text_of(3000)], "note": ["n" * 100_000]})
    summary = client.put(large, replace(options, dataset="notes"))
    assert [(one.code, one.row) for one in summary.errors] == [("row_too_large", 0)]
    assert "repeated for each chunk" in summary.errors[0].message
