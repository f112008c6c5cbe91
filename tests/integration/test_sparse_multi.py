"""Sparse weights and token vectors by DoExchange, and what cannot be had of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fletcher
from fletcher.cli import main
from fletcher.client import Client
from fletcher.config.server import ServeConfig
from fletcher.core.command import EmbedCommand
from fletcher.errors import BatchTooLargeError, FletcherError
from fletcher.models.bundle.registry import Registry
from fletcher.net.message_size import OVERHEAD_BYTES, batch_bytes
from fletcher.runtime import Runtime
from fletcher.stores.address import open_store
from fletcher.storeserver.server import StoreServer

OUTPUTS = Path(__file__).parents[1] / "golden" / "outputs"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's store."""
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory, vectors: Path) -> Iterator[dict[str, str]]:
    """Stores that keep such vectors, by the server's names of them."""
    folder = tmp_path_factory.mktemp("stores")
    served = StoreServer(folder / "served", host="127.0.0.1", port=0, meta_port=0)
    yield {
        "lance": f"lance:{vectors}",
        "parquet": f"parquet:{folder / 'files'}",
        "fletcher": f"{served.address}?meta={served.meta_port}",
    }
    served.close(10)


@pytest.fixture(scope="module", params=["splade", "colbert"])
def client(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    addresses: dict[str, str],
) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("home")
    Registry(home / "models").add_model(str(OUTPUTS / request.param), progress=print)
    config = ServeConfig.from_options(
        port=0,
        home=home,
        model=request.param,
        backend="onnxruntime",
        device="cpu",
        store=(
            *(f"{name}={address}" for name, address in addresses.items()),
            "far=grpc://127.0.0.1:1?profile=longbow",
        ),
        max_journal=0,
        embedding_cache=1 << 20,
    )
    with Runtime(config) as runtime, fletcher.connect(runtime.address) as client:
        yield client


def kind(client: Client) -> str:
    return str(client.list_models()[0]["output"])


def expected(name: str) -> dict[str, list[object]]:
    """By text, what a document's `vector` is."""
    rows = pq.read_table(OUTPUTS / f"{name}.parquet").to_pylist()
    if name == "colbert":
        return {row["text"]: row["vectors"] for row in rows if row["prompt"] == "document"}
    return {
        row["text"]: [
            {"index": index, "value": value} for index, value in enumerate(row["weights"]) if value
        ]
        for row in rows
    }


def assert_alike(actual: object, wanted: object, error: float = 1e-4) -> None:
    if isinstance(wanted, dict):
        assert isinstance(actual, dict)
        assert actual["index"] == wanted["index"]
        assert actual["value"] == pytest.approx(wanted["value"], abs=error)
    else:
        assert actual == pytest.approx(wanted, abs=error)


def exchanged(client: Client, data: object, **options: object) -> pa.Table:
    with client.exchange(data, EmbedCommand.from_mapping(options)) as exchange:
        return pa.Table.from_batches(list(exchange), exchange.schema)


def test_texts_in_any_order_repeated_and_missing(client: Client) -> None:
    name = client.list_models()[0]["name"]
    right = expected(name)
    texts = [*right, None, *reversed(list(right)), None, *right] * 3
    table = pa.table({"text": pa.array(texts, pa.utf8())})
    plain = exchanged(client, iter(table.to_batches(7)), dtype="float32")
    encoded = pa.table({"text": table["text"].combine_chunks().dictionary_encode()})
    for found in (plain, exchanged(client, encoded, dtype="float32")):
        assert found.schema.metadata[b"fletcher.output"].decode() == kind(client)
        vectors = found["vector"].to_pylist()
        assert len(vectors) == len(texts)
        for text, vector in zip(texts, vectors, strict=True):
            if text is None:
                assert vector is None
                continue
            assert len(vector) == len(right[text])
            for one, wanted in zip(vector, right[text], strict=True):
                assert_alike(one, wanted)


def test_a_batch_is_refused_by_what_it_makes(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"text": ["a"] * 11})
    made = exchanged(client, table.slice(0, 10), dtype="float16").combine_chunks()
    # Less than ten texts could make at most.
    limit = sum(map(batch_bytes, made.to_batches())) + OVERHEAD_BYTES
    monkeypatch.setattr("fletcher.flight.answers._MAX_WHOLE_BYTES", limit)
    assert exchanged(client, table.slice(0, 10), dtype="float16").num_rows == 10
    with pytest.raises(BatchTooLargeError, match=f"11 rows of a batch make more than {limit} b"):
        exchanged(client, table, dtype="float16", answer_bytes=0)


