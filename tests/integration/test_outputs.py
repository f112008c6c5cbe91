"""Types of vectors through a real server: what comes back, what is stored, what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

import fletcher
from fletcher import EmbedCommand
from fletcher.cli import main
from fletcher.config.server import ServeConfig
from fletcher.core.batches import MicroBatch, TextBatch
from fletcher.inference.backend import BackendConfig
from fletcher.inference.onnxruntime import load
from fletcher.models.bundle.registry import Registry
from fletcher.runtime import Runtime
from fletcher.stores.address import open_store
from fletcher.storeserver.server import StoreServer
from fletcher.tokenization.tokenizer import Tokenizer
from tests.conftest import GOLDEN
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import action, error_of, exchange

TEXTS = [f"text number {number}" for number in range(500)]
ROWS = pa.table({"id": [f"n{number}" for number in range(500)], "text": TEXTS})


@pytest.fixture(scope="module")
def exact(client: fletcher.Client) -> np.ndarray:
    vectors: np.ndarray = client.embed(TEXTS, dtype="float32")
    return vectors


def embedded(client: fletcher.Client, **options: object) -> pa.Table:
    with client.exchange(ROWS, EmbedCommand(**options)) as answers:
        return pa.Table.from_batches(list(answers), answers.schema)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(axis=1) / norms)


def test_an_exchange_gives_int8_and_bits(client: fletcher.Client, exact: np.ndarray) -> None:
    by_row = embedded(client, dtype="int8")
    assert by_row.schema.field("scale").type == pa.float32()
    assert cosines(fletcher.dequantize(by_row), exact).min() >= 0.998
    bits = embedded(client, dtype="ubinary")
    assert bits.schema.field("vector").type == pa.list_(pa.uint8(), 4)
    np.testing.assert_array_equal(fletcher.dequantize(bits) > 0, exact > 0)


def test_a_row_that_failed_has_neither_vector_nor_scale(client: fletcher.Client) -> None:
    rows = pa.table({"text": ["one", None]})
    with client.exchange(rows, EmbedCommand(dtype="int8")) as answers:
        (batch,) = answers
    assert batch.column("vector").is_valid().to_pylist() == [True, False]
    assert batch.column("scale").is_valid().to_pylist() == [True, False]


def test_the_embed_action_gives_numbers(server: Runtime) -> None:
    with flight.connect(server.address) as raw:
        answer = action(raw, "embed", {"texts": ["one", "two"], "dtype": "int8"})
        assert len(answer["scale"]) == 2
        assert max(map(abs, answer["embeddings"][0])) == 127
        answer = action(raw, "embed", {"texts": ["one"], "dtype": "ubinary"})
        assert "scale" not in answer
        assert len(answer["embeddings"][0]) == 4


@pytest.mark.parametrize("dtype", ["int8", "ubinary"])
@pytest.mark.parametrize("kind", ["lance", "parquet", "grpc"])
def test_every_store_of_ours_takes_and_finds_them(
    kind: str, dtype: str, start_server: StartServer, tmp_path: Path, exact: np.ndarray
) -> None:
    server = None
    address = f"{kind}:{tmp_path / 'rows'}"
    if kind == "grpc":
        server = StoreServer(tmp_path, host="127.0.0.1", port=0, meta_port=0)
        address = server.address
    runtime = start_server(store=(address,))
    with fletcher.connect(runtime.address) as client:
        summary = client.put(ROWS, EmbedCommand(dataset="d", dtype=dtype, durability="store"))
    assert (summary.complete, summary.rows_stored) == (True, 500)
    store = open_store(address)
    wanted = ["id", "vector", "scale"] if dtype == "int8" else ["id", "vector"]
    found = store.search("d", exact[7], k=20, columns=wanted)
    best = fletcher.rescore(found, exact[7], k=1)
    assert best.column("id").to_pylist() == ["n7"]
    with (
        fletcher.connect(runtime.address) as client,
        pytest.raises(fletcher.ColumnTypeError, match="schema mismatch"),
    ):
        client.put(ROWS, EmbedCommand(dataset="d", dtype="float32"))
    store.close()
    if server is not None:
        runtime.close()
        assert server.close(10)


def test_undeclared_dims_by_leave_of_the_server(
    start_server: StartServer, server: Runtime, exact: np.ndarray
) -> None:
    rows = pa.record_batch({"text": TEXTS[:3]})
    with flight.connect(server.address) as raw, pytest.raises(flight.FlightError) as caught:
        exchange(raw, [rows], rows.schema, dims=12)
    error = error_of(caught.value)
    assert (error["code"], error["field"], error["allowed"]) == (
        "dimension_mismatch",
        "dims",
        ["32"],
    )
    lax = start_server(allow_undeclared=True, store=("none",))
    with fletcher.connect(lax.address) as client:
        short = client.embed(TEXTS, dims=12)
        np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
        assert cosines(short, exact[:, :12]).min() >= 1 - 1e-6
        with pytest.raises(fletcher.InvalidCommandError, match="ubinary, which packs 8"):
            client.embed(TEXTS, dims=12, dtype="ubinary")


def test_exits_run_beside_each_other_and_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path))
    registry = Registry(tmp_path / "models")
    assert main(["model", "add", str(GOLDEN / "tiny"), "--exits", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [1, 2]
    store = f"lance:{tmp_path / 'rows'}"
    fields = {
        "port": 0,
        "home": tmp_path,
        "model": "tiny",
        "device": "cpu",
        "backend": "onnxruntime",
        "threads": 1,
        "store": (store,),
        "max_journal": 0,
        "embedding_cache": 1 << 20,
    }
    backend = load(BackendConfig("onnxruntime", "cpu", str(registry.get_model("tiny").folder)))
    tokens = Tokenizer.from_bundle(registry.get_model("tiny").folder).encode(_texts(TEXTS[:40]))
    batch = MicroBatch(tokens.input_ids, tokens.token_count)
    expected = {one: backend.run(replace(batch, layers=one)).embeddings for one in (1, 2)}
    with (
        Runtime(ServeConfig.from_options(**fields)) as server,
        fletcher.connect(server.address) as client,
    ):

        def one(layers: int | None) -> np.ndarray:
            return np.asarray(client.embed(TEXTS[:40], layers=layers))

        with ThreadPoolExecutor(8) as pool:
            asked = [1, 2, None] * 8
            for layers, vectors in zip(asked, pool.map(one, asked), strict=True):
                np.testing.assert_allclose(vectors, expected[layers or 2], atol=1e-5)
        with pytest.raises(fletcher.InvalidCommandError, match="exits after layers 1, 2"):
            one(7)
        client.put(ROWS, EmbedCommand(dataset="d", layers=1, durability="store"))
        with pytest.raises(fletcher.ModelMismatchError, match=r"`fletcher\.layers` is 2"):
            client.put(ROWS, EmbedCommand(dataset="d", durability="store"))
        # The query, too, leaves after the dataset's layer: it is as near as can be to its own row.
        asked = ["--store", store, "--server", server.address, "--json", "--prompt", ""]
        assert main(["search", TEXTS[3], "--dataset", "d", *asked, "--k", "1"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["score"] == pytest.approx(1, abs=1e-3)


def _texts(texts: list[str]) -> TextBatch:
    data = [text.encode() for text in texts]
    return TextBatch(b"".join(data), np.cumsum([0, *map(len, data)]).astype(np.int64))


def test_ranges_are_calibrated_once_and_kept_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path))
    monkeypatch.setenv("FLETCHER_BACKEND", "null")
    Registry(tmp_path / "models").add_model(str(GOLDEN / "tiny"), progress=print)
    sample = tmp_path / "sample.txt"
    sample.write_text("".join(f"{text}\n" for text in TEXTS))
    fields = {
        "port": 0,
        "home": tmp_path,
        "model": "tiny",
        "backend": "null",
        "int8": "ranges",
        "store": (f"lance:{tmp_path / 'rows'}",),
        "max_journal": 0,
    }
    with (
        Runtime(ServeConfig.from_options(**fields)) as server,
        fletcher.connect(server.address) as client,
        pytest.raises(fletcher.InvalidCommandError, match="fletcher model calibrate tiny"),
    ):
        embedded(client, dtype="int8")

    few = tmp_path / "few.txt"
    few.write_text("a\nb\n")
    assert main(["model", "calibrate", "tiny", str(few)]) == 2
    assert "2 texts with a vector, expected at least 100" in capsys.readouterr().err
    assert main(["model", "calibrate", "tiny", str(sample), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["calibration"] == ["32 dims after 2 layers, normalized"]
    assert main(["model", "calibrate", "tiny", str(sample)]) == 1
    assert "--replace" in capsys.readouterr().err

    with (
        Runtime(ServeConfig.from_options(**fields)) as server,
        fletcher.connect(server.address) as client,
    ):
        by_range = embedded(client, dtype="int8")
        assert "scale" not in by_range.schema.names
        exact = client.embed(TEXTS, dtype="float32")
        assert cosines(fletcher.dequantize(by_range), exact).min() >= 0.998
        client.put(ROWS, EmbedCommand(dataset="d", dtype="int8", durability="store"))
    with (
        Runtime(ServeConfig.from_options(**{**fields, "int8": "row"})) as server,
        fletcher.connect(server.address) as client,
    ):
        assert "scale" in embedded(client, dtype="int8").schema.names
        with pytest.raises(fletcher.ModelMismatchError, match=r"fletcher\.quantization` is row"):
            client.put(ROWS, EmbedCommand(dataset="d", dtype="int8", durability="store"))
