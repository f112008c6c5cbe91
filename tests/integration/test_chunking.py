"""Long texts in chunks, over real sockets and processes; vectors that depend on tokens alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

import fletcher
from fletcher.chunking import Chunking
from fletcher.errors import InvalidCommandError
from fletcher.inference.null import null_embeddings
from fletcher.runtime import Runtime
from fletcher.tokenization.chunker import windows
from fletcher.tokenization.tokenizer import Tokenizer
from tests.integration.conftest import StartServer

WORDS = "the programs, that people use; packages (debian) hold 1 or 22 of them.".split()


def text_of(num_words: int, seed: int = 7) -> str:
    return " ".join(WORDS[n * seed % len(WORDS)] for n in range(num_words))


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Runtime:
    # A stream's reserve is 64 KiB: texts over some 2 kB come in parts.
    return start_server(max_memory=64 << 20, max_message_bytes=32 << 20, max_streams=128)


@pytest.fixture(scope="module")
def client(server: Runtime) -> Iterator[fletcher.Client]:
    with fletcher.connect(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def whole(server: Runtime) -> Tokenizer:
    """The model's tokenizer for texts of any length."""
    tokenizer = Tokenizer.load(server.service.models.default.bundle.folder)
    return Tokenizer(tokenizer._tokenizer, max_length=10_000_000)


def chunk_vectors(whole: Tokenizer, text: str, how: str) -> np.ndarray:
    """The vectors of a text's chunks, each embedded alone."""
    chunking = Chunking.parse(how)
    assert chunking is not None
    ids = np.array(whole._tokenizer.encode(text, add_special_tokens=True).ids, np.int32)
    found, _ = windows(len(ids) - 2, chunking.size - 2, chunking.overlap, continued=False)
    rows = [np.concatenate((ids[:1], ids[1:-1][a:b], ids[-1:])) for a, b in found]
    lengths = np.array([len(row) for row in rows], np.int32)
    return null_embeddings(np.concatenate(rows), lengths, 32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def test_a_text_gets_the_mean_of_its_chunks(client: fletcher.Client, whole: Tokenizer) -> None:
    texts = [text_of(n, n + 1) for n in (5, 900, 0, 40, 8000, 3)]
    found = client.embed(texts, chunking="tokens:16/4")
    for text, vector in zip(texts, found, strict=True):
        chunks = chunk_vectors(whole, text, "tokens:16/4")
        np.testing.assert_allclose(vector, unit(chunks.mean(axis=0)), atol=1e-5)
    assert np.array_equal(found[[2, 5]], client.embed([texts[2], texts[5]]))  # one chunk each


def test_dims_come_before_the_mean(client: fletcher.Client, whole: Tokenizer) -> None:
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
    options = fletcher.EmbedOptions(chunking="tokens:32/8", dtype="float32")
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
    texts = [text_of(n * 20, n + 1) for n in range(120)]
    table = pa.table({"id": pa.array(range(120), pa.int64()), "text": texts})
    options = fletcher.EmbedOptions(
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
        client.put(table, fletcher.EmbedOptions(dataset="texts", upload_id="u", dtype="float32"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chunking": "tokens:33"}, "from 3 to the 32"),
        ({"chunking": "tokens:8/6"}, "from 9 to the 32"),
        ({"chunking": "tokens:8", "prompt": "1 2 3 4 5 6 7: "}, "from 11 to the 32"),
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