def test_types(client: Client) -> None:
    texts = list(expected(client.list_models()[0]["name"]))
    exact = exchanged(client, pa.table({"text": texts}), dtype="float32")["vector"]
    halved = exchanged(client, pa.table({"text": texts}), dtype="float16")
    item = halved.schema.field("vector").type.value_type
    if kind(client) == "sparse":
        assert item == pa.struct([("index", pa.int32()), ("value", pa.float16())])
    else:
        assert item == pa.list_(pa.float16(), 8)
        small = exchanged(client, pa.table({"text": texts}), dtype="int8")
        assert small.schema.field("scale").type == pa.list_(pa.float32())
        for vectors, scales, right in zip(
            small["vector"].to_pylist(), small["scale"].to_pylist(), exact.to_pylist(), strict=True
        ):
            restored = np.array(vectors, np.float32) * np.array(scales, np.float32)[:, None]
            assert np.abs(restored - np.array(right)).max() <= 0.5 / 127 + 1e-6
    for vector, right in zip(halved["vector"].to_pylist(), exact.to_pylist(), strict=True):
        for one, wanted in zip(vector, right, strict=True):
            assert_alike(one, wanted, 0.01)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"output": "dense"}, "output"),
        ({"dims": 4}, "dims"),
        ({"dtype": "ubinary"}, "dtype"),
        ({"chunking": "tokens:8"}, "chunking"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    client: Client, options: dict[str, object], field: str
) -> None:
    with pytest.raises(FletcherError) as refused:
        exchanged(client, pa.table({"text": ["vector"]}), **options)
    assert refused.value.field == field
    assert kind(client) in str(refused.value)


