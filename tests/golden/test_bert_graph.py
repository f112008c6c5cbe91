"""The graphs that Fletcher writes compute what the reference implementations compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
import tokenizers

from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry

from .onnx_session import cosines, run_graph

GOLDEN = Path(__file__).parent
MIN_COSINE, MAX_ERROR = 0.99999, 1e-4


def add_tiny(
    folder: Path, *, pooling: str = "mean", normalize: bool = True, activation: str = "gelu"
) -> ModelBundle:
    checkpoint = folder / "tiny"
    shutil.copytree(GOLDEN / "tiny", checkpoint)
    config = checkpoint / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": activation}))
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    if not normalize:
        modules = checkpoint / "modules.json"
        modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    return Registry(folder / "models").add_model(str(checkpoint), progress=print)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_tiny_model_equals_transformers(tmp_path: Path, pooling: str, activation: str) -> None:
    bundle = add_tiny(tmp_path, pooling=pooling, normalize=False, activation=activation)
    table = pq.read_table(GOLDEN / "tiny.parquet")
    expected = np.array(table[f"{pooling}_{activation}"].to_pylist(), np.float32)
    outputs = run_graph(bundle.graph, table["input_ids"].to_pylist())
    assert list(outputs) == ["embedding"]
    assert np.abs(outputs["embedding"] - expected).max() < 2e-5


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_norm_gives_the_raw_vector_back(tmp_path: Path, pooling: str) -> None:
    bundle = add_tiny(tmp_path, pooling=pooling)
    assert bundle.graph_normalizes
    table = pq.read_table(GOLDEN / "tiny.parquet")
    raw = np.array(table[f"{pooling}_gelu"].to_pylist(), np.float32)
    outputs = run_graph(bundle.graph, table["input_ids"].to_pylist())
    assert outputs["norm"].shape == (len(raw), 1)
    assert np.abs(np.linalg.norm(outputs["embedding"], axis=1) - 1).max() < 1e-6
    assert np.abs(outputs["embedding"] * outputs["norm"] - raw).max() < 2e-5


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_row_does_not_depend_on_padding_or_other_rows(tmp_path: Path, pooling: str) -> None:
    bundle = add_tiny(tmp_path, pooling=pooling)
    rows = pq.read_table(GOLDEN / "tiny.parquet")["input_ids"].to_pylist()
    together = run_graph(bundle.graph, rows, width=40)["embedding"]
    alone = np.concatenate([run_graph(bundle.graph, [row])["embedding"] for row in rows])
    assert np.abs(together - alone).max() < 1e-6


def test_for_cls_the_last_layer_goes_on_with_one_token_a_text(tmp_path: Path) -> None:
    model = onnx.load(str(add_tiny(tmp_path, pooling="cls").graph))
    expected = {"layer.0.wide": 7, "layer.1.k": 7}
    expected |= {f"layer.1.{part}": 1 for part in ("q", "projected", "wide", "narrow")}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in expected)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    ids = np.ones((3, 7), np.int64)
    values = session.run(list(expected), {"input_ids": ids, "attention_mask": ids})
    assert {name: value.shape[1] for name, value in zip(expected, values, strict=True)} == expected


def test_graph_is_valid_onnx_with_mappable_weights(tmp_path: Path) -> None:
    bundle = add_tiny(tmp_path)
    onnx.checker.check_model(str(bundle.graph), full_check=True)
    model = onnx.load(str(bundle.graph), load_external_data=False)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    ]
    assert places
    assert {place["location"] for place in places} == {"model.weights"}
    assert all(int(place["offset"]) % 4096 == 0 for place in places)


def test_default_model_equals_sentence_transformers(default_bundle: ModelBundle) -> None:
    # tests/integration/test_golden.py compares all values of `shared/`, with the same graph.
    table = pq.read_table(GOLDEN / "minilm.parquet")
    tokenizer = tokenizers.Tokenizer.from_file(str(default_bundle.tokenizer))
    tokenizer.no_padding()
    tokenizer.enable_truncation(default_bundle.max_length)
    rows = [one.ids for one in tokenizer.encode_batch(table["text"].to_pylist())]
    assert [len(row) for row in rows] == table["token_count"].to_pylist()
    expected = np.array(table["embedding"].to_pylist(), np.float32)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    actual = np.empty_like(expected)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        outputs = run_graph(default_bundle.graph, [rows[index] for index in chosen])
        actual[chosen] = outputs["embedding"]
    assert cosines(actual, expected).min() >= MIN_COSINE
    assert np.abs(actual - expected).max() <= MAX_ERROR