def test_the_command_prints_them(
    client: Client, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    argv = ["embed", "vector", "--server", client.address]
    assert main(argv) == 0
    (row,) = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    (right,) = exchanged(client, pa.table({"text": ["vector"]}), dtype="float32")[
        "vector"
    ].to_pylist()
    assert row == {"text": "vector", "vector": right}
    assert main([*argv, "--format", "npy", "--output", str(tmp_path / "vectors.npy")]) == 2
    assert b"`format` npy is for one vector a text" in capfdbinary.readouterr().err


@pytest.mark.parametrize("mode", ["append", "upsert", "delta"])
def test_stores_of_ones_own_take_them(
    client: Client, vectors: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = list(expected(client.list_models()[0]["name"]))
    dataset = f"{kind(client)}-{mode}"
    data = pa.table({"id": [str(n) for n in range(len(texts))], "text": texts})
    for _ in range(2):
        summary = client.put(data, EmbedCommand(dataset=dataset, mode=mode, durability="store"))
        assert summary.complete
    stored = open_store(f"lance:{vectors}").scan(dataset).read_all()
    assert stored.num_rows == len(texts) * (2 if mode == "append" else 1)
    right = exchanged(client, data, dtype="float16")["vector"].to_pylist()
    for number, vector in zip(stored["id"].to_pylist(), stored["vector"].to_pylist(), strict=True):
        assert vector == right[int(number)]
    number = max(range(len(texts)), key=lambda one: len(texts[one]))
    argv = ["search", texts[number], "--dataset", dataset, "--store", f"lance:{vectors}", "--json"]
    assert main([*argv, "--server", client.address]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    if kind(client) == "sparse":
        weights = [{one["index"]: one["value"] for one in vector} for vector in right]
        best = max(sum(w * weights[number].get(i, 0) for i, w in one.items()) for one in weights)
        assert scores[0] == pytest.approx(best, rel=1e-2)


def test_delta_keeps_them_if_other_columns_change(client: Client, vectors: Path) -> None:
    texts = list(expected(client.list_models()[0]["name"]))
    found = []
    for url in ("u", "v"):
        urls = [url] * len(texts)
        data = pa.table({"id": [str(n) for n in range(len(texts))], "text": texts, "url": urls})
        command = EmbedCommand(
            dataset=f"kept-{kind(client)}", mode="delta", columns=("url",), durability="store"
        )
        assert client.put(data, command).complete
        stored = open_store(f"lance:{vectors}").scan(command.dataset or "").read_all()
        assert set(stored["url"].to_pylist()) == {url}
        found.append(stored.sort_by("id")["vector"].to_pylist())
    # Which end of a cut text was cut is not stored, so that it is embedded again.
    assert client.stats()["fletcher.rows.reused"] == 4
    assert found[0] == found[1]


def plain_scores(client: Client, queries: list[str], documents: list[str]) -> np.ndarray:
    """Scores by loops over the vectors that an exchange gives: [num_queries, num_documents]."""
    prompts = {"prompt": "query"} if kind(client) == "multi" else {}
    asked = exchanged(client, pa.table({"text": queries}), dtype="float32", **prompts)
    given = exchanged(client, pa.table({"text": documents}), dtype="float32")

    def score(query: list[Any], document: list[Any]) -> float:
        if kind(client) == "multi":
            one, other = np.array(query), np.array(document)
            return float((one @ other.T).max(axis=1).sum())
        weights = {item["index"]: item["value"] for item in document}
        return sum(item["value"] * weights.get(item["index"], 0) for item in query)

    rows = given["vector"].to_pylist()
    return np.array([[score(one, row) for row in rows] for one in asked["vector"].to_pylist()])


WORDS = "fast search of vectors and words in an arrow flight store of documents".split()
DOCUMENTS = [" ".join(WORDS[n % 5 : n % 5 + 2 + n % 7]) + f" {n}" for n in range(40)]


@pytest.mark.parametrize("name", ["lance", "parquet", "fletcher"])
def test_search_ranks_as_plain_loops_on_every_store(
    client: Client, addresses: dict[str, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, query = f"found-{kind(client)}", "words of the flight store"
    data = pa.table({"id": list(range(40)), "text": DOCUMENTS, "even": [n % 2 for n in range(40)]})
    command = EmbedCommand(
        dataset=dataset, store=name, columns=("even",), dtype="float32", durability="store"
    )
    assert client.put(data, command).complete
    (right,) = plain_scores(client, [query], DOCUMENTS)
    argv = ["search", query, "--dataset", dataset, "--store", addresses[name], "--json"]
    argv += ["--server", client.address]
    for words, allowed in ((["--k", "40"], range(40)), (["--filter", "even = 1"], range(1, 40, 2))):
        assert main([*argv, *words]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        best = sorted(right[list(allowed)], reverse=True)[: len(found)]
        assert len(found) == (40 if len(allowed) == 40 else 5)
        assert {row["id"] for row in found} <= set(allowed)
        assert [row["score"] for row in found] == pytest.approx(best, rel=1e-4)
        assert [right[row["id"]] for row in found] == pytest.approx(best, rel=1e-4)


def test_similar_ranks_as_plain_loops(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = ["words of the flight store", "fast search"]
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "texts.parquet")
    argv = ["similar", *queries, "--candidates", str(tmp_path / "texts.parquet"), "--k", "40"]
    assert main([*argv, "--json", "--server", client.address]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    metric = "maxsim" if kind(client) == "multi" else "dot"
    for query, right in zip(queries, plain_scores(client, queries, DOCUMENTS), strict=True):
        rows = [row for row in found if row["text"] == query]
        assert [row[metric] for row in rows] == pytest.approx(sorted(right)[::-1], rel=1e-4)
        assert {row["row"]: row[metric] for row in rows} == pytest.approx(
            dict(enumerate(right)), rel=1e-4
        )


def test_eval_ranks_as_plain_loops(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = [" ".join(one.split()[:2] + one.split()[-1:]) for one in DOCUMENTS]
    table = pa.table({"query": queries, "document": DOCUMENTS})
    pq.write_table(table, tmp_path / "pairs.parquet")
    argv = ["eval", str(tmp_path / "pairs.parquet"), "--query", "query", "--document", "document"]
    assert main([*argv, "--queries", "40", "--json", "--server", client.address]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    dtypes = ["float32", "float16", *(["int8"] if kind(client) == "multi" else [])]
    assert [row["dtype"] for row in rows] == dtypes
    scores = plain_scores(client, queries, DOCUMENTS)
    own = np.diag(scores)[:, None]
    # Documents with almost equal scores may be in any order.
    most, least = ((scores > own + sign * 1e-4).sum(axis=1) for sign in (-1, 1))
    for k in (1, 10, 100):
        low, high = (most - 1 < k).mean(), (least < k).mean()
        assert low <= rows[0]["recall"][str(k)] <= high
    assert (rows[0]["ndcg_loss"], rows[0]["alignment"]) == (0, None)
    assert all(row["cosine"]["min"] > 0.99 for row in rows)
    assert rows[0]["bytes_per_vector"] > rows[1]["bytes_per_vector"]


def test_a_store_that_takes_dense_vectors_alone_says_so(client: Client) -> None:
    with pytest.raises(FletcherError, match="which this store does not take; `lance:`") as refused:
        client.put(pa.table({"text": ["vector"]}), EmbedCommand(dataset="d", store="far"))
    assert refused.value.field == "model"


def test_arrays_are_for_dense_vectors(client: Client) -> None:
    with pytest.raises(FletcherError, match="`exchange` returns such vectors"):
        client.embed(["vector"])


def test_a_model_gives_its_own_kind_where_it_is_named(client: Client) -> None:
    found = exchanged(client, pa.table({"text": ["vector"]}), output=kind(client))
    assert found.num_rows == 1
